"""What every result file says beside its rows: on which machine, with which versions, by which command."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.machine import processor
from engine.run_directory import write_atomically

ROOT = Path(__file__).resolve().parent.parent


def machine(device: str) -> dict[str, Any]:
    """Date, command, commit, processor or GPU, and versions of a measurement on ``device`` ("cpu" | "cuda")."""
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "-m", f"{_module()}", *sys.argv[1:]]),
        "commit": _commit(),
        "processor": processor(),
        "python": platform.python_version(),
    }
    result["torch"] = torch.__version__  # with what it was built for, which the package's version may not tell
    try:
        result["triton"] = version("triton")
    except PackageNotFoundError:
        result["triton"] = "not installed"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return result


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    write_atomically(Path(path), json.dumps(record, indent=1) + "\n")


def _module() -> str:
    main = sys.modules["__main__"]
    return main.__spec__.name.removesuffix(".__main__") if main.__spec__ else Path(sys.argv[0]).name


def _commit() -> str:
    """The checked-out commit, marked when files that git tracks differ from it."""
    run = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True)
    return run.stdout.decode().strip() or "not a git checkout"
