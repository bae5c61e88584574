"""What a run will need of a GPU's memory: `python -m engine.plan [CONFIG] --gpu 24GiB [--ranks N] [key=value ...]`.

Traced on tensors without data, so neither weights nor a GPU are needed: the config.json files of teacher.path are
enough, and for public models those of `engine/configs/architectures`. docs/memory.md: what is counted, and how well.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import Config, load_config
from engine.conflicts import conflicts
from engine.errors import EngineError
from engine.planning import advice as advising
from engine.planning.advice import Advice
from engine.planning.networks import locate
from engine.planning.phases import KINDS, Memory, memory
from engine.preflight import check_shares

SHARE = 0.92
"""Of a GPU's memory that a plan may fill: the rest is for the CUDA context, workspaces of cuDNN and cuBLAS, buffers of
NCCL, and gaps between the allocator's blocks."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Plan:
    """The predicted memory of a run.

    Attributes:
        config: of the run.
        directory: whose config.json files were read.
        gpu_bytes: of each GPU.
        ranks: number of GPUs.
        memory: by phase and kind.
    """

    config: Config
    directory: Path
    gpu_bytes: int
    ranks: int
    memory: Memory

    @property
    def budget(self) -> int:
        """Bytes of a GPU that may be filled."""
        return int(self.gpu_bytes * SHARE)

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the budget."""
        return self.memory.worst.total <= self.budget

    @cached_property
    def advice(self) -> tuple[Advice, ...]:
        """What would make it fit, cheapest in speed first; each was planned itself, which takes a while. Empty where it
        fits, and where nothing helps."""
        if self.fits:
            return ()

        found = advising.advise(
            self.config, self.ranks, self.budget, lambda config: memory(config, self.directory, self.ranks)
        )
        return tuple(sorted(found, key=lambda entry: entry.slowdown))

    def line(self) -> str:
        """One line: whether it fits, and the worst phase."""
        worst = self.memory.worst
        return (
            f"memory plan: {_gib(worst.total)} GiB in the phase {worst.name!r}, of {_gib(self.budget)} that a GPU of "
            f"{_gib(self.gpu_bytes)} GiB leaves ({SHARE:.0%}): {'fits' if self.fits else 'does not fit'}"
        )

    def table(self) -> str:
        """GiB by phase and kind, and the verdict; without advice."""
        names = [kind for kind in KINDS if any(phase.kinds.get(kind) for phase in self.memory.phases)]
        width = max(len(phase.name) for phase in self.memory.phases) + 2
        lines = [f"{'GiB per GPU':{width}}" + "".join(f"{name:>18}" for name in [*names, "total"])]
        for phase in self.memory.phases:
            row = [*(phase.kinds.get(name, 0) for name in names), phase.total]
            lines.append(f"{phase.name:{width}}" + "".join(f"{_gib(size):>18}" for size in row))
        lines += [
            f"host memory, each rank: {_gib(self.memory.host)} GiB (averages, latents, offloaded and paged states)",
            *self.memory.notes,
            self.line(),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All figures in bytes, as `--json` writes them."""
        return {
            "gpu": self.gpu_bytes,
            "budget": self.budget,
            "ranks": self.ranks,
            "fits": self.fits,
            "phases": {phase.name: {**phase.kinds, "total": phase.total} for phase in self.memory.phases},
            "host": self.memory.host,
            "notes": list(self.memory.notes),
        }


def plan(config: Config, *, gpu_bytes: int, ranks: int = 1, architecture: str | None = None) -> Plan:
    """Predict the memory of a run.

    Args:
        gpu_bytes: memory of each GPU.
        ranks: number of GPUs.
        architecture: directory of config.json files, or the name of a shipped one, instead of teacher.path.

    Raises:
        EngineError: a directory or a choice that cannot be planned, naming the key.
    """
    problems = conflicts(config, "cuda")
    if problems:
        raise EngineError("; ".join(problems))
    check_shares(config, ranks)
    try:
        directory = locate(config.teacher.path if architecture is None else architecture)
    except EngineError as error:
        raise EngineError(f"{'teacher.path' if architecture is None else '--architecture'}: {error}") from None
    return Plan(config, directory, gpu_bytes, ranks, memory(config, directory, ranks))


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "24GiB", "80GB" or "8589934592".

    Raises:
        EngineError: not such a size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise EngineError(f"--gpu {text!r} is not a size; give one such as 24GiB or 80GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan; returns the exit code: 0 it fits, 1 it does not, 2 after an error that was explained."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.plan",
        description="Predict the memory of a run on each GPU, without weights and without a GPU.",
    )
    parser.add_argument("config", nargs="?", help="YAML file; default: the embedded digits")
    parser.add_argument("--gpu", required=True, help="memory of each GPU, such as 24GiB")
    parser.add_argument("--ranks", type=int, default=1, help="number of GPUs")
    parser.add_argument("--architecture", help="directory of config.json files, or a shipped one, for teacher.path")
    parser.add_argument("--json", metavar="OUT", help="write the figures here too")
    parser.add_argument("--no-advice", action="store_true", help="do not look for what would make it fit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.micro_batch=2 lora.rank=16")
    options = parser.parse_intermixed_args(arguments)
    if options.config is not None and "=" in options.config:
        options.config, options.overrides = None, [options.config, *options.overrides]

    from engine.chatter import silence

    silence()
    try:
        if options.ranks < 1:
            raise EngineError(f"--ranks {options.ranks} is not a number of GPUs; give at least 1")
        config = load_config(options.config, options.overrides)
        started = time.perf_counter()
        made = plan(config, gpu_bytes=parse_bytes(options.gpu), ranks=options.ranks, architecture=options.architecture)
        print(made.table())
        advice = () if made.fits or options.no_advice else made.advice
        print(_spoken(made, advice, searched=not options.no_advice), end="")
        if options.json:
            figures = made.as_dict() | {
                "seconds": round(time.perf_counter() - started, 1),
                "advice": [vars(entry) for entry in advice],
            }
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0 if made.fits else 1


def _spoken(made: Plan, advice: Sequence[Advice], *, searched: bool) -> str:
    if made.fits or not searched:
        return ""
    if not advice:
        return "no combination of the known switches makes it fit; a larger GPU, more GPUs or a smaller model would\n"
    lines = ["what would make it fit, cheapest in speed first (time of an iteration: estimated, not measured):"]
    for entry in advice:
        lines.append(f"  {' + '.join(entry.switches)}: {_gib(entry.peak)} GiB, about {entry.slowdown:.2f} of the time")
        lines.append(f"      {' '.join(map(_quoted, entry.overrides))}")
        lines += [f"      gives up: {loss}" for loss in entry.loses]
    return "\n".join(lines) + "\n"


def _quoted(override: str) -> str:
    return f"'{override}'" if any(character in override for character in " {}") else override


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
