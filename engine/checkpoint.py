"""Checkpoints: written whole or not at all, found again, and refused where they do not fit.

A checkpoint is a folder `checkpoints/iteration-000020` with DeepSpeed's state (`deepspeed/`), the averaged student
(`ema.safetensors`), the trainer's state (`trainer.json`, `baseline.safetensors`) and, in a run that clones and keeps
near its initial student, that one (`reference.safetensors`). It is written under a temporary name, flushed to disk and
renamed, so a process killed at any moment leaves either the whole folder or a temporary one that the next start
removes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import ranks
from engine.config import Config
from engine.errors import EngineError

NAME = "iteration-{:06d}"
BEST = "best"
UNFINISHED, FORMER = ".unfinished-", ".former-"


def write(folder: Path, iteration: int, keep: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `iteration` and drop all but the newest `keep`.

    Args:
        folder: the run's `checkpoints`.
        fill: called on every rank with the folder to write into.
    """
    final = folder / NAME.format(iteration)
    replace(final, fill)
    if ranks.is_first():
        for old in existing(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def write_best(folder: Path, best: dict[str, float], fill: Callable[[Path], None]) -> None:
    """Write the best student so far, in place of the one before; called on every rank.

    Args:
        best: its iteration and reward, written beside it.
        fill: as in `write`.
    """

    def fill_and_describe(path: Path) -> None:
        fill(path)
        if ranks.is_first():
            (path / "best.json").write_text(json.dumps(best))

    replace(folder / BEST, fill_and_describe)


def carry_best(origin: Path, folder: Path, best: dict[str, float]) -> bool:
    """Keep the best student of a run that is resumed, maybe into another folder; called on every rank.

    Args:
        origin: `checkpoints` of the run that is resumed.
        folder: `checkpoints` of the run that resumes it.
        best: what the resumed checkpoint says of the best student.

    Returns:
        Whether it still exists: a run that was killed after its checkpoint may have written a later one over it.
    """
    described = origin / BEST / "best.json"
    exists = described.is_file() and json.loads(described.read_text()) == best

    def copy(path: Path) -> None:
        if ranks.is_first():
            shutil.copytree(origin / BEST, path, dirs_exist_ok=True)

    if exists and origin.resolve() != folder.resolve():
        replace(folder / BEST, copy)
    return exists


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("iteration-*") if path.is_dir())


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)
    for former in folder.glob(f"{FORMER}*"):
        final = folder / former.name.removeprefix(FORMER)
        if final.is_dir():
            shutil.rmtree(former)
        else:
            former.rename(final)


def locate(resume: str, output_dir: Path | None) -> Path | None:
    """The checkpoint that `resume` means, or None for a fresh start.

    Raises:
        EngineError: when a path is given that holds no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = existing(output_dir / "checkpoints") if output_dir is not None else []
        return found[-1] if found else None
    path = Path(resume)
    if (path / "trainer.json").is_file():
        return path
    found = existing(path / "checkpoints")
    if not found:
        raise EngineError(
            f"resume={resume} holds no complete checkpoint; give none, auto, a run directory "
            f"or one of its checkpoints/{NAME.format(20)}"
        )
    return found[-1]


STATE = {"iteration", "config", "teacher", "world_size", "best", "reward", "passes", "seconds"}
"""Keys of `trainer.json`."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint."""
    try:
        state = json.loads((checkpoint / "trainer.json").read_text())
        missing = STATE - set(state)
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(f"checkpoint {checkpoint} cannot be read: {error}; resume from another") from None
    if missing:
        raise EngineError(f"checkpoint {checkpoint} has no {', '.join(sorted(missing))}; resume from another")
    return state


# What a resumed run may change: where it writes, how long it goes on, how often it looks.
_FREE = ("output_dir", "resume", "iterations", "checkpoint", "logging", "evaluation.every", "evaluation.samples",
         "rollout.batch_size", "teacher.cache", "train.threads", "train.ratio_tolerance")  # fmt: skip


def check_compatible(state: dict[str, Any], config: Config, *, teacher: str, world_size: int, origin: Path) -> None:
    """Refuse to resume from a run that was another experiment.

    Raises:
        EngineError: names every key that differs, with both values.
    """
    differing = differences(state["config"], config)
    if state["teacher"] != teacher:
        differing.append("the teacher's weights have changed")
    if state["world_size"] != world_size:
        differing.append(f"it ran on {state['world_size']} ranks and this run has {world_size}")
    if state["iteration"] > config.iterations:
        differing.append(f"it is at iteration {state['iteration']}, beyond iterations={config.iterations}")
    if differing:
        raise EngineError(
            f"cannot resume from {origin}: {'; '.join(differing)}. Ask for the run as it was, or start a new one"
        )


def differences(before: dict[str, Any], config: Config, free: Sequence[str] = _FREE) -> list[str]:
    """The keys, with both values, that make another experiment of a configuration.

    Args:
        free: keys and sections that may differ.
    """
    then, now = _flat(before), _flat(config.as_dict())
    return [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def replace(final: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all, in place of the one before; called on every rank."""
    unfinished = final.with_name(f"{UNFINISHED}{final.name}")
    if ranks.is_first():
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    ranks.barrier()
    fill(unfinished)
    ranks.barrier()
    if ranks.is_first():
        _flush(unfinished)
        former = final.with_name(f"{FORMER}{final.name}")
        if final.exists():
            if former.exists():
                shutil.rmtree(former)
            final.rename(former)
        unfinished.rename(final)
        _flush_folder(final.parent)
        if former.exists():
            shutil.rmtree(former)
    ranks.barrier()


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
