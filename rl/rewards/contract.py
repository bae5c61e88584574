"""What a reward is, what it may read, and what it may ask of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

Asked = Mapping[str, Any]
"""What each image was asked to show: "class_labels" (B,) int64 of a class model, "prompt" list[str] of length B of a
text model. Other keys are ignored."""

Reward = Callable[[Tensor, Tensor, Asked], Tensor]
"""`reward(images, targets, asked)` -> (B,) fp32, larger is better.

images: the student's, (B, C, H, W) in [0, 1], B > 0. targets: the teacher's, (M, C, H, W) in [0, 1], where M divides B
and each target stands for B / M consecutive images."""


class Encoding(Protocol):
    """What a classifier says of a batch: features (B, D) and logits (B, classes)."""

    features: Tensor
    logits: Tensor


Encoder = Callable[[Tensor], Any]
"""Images (B, C, H, W) in [0, 1] -> what it says of them; usually a frozen module."""


class RewardError(ValueError):
    """A reward that cannot be made or computed: settings, missing files, images outside of [0, 1], values that are not
    finite."""


def by_target(of_images: Tensor, of_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Views of (B, ...) and (M, ...) that broadcast against each other: (M, B / M, ...) and (M, 1, ...)."""
    return of_images.unflatten(0, (len(of_targets), -1)), of_targets.unsqueeze(1)


def cosine(of_images: Tensor, of_targets: Tensor) -> Tensor:
    """Cosine (B, ...) over the last dimension of (B, ..., D) and (M, ..., D), in fp32; 0 for a zero vector."""
    images, targets = by_target(of_images.float(), of_targets.float())
    return F.cosine_similarity(images, targets, dim=-1).flatten(0, 1)
