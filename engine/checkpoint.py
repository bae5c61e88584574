"""Checkpoints: written whole or not at all, found again, and refused where they do not fit.

A checkpoint is a folder `checkpoints/iteration-000020` with DeepSpeed's state (`deepspeed/`), the averaged student
(`ema.safetensors`) and the trainer's state (`trainer.json`, `baseline.safetensors`). It is written under a temporary
name, flushed to disk and renamed, so a process killed at any moment leaves either the whole folder or a temporary one
that the next start removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import ranks
from engine.config import Config
from engine.errors import EngineError

NAME = "iteration-{:06d}"
BEST = "best"
UNFINISHED = ".unfinished-"


def write(folder: Path, iteration: int, keep: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `iteration` and drop all but the newest `keep`.

    Args:
        folder: the run's `checkpoints`.
        fill: called on every rank with the folder to write into.
    """
    final = folder / NAME.format(iteration)
    _replace(final, fill)
    if ranks.is_first():
        for old in existing(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def write_best(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write the best student so far, in place of the one before; called on every rank."""
    _replace(folder / BEST, fill)


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("iteration-*") if path.is_dir())


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)
    former = folder / f".former-{BEST}"
    if former.is_dir():
        if (folder / BEST).is_dir():
            shutil.rmtree(former)
        else:
            former.rename(folder / BEST)


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


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint."""
    try:
        return json.loads((checkpoint / "trainer.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise EngineError(f"checkpoint {checkpoint} cannot be read: {error}") from None


# What a resumed run may change: where it writes, how long it goes on, how often it looks.
_FREE = ("output_dir", "resume", "iterations", "checkpoint", "logging", "evaluation.every", "evaluation.samples",
         "rollout.batch_size", "teacher.cache", "train.threads", "train.ratio_tolerance")  # fmt: skip


def check_compatible(state: dict[str, Any], config: Config, *, teacher: str, world_size: int, origin: Path) -> None:
    """Refuse to resume from a run that was another experiment.

    Raises:
        EngineError: names every key that differs, with both values.
    """
    before, now = _flat(state["config"]), _flat(config.as_dict())
    differing = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    if state["teacher"] != teacher:
        differing.append("the teacher's weights have changed")
    if state["world_size"] != world_size:
        differing.append(f"it ran on {state['world_size']} ranks and this run has {world_size}")
    if state["iteration"] > config.iterations:
        differing.append(f"it is at iteration {state['iteration']}, beyond iterations={config.iterations}")
    if differing:
        raise EngineError(f"cannot resume from {origin}: {'; '.join(differing)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _replace(final: Path, fill: Callable[[Path], None]) -> None:
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
        former = final.with_name(f".former-{final.name}")
        if final.exists():
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


def iteration_of(checkpoint: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(re.fullmatch(r"iteration-(\d+)", checkpoint.name).group(1))
