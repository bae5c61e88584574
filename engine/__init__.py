"""ReDiF Engine: many-step diffusion teachers distilled into few-step students by policy optimisation."""

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").is_file() and (_CHECKOUT / "kernels").is_dir():
    # `python -m engine.x` in a checkout puts its root on sys.path, where our folder `kernels` would be taken for
    # Hugging Face's package of that name by bitsandbytes, diffusers and transformers.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]
