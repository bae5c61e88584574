"""What the words for precision mean."""

from __future__ import annotations

import torch

from engine.config import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights_dtype(config: Config) -> torch.dtype:
    """Of the frozen weights and the text encoders; where those are quantised, what they compute in."""
    return DTYPES[config.precision if config.teacher.precision in ("int8", "nf4") else config.teacher.precision]
