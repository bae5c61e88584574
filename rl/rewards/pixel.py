"""Closeness to the teacher's image, pixel by pixel. Needs no encoder."""

from __future__ import annotations

from torch import Tensor

from engine.models.denoiser import Condition


def pixel_reward(images: Tensor, targets: Tensor, condition: Condition) -> Tensor:
    """Negative mean squared error, in [-1, 0].

    Args:
        images: (B, C, H, W) in [0, 1], any floating dtype.
        targets: the same shape and range.
        condition: not read.

    Returns:
        (B,) fp32.
    """
    return -(images.float() - targets.float()).square().flatten(1).mean(dim=1)
