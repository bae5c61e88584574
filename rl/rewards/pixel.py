"""Closeness to the teacher's image, pixel by pixel. Needs no encoder."""

from __future__ import annotations

from torch import Tensor

from .contract import Asked, by_target


def pixel_reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
    """Negative mean squared error, in [-1, 0].

    Args:
        images: (B, C, H, W) in [0, 1], any floating dtype.
        targets: (M, C, H, W), the same range; M divides B.
        asked: not read.

    Returns:
        (B,) fp32.
    """
    ours, theirs = by_target(images.float(), targets.float())
    return -(ours - theirs).square().flatten(2).mean(dim=2).flatten()
