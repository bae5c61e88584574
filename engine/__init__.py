"""ReDiF Engine: many-step diffusion teachers distilled into few-step students by policy optimisation."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import Config, load_config
    from engine.distillation import Result, distill
    from engine.errors import EngineError

__all__ = ["Config", "EngineError", "Result", "distill", "load_config"]

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").is_file() and (_CHECKOUT / "kernels").is_dir():
    # `python -m engine.x` in a checkout puts its root on sys.path, where our folder `kernels` would be taken for
    # Hugging Face's package of that name by bitsandbytes, diffusers and transformers.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]

_HOME = {
    "Config": "engine.config",
    "EngineError": "engine.errors",
    "Result": "engine.distillation",
    "distill": "engine.distillation",
    "load_config": "engine.config",
}


def __getattr__(name: str) -> Any:
    # DeepSpeed, diffusers and transformers take seconds to import; `import engine` must not.
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
