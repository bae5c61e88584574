"""Take a student out of a run as a directory that stock diffusers loads.

python -m engine.export RUN OUTPUT [--checkpoint best | iteration-000080]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file

from engine.chatter import silence
from engine.checkpoint import existing
from engine.config import load_config
from engine.errors import EngineError
from engine.roles import adapt, load, save_student, teacher_directory


def export(run: Path, output: Path, which: str | None = None) -> None:
    """Write the averaged student of a checkpoint in diffusers format.

    Args:
        run: run directory, finished or not.
        output: must not exist.
        which: "best" (by eta = 0 reward on held-out conditions), the name of a checkpoint, or None for the newest.

    Raises:
        EngineError: names what exists instead.
    """
    if output.exists():
        raise EngineError(f"{output} exists and is not overwritten; name another folder")
    if not (run / "config.yaml").is_file():
        raise EngineError(f"{run} is not a run directory: it has no config.yaml")
    checkpoints = run / "checkpoints"
    names = [path.name for path in existing(checkpoints)] + (["best"] if (checkpoints / "best").is_dir() else [])
    name = which or next((name for name in reversed(names) if name != "best"), None)
    if name not in names:
        raise EngineError(f"{run} has no checkpoint {name or 'yet'}; it has: {', '.join(names) or 'none'}")
    if name == "best":
        shutil.copytree(checkpoints / "best" / "student", output)
        return
    config = load_config(run / "config.yaml")
    pipeline = load(teacher_directory(config), "teacher.path", config)
    if config.lora.rank:
        adapt(pipeline, config)
    save_student(config, pipeline, load_file(checkpoints / name / "ema.safetensors"), output)


def main(arguments: list[str] | None = None) -> None:
    """Command line of `python -m engine.export`."""
    parser = argparse.ArgumentParser(prog="python -m engine.export", description="Export a student of a run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--checkpoint", help='"best" or a name below RUN/checkpoints; default: the newest')
    options = parser.parse_args(arguments)
    silence()
    try:
        export(options.run, options.output, options.checkpoint)
    except EngineError as error:
        sys.exit(f"error: {error}")
    print(options.output)


if __name__ == "__main__":
    main()
