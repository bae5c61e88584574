"""From records of iterations to the figures that are published, and whether a speed-up counts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.iteration.measure import LOOPS, PHASES, Record, predicted_passes
from engine.config import Config

RIVALS = {
    "reference": "reference_recipe",
    "flow_grpo_style": "flow_grpo_style",
    "flow_grpo_fast_style": "flow_grpo_fast_style",
}
WHAT_DIFFERS = {
    "ours": "one step with noise at a time (policy.window=1); steps before it once per group; a target once per "
    "condition; steps weighted by their std; one update of an iteration's samples",
    "ours_all_steps": "our engine on the reference's algorithm: noise in all steps (policy.window=null), no step "
    "weights, one update; what is left of the speed-up is the cached teacher and the engineering",
    "reference_recipe": "noise in all steps; a target for every sample of every iteration; one update",
    "flow_grpo_style": "noise in all steps; a target once per condition; two updates of half the samples",
    "flow_grpo_fast_style": "noise in a random window of two steps; otherwise as flow_grpo_style",
}


def cost(name: str, records: Sequence[Record], config: Config) -> dict[str, Any]:
    """Speed and passes of a loop over its seeds.

    Samples are student images of a rollout that were trained on. The iterations of a number do the same work on every
    seed, so the time of each is the fastest of the seeds'.
    """
    samples = config.rollout.conditions * config.rollout.group_size
    new = min(config.iterations, config.rollout.pool // config.rollout.conditions)
    fastest = [min(records, key=lambda record: record.seconds[i]) for i in range(config.iterations)]
    seconds = [record.seconds[i] for i, record in enumerate(fastest)]
    phases = {phase: statistics.fmean(record.phases[i][phase] for i, record in enumerate(fastest)) for phase in PHASES}
    passes = records[0].passes
    units = passes["teacher"] + passes["student_forward"] + 2 * passes["student_backward"]
    return {
        "what": WHAT_DIFFERS[name],
        "samples_per_second": samples * len(seconds) / sum(seconds),
        "samples_per_second_on_new_conditions": samples * new / sum(seconds[:new]),
        "samples_per_second_by_seed": [samples * len(seconds) / sum(record.seconds) for record in records],
        "seconds_per_iteration": {"total": statistics.fmean(seconds), **phases},
        "passes": passes,
        "passes_predicted": predicted_passes(name, config),
        "passes_per_sample": units / (samples * len(seconds)),
    }


def speedups(figures: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """How many times the samples per second of each rival, `name` of ours makes: measured, and in passes alone."""
    result: dict[str, Any] = {}
    for short, rival in RIVALS.items():
        own, other = figures[name], figures[rival]
        by_seed = zip(own["samples_per_second_by_seed"], other["samples_per_second_by_seed"], strict=True)
        result[f"speedup_over_{short}"] = own["samples_per_second"] / other["samples_per_second"]
        result[f"speedup_over_{short}_by_seed"] = [mine / theirs for mine, theirs in by_seed]
        key = "samples_per_second_on_new_conditions"
        result[f"speedup_over_{short}_on_new_conditions"] = own[key] / other[key]
        result[f"speedup_over_{short}_in_passes"] = other["passes_per_sample"] / own["passes_per_sample"]
    return result


def equal_result(rewards: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
    """Whether `name` of ours ends as high as each rival after as many iterations.

    The speed counts where the mean over seeds is not below the rival's by more than the noise, two standard errors of
    the difference.
    """
    result = {}
    for short, rival in RIVALS.items():
        own, other = rewards[name], rewards[rival]
        difference = statistics.fmean(own) - statistics.fmean(other)
        noise = 2 * math.sqrt(statistics.variance(own) / len(own) + statistics.variance(other) / len(other))
        result[short] = {"difference": difference, "noise": noise, "speed_counts": difference >= -noise}
    return result


def summarise(
    config: Config, records: Mapping[str, Sequence[Record]], peaks: Mapping[str, int], initial: float | None
) -> dict[str, Any]:
    """One problem's part of the result file.

    Args:
        records: loop -> one record a seed.
        peaks: loop -> peak bytes.
        initial: held-out reward of the initial student; None: nothing was judged.
    """
    figures = {name: {**cost(name, records[name], config), "peak_bytes": peaks[name]} for name in LOOPS}
    result: dict[str, Any] = {
        **figures,
        **speedups(figures, "ours"),
        "ours_all_steps_speedups": speedups(figures, "ours_all_steps"),
        "settings": {
            "seeds": len(records["ours"]),
            "iterations": config.iterations,
            "conditions": config.rollout.conditions,
            "group_size": config.rollout.group_size,
            "pool": config.rollout.pool,
            "teacher_steps": config.teacher.steps,
            "student_steps": config.student.steps,
            "eta": config.policy.eta,
            "lr": config.optimizer.lr,
            "reward": config.reward.terms,
            "precision": config.precision,
            "threads": torch.get_num_threads(),
        },
    }
    if initial is not None:
        rewards = {name: [record.reward for record in records[name]] for name in LOOPS}
        for name, values in rewards.items():
            spread = {"mean": statistics.fmean(values), "std": statistics.stdev(values), "by_seed": values}
            result[name]["held_out_reward"] = spread
        result["held_out_reward_of_the_initial_student"] = initial
        result["equal_result"] = {name: equal_result(rewards, name) for name in ("ours", "ours_all_steps")}
    return result


def table(model: str, result: Mapping[str, Any]) -> str:
    """Markdown: a row per loop, then the speed-ups and whether they count."""
    heads = ("samples/s", "on new conditions", "s/iteration", *PHASES, "passes/sample", "peak MB", "held-out reward")
    lines = [f"| {model} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in LOOPS:
        row, seconds = result[name], result[name]["seconds_per_iteration"]
        reward = row.get("held_out_reward")
        cells = [
            f"{row['samples_per_second']:.1f}",
            f"{row['samples_per_second_on_new_conditions']:.1f}",
            *(f"{seconds[key]:.3f}" for key in ("total", *PHASES)),
            f"{row['passes_per_sample']:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{reward['mean']:.5f} ± {reward['std']:.5f}" if reward else "not judged",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if "equal_result" in result:
        lines.append(f"\ninitial student: {result['held_out_reward_of_the_initial_student']:.5f}")
    for title, key, part in (
        ("ours", "ours", result),
        ("all steps", "ours_all_steps", result["ours_all_steps_speedups"]),
    ):
        for short in RIVALS:
            kinds = ("", "_on_new_conditions", "_in_passes")
            measured, new, passes = (part[f"speedup_over_{short}{kind}"] for kind in kinds)
            line = f"{title} over {short}: {measured:.2f}x, on new conditions {new:.2f}x, in passes {passes:.2f}x"
            if "equal_result" in result:
                verdict = result["equal_result"][key][short]
                words = "counts" if verdict["speed_counts"] else "does not count"
                line += f"; reward {verdict['difference']:+.5f} (noise {verdict['noise']:.5f}): {words}"
            lines.append(line)
    return "\n".join(lines)
