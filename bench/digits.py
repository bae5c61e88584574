"""The default job over several training seeds, and its control: what GRPO gains, and that the reward is what drives it.

    python -m bench.digits [--seeds 0 1 2 3 4] [--shuffle] [--output FILE] [key=value ...]

`--shuffle` permutes the advantages inside each group, so that updates are as large but say nothing about the reward.
Every run is the last iteration of a fixed number, never the best one. Runs go to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine import distill, load_config
from engine.collector import Batch
from engine.conditions import seed_of
from engine.objectives.policy_gradient import PolicyGradient
from engine.run_directory import write_atomically

FIGURES = ("fd", "precision", "recall", "density", "coverage", "class_accuracy", "paired_cosine")


def shuffled_advantages(advantages: Any) -> Any:
    """`PolicyGradient.advantages`, its result permuted inside each group."""

    def shuffle(objective: PolicyGradient, rewards: Tensor, batch: Batch) -> Tensor:
        config = objective.context.config
        advantage, size = advantages(objective, rewards, batch), config.rollout.group_size
        generator = torch.Generator().manual_seed(seed_of("control", config.seed, batch.iteration))
        groups = advantage.view(-1, size)
        order = torch.stack([torch.randperm(size, generator=generator) for _ in groups])
        return groups.gather(1, order.to(groups.device)).flatten()

    return shuffle


def run(seeds: Sequence[int], overrides: Sequence[str], *, shuffle: bool) -> list[dict[str, Any]]:
    """Summaries of one run per seed."""
    control = mock.patch.object(PolicyGradient, "advantages", shuffled_advantages(PolicyGradient.advantages))
    summaries = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            where = [f"seed={seed}", f"output_dir={folder}/seed{seed}", "logging.tensorboard=false"]
            config = load_config(None, [*overrides, *where])
            if shuffle:
                with control:
                    summaries.append(distill(config).metrics)
            else:
                summaries.append(distill(config).metrics)
    return summaries


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per seed, their mean and spread, and the teacher's rows."""
    lines = ["| run | gap closed | " + " | ".join(FIGURES) + " |", "|---|---|" + "---|" * len(FIGURES)]

    def row(name: str, gap: str, values: Sequence[float]) -> None:
        lines.append(f"| {name} | {gap} | " + " | ".join(f"{value:.3f}" for value in values) + " |")

    for name in ("teacher", "teacher_few_steps"):
        first = summaries[0][name]
        row(f"teacher, {first['steps']} steps", "", [first[figure] for figure in FIGURES])
    for summary in summaries:
        student = summary["student"]
        row(f"student, seed {summary['seed']}", f"{summary['gap_closed']:.2f}", [student[key] for key in FIGURES])
    if len(summaries) > 1:
        gaps = [summary["gap_closed"] for summary in summaries]
        for name, of in (("student, mean", statistics.mean), ("student, standard deviation", statistics.stdev)):
            row(name, f"{of(gaps):.2f}", [of([s["student"][figure] for s in summaries]) for figure in FIGURES])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.digits", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shuffle", action="store_true", help="the control: advantages shuffled inside each group")
    parser.add_argument("--output", type=Path, help="JSON file of all summaries; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.output is not None and options.output.exists():
        parser.error(f"--output {options.output} exists and is not overwritten")
    summaries = run(options.seeds, options.overrides, shuffle=options.shuffle)
    print(table(summaries))
    if options.output is not None:
        result = {
            "what": "bench.digits",
            "shuffle": options.shuffle,
            "overrides": options.overrides,
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "runs": summaries,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
