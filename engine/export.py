"""Take a student out of a run as a directory that stock diffusers loads.

python -m engine.export RUN OUTPUT [--checkpoint best | iteration-000080] [--merge]
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
from engine.models.lora import load_lora_state, merged
from engine.roles import adapt, adapter_state, load, save_student, teacher_directory


def export(run: Path, output: Path, which: str | None = None, *, merge: bool = False) -> None:
    """Write the averaged student of a checkpoint in diffusers format.

    Args:
        run: run directory, finished or not.
        output: must not exist.
        which: "best" (by eta = 0 reward on held-out conditions), the name of a checkpoint, or None for the newest.
        merge: add a run's LoRA adapters to the weights and write a whole pipeline.

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
    config = load_config(run / "config.yaml")
    if merge and not config.lora.rank:
        raise EngineError(f"{run} trained whole weights (lora.rank=0), so there is nothing to merge; leave out --merge")
    if name == "best" and not merge:
        shutil.copytree(checkpoints / "best" / "student", output)
        return
    pipeline = load(teacher_directory(config), "teacher.path", config)
    if config.lora.rank:
        adapt(pipeline, config)
    if not merge:
        save_student(config, pipeline, load_file(checkpoints / name / "ema.safetensors"), output)
        return
    if name == "best":
        adapter = pipeline.read_lora(checkpoints / "best" / "student")
    else:
        adapter = adapter_state(load_file(checkpoints / name / "ema.safetensors"))
    load_lora_state(pipeline.denoiser.network, adapter)
    renoise = config.student.sampler == "renoise"
    pipeline.save_student(output, merged(pipeline.denoiser.network), renoise=renoise)


def main(arguments: list[str] | None = None) -> None:
    """Command line of `python -m engine.export`."""
    parser = argparse.ArgumentParser(prog="python -m engine.export", description="Export a student of a run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--checkpoint", help='"best" or a name below RUN/checkpoints; default: the newest')
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights: a whole pipeline")
    options = parser.parse_args(arguments)
    silence()
    try:
        export(options.run, options.output, options.checkpoint, merge=options.merge)
    except EngineError as error:
        sys.exit(f"error: {error}")
    print(options.output)


if __name__ == "__main__":
    main()
