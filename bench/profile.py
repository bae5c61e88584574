"""Where a training iteration's time, operators, bytes and network passes go.

    python -m bench.profile [--json FILE] [key=value ...]

The job is the default one (the embedded digits); `key=value` changes it as on the training command's line. Figures are
means over one cycle of the window's places, so they are those of an average iteration. Seconds come from iterations
that nothing counts in, counts from others (watch.py says what is counted). On a GPU, kernels and their own time come
from torch.profiler, in a third cycle.

Phases: `student backward` holds DeepSpeed's reduction of gradients, `loss` the choice of pairs, the policy loss and its
gradient up to the network's output; `update` and `other` are what is left of the update and of the iteration.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from bisect import bisect
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.record import machine, write_json
from bench.watch import Clock, Phases, Watch
from engine import Config, load_config, preflight, ranks
from engine.chatter import silence
from engine.models.denoiser import Denoiser
from engine.roles import fit, load_roles
from engine.sources import encode_prompts, load_sources
from engine.trainer import Trainer

PHASES = (
    "teacher", "rollout", "reward", "student forward", "reference forward", "loss", "student backward",
    "optimizer step", "update", "average", "other",
)  # fmt: skip


def make_trainer(config: Config, cache: Path) -> Trainer:
    """The trainer that `engine.distill` makes, in a process group of one.

    Args:
        cache: folder of the teacher's targets and of encoded prompts.
    """
    ranks.start(config.train.threads)
    roles = load_roles(config)
    sources = load_sources(config, roles.pipeline, cache)
    reward = preflight.check(config, roles, ranks.world_size())
    encode_prompts(config, sources, roles.pipeline)
    fit(roles, config)
    return Trainer(config, roles, sources, reward, cache)


def resident(trainer: Trainer) -> list[torch.Tensor]:
    """The tensors that stay on the device between iterations."""
    denoisers = [trainer.collector.targets.teacher, trainer.student, trainer.reference]
    modules = [denoiser.network for denoiser in denoisers if denoiser is not None] + trainer.reward.networks
    return [tensor for module in modules for tensor in itertools.chain(module.parameters(), module.buffers())]


@contextmanager
def phased(trainer: Trainer, phases: Phases, passes: Tally[str]) -> Iterator[None]:
    """Inside, the trainer's methods say which phase they are, and network passes are counted by phase."""

    def named(phase: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with phases.inside(phase):
                return function(*arguments, **options)

        return call

    def counted(predict: Callable) -> Callable:
        @wraps(predict)
        def call(denoiser: Any, x: Any, timestep: Any, condition: Any, *, guidance: float = 1.0) -> Any:
            role = "reference" if denoiser is trainer.reference else "student"
            with phases.inside(f"{role} forward") if phases.current == "loss" else nullcontext():
                predictions = predict(denoiser, x, timestep, condition, guidance=guidance)
                passes[phases.current] += len(x) * denoiser.passes(guidance)
            if predictions[0].requires_grad:
                passes["student backward"] += len(x) * denoiser.passes(guidance)
                # This gradient is the last thing that the loss computes and the first that the network reads.
                predictions[0].register_hook(lambda gradient: phases.rename("student backward"))
            return predictions

        return call

    replaced = [
        (trainer.collector, "teacher_latents", "teacher"),
        (trainer.collector, "roll_out", "rollout"),
        (trainer.collector, "score", "reward"),
        (trainer.objective, "rewards", "reward"),
        (trainer, "update", "update"),
        (trainer.averaged, "follow", "average"),
        (trainer.engine, "backward", "loss"),
    ]
    with ExitStack() as stack:
        for owner, name, phase in replaced:
            stack.enter_context(mock.patch.object(owner, name, named(phase, getattr(owner, name))))
        for target, phase in (
            ("engine.objectives.policy_gradient.pair_loss", "loss"),
            ("engine.zero.step", "optimizer step"),
        ):
            stack.enter_context(mock.patch(target, named(phase, resolve_name(target))))
        stack.enter_context(mock.patch.object(Denoiser, "predict", counted(Denoiser.predict)))
        yield


def measure(trainer: Trainer) -> dict[str, Any]:
    """Figures of an average iteration; the first one, which checks and compiles, is left out.

    Returns:
        seconds: of an iteration that nothing watched.
        phases: phase -> seconds, passes, operators, bytes, reads, deepspeed_reads and uploads of an iteration; on a GPU
            also kernels and kernel_seconds.
        places: where the host reads are, with their phase and number in an iteration.
        passes: role -> network passes, by the trainer's own account.
    """
    cycle = len(trainer.objective.policies)
    trainer.train_iteration()
    rows = [trainer.train_iteration() for _ in range(cycle)]
    clock, passes = Clock(ranks.synchronize), Tally()
    phases = Phases(clock)
    with phased(trainer, phases, passes):
        clock.restart()
        for _ in range(cycle):
            trainer.train_iteration()
        clock(phases.current, phases.current)
    phases = Phases()
    watch = Watch(phases, resident(trainer))
    with phased(trainer, phases, Tally()), watch.on():
        for _ in range(cycle):
            trainer.train_iteration()
    counts = {
        "seconds": clock.seconds,
        "passes": passes,
        "operators": watch.operators,
        "bytes": watch.bytes_by_phase,
        "reads": reads(watch, deepspeed=False),
        "deepspeed_reads": reads(watch, deepspeed=True),
        "uploads": watch.uploads,
    }
    if trainer.device.type == "cuda":
        counts |= kernels(trainer, cycle)
    places = [
        {"phase": phase, "place": place, "reads": count / cycle}
        for phase in PHASES
        for (where, place), count in sorted(watch.reads.items())
        if where == phase
    ]
    roles = [name for name in rows[0] if name.startswith("passes/")]
    return {
        "iterations": cycle,
        "seconds": sum(row["time/iteration"] for row in rows) / cycle,
        "passes": {role.removeprefix("passes/"): sum(row[role] for row in rows) / cycle for role in roles},
        "phases": {phase: {name: count.get(phase, 0) / cycle for name, count in counts.items()} for phase in PHASES},
        "places": places,
    }


def reads(watch: Watch, *, deepspeed: bool) -> Tally[str]:
    """Phase -> host reads, those of DeepSpeed's lines or all others."""
    result: Tally[str] = Tally()
    for (phase, place), count in watch.reads.items():
        if place.startswith("deepspeed/") == deepspeed:
            result[phase] += count
    return result


class Ranges:
    """Names each phase in torch.profiler's record; the device is idle where they meet, so no kernel is in two."""

    def __init__(self) -> None:
        self.open = record_function("phase: other")
        self.open.__enter__()

    def __call__(self, left: str, entered: str) -> None:
        torch.cuda.synchronize()
        self.open.__exit__(None, None, None)
        self.open = record_function(f"phase: {entered}")
        self.open.__enter__()


def kernels(trainer: Trainer, iterations: int) -> dict[str, dict[str, float]]:
    """Kernels that a GPU ran in some iterations, and the seconds that they took, by phase.

    Written from torch.profiler's documentation; it has not been run on a GPU yet.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        ranges = Ranges()
        with phased(trainer, Phases(ranges), Tally()):
            for _ in range(iterations):
                trainer.train_iteration()
        ranges("other", "other")
    events = record.profiler.kineto_results.events()
    on_gpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    spans = sorted(
        (event.start_ns(), event.name().removeprefix("phase: "))
        for event in events
        if event.name().startswith("phase: ") and event.device_type() == torch.autograd.DeviceType.CPU
    )
    starts = [start for start, _ in spans]
    count, seconds = Tally(), defaultdict(float)
    for event in on_gpu:
        if not event.name().startswith(("phase: ", "Memcpy", "Memset")):
            phase = spans[max(0, bisect(starts, event.start_ns()) - 1)][1]
            count[phase] += 1
            seconds[phase] += event.duration_ns() * 1e-9
    return {"kernels": count, "kernel_seconds": seconds}


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` as text."""
    columns = {
        "ms": ("seconds", 1e3, "10.1f"),
        "passes": ("passes", 1, "10.0f"),
        "operators": ("operators", 1, "10.0f"),
        "MB": ("bytes", 1e-6, "10.1f"),
        "reads": ("reads", 1, "10.1f"),
        "DeepSpeed's": ("deepspeed_reads", 1, "13.1f"),
        "uploads": ("uploads", 1, "10.1f"),
    }
    if "kernels" in result["phases"]["other"]:
        columns |= {"kernels": ("kernels", 1, "10.0f"), "kernel ms": ("kernel_seconds", 1e3, "11.1f")}
    widths = {title: int(spec.partition(".")[0]) for title, (_, _, spec) in columns.items()}
    lines = [f"{'an average iteration':20}" + "".join(f"{title:>{widths[title]}}" for title in columns)]
    rows = result["phases"] | {
        "sum": {key: sum(row[key] for row in result["phases"].values()) for key, _, _ in columns.values()}
    }
    for phase, row in rows.items():
        cells = (format(row[key] * scale, spec) for key, scale, spec in columns.values())
        lines.append(f"{phase:20}" + "".join(cells))
    passes = ", ".join(f"{role} {count:g}" for role, count in result["passes"].items())
    lines += [f"unwatched: {result['seconds'] * 1e3:.1f} ms", f"passes by role: {passes}", "host reads:"]
    lines += [f"{row['reads']:8.2f}  {row['phase']:18}{row['place']}" for row in result["places"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with --json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    silence()
    config = load_config(None, options.overrides)
    if config.rollout.chunks > 1:
        parser.error(f"rollout.chunks={config.rollout.chunks}: parts overlap, so no time is one phase's; leave it at 1")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, Path(folder))
        result = measure(trainer)
    print(table(result))
    if options.json:
        about = machine(trainer.device.type) | {"threads": torch.get_num_threads()}
        write_json(options.json, {"machine": about, "config": config.as_dict(), **result})


if __name__ == "__main__":
    main()
