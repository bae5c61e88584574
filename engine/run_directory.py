"""The folder of a run: made once, never overwritten; its metrics and TensorBoard files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint
from engine.config import Config, load_config
from engine.errors import EngineError

RUNS = Path("runs")

CACHES = ("prompt_cache", "teacher_cache")
"""What a run may leave that was stopped before its first iteration; it is read again, never taken on trust."""


def resolve(config: Config, origin: Path | None) -> Path:
    """Where a run writes: output_dir, the run that is resumed, or a new folder below `runs/`.

    Args:
        origin: the checkpoint that is resumed, or None.

    Raises:
        EngineError: when output_dir exists, is not empty and is not the run that is resumed, from its end.
    """
    resumed = None
    if origin is not None and origin.parent.name == "checkpoints":
        resumed = origin.parent.parent
    if config.output_dir is not None:
        folder = Path(config.output_dir)
    elif resumed is not None:
        folder = resumed
    else:
        return RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.objective.kind}-seed{config.seed}-{os.getpid()}"
    if folder.exists() and not folder.is_dir():
        raise EngineError(f"output_dir={folder} is a file; give a new folder")
    if not folder.is_dir() or not any(path.name not in CACHES for path in folder.iterdir()):
        return folder
    if resumed is not None and folder.resolve() == resumed.resolve():
        newest = checkpoint.existing(origin.parent)[-1]
        if origin.resolve() != newest.resolve():
            raise EngineError(
                f"resume={origin} is not the newest checkpoint of output_dir={folder}, and what came after it is never "
                f"overwritten; give a new output_dir, or resume from {newest}"
            )
        return folder
    if config.resume == "auto" and (folder / "config.yaml").is_file():
        differing = checkpoint.differences(load_config(folder / "config.yaml").as_dict(), config)
        if differing:
            raise EngineError(
                f"output_dir={folder} holds the beginning of another run: {'; '.join(differing)}. "
                "Ask for the run as it was, or give a new folder"
            )
        return folder  # killed before its first checkpoint: the same run again, from the start
    raise EngineError(
        f"output_dir={folder} is not empty and is never overwritten; "
        "give a new folder, or resume=auto to go on with its run"
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


class RunDirectory:
    """Files of one run; only rank 0 has one.

    Args:
        folder: created when it does not exist.
        config: written to `config.yaml`.
        iteration: metrics beyond this iteration are dropped, as a resumed run makes them anew.
        origin: run whose metrics go before ours, when it is another folder.
    """

    def __init__(self, folder: Path, config: Config, *, iteration: int = 0, origin: Path | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(
                f"output_dir={folder} cannot be made: {error.strerror}; give a folder that can be written"
            ) from None
        self.folder = folder
        write_atomically(folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
        earlier = read_metrics((origin or folder) / "metrics.jsonl") if iteration else []
        self.metrics = [row for row in earlier if row["iteration"] <= iteration]
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.metrics))
        self._tensorboard = self._wandb = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=iteration + 1)
        if config.logging.wandb:
            import wandb

            self._wandb = wandb.init(dir=folder, name=folder.name, config=config.as_dict(), resume="allow")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one iteration to metrics.jsonl and the loggers."""
        self.metrics.append(dict(row))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "iteration":
                    self._tensorboard.add_scalar(name, value, row["iteration"])
        if self._wandb is not None:
            self._wandb.log(dict(row), step=row["iteration"])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
