"""What a reward is, and what it may ask of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from engine.models.denoiser import Condition

Reward = Callable[[Tensor, Tensor, Condition], Tensor]
"""`reward(images, targets, condition)`: the student's images (B, C, H, W) in [0, 1], the teacher's of the same shape
and range, and tensors (B, ...) of the condition -> (B,) fp32, larger is better, differentiable in the images."""


class Encoding(Protocol):
    """What an encoder says of a batch: features (B, D) and logits (B, classes)."""

    features: Tensor
    logits: Tensor


Encoder = Callable[[Tensor], Encoding]
"""Images (B, C, H, W) in [0, 1] -> their encoding; usually a frozen module."""


class RewardError(ValueError):
    """A reward that cannot be computed: unknown terms, images outside of [0, 1], values that are not finite."""
