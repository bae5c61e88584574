"""Likeness to the teacher's image in the hidden states of any vision model: LPIPS (arXiv 1801.03924) without the
learned weights of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import Asked, Encoder, Reward, by_target


def perceptual_reward(encoder: Encoder, *, layers: Sequence[int]) -> Reward:
    """Negative distance of hidden states, in [-4, 0]; 0 for equal images.

    At each position the vector of channels is divided by its length. The distance is the squared length of the
    difference, averaged over positions and then over layers.

    Args:
        encoder: gives hidden states (B, L, D) or (B, D, H, W) under the numbers of the layers.
        layers: which of them.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        ours, theirs = encoder(images), encoder(targets)
        return -torch.stack([_distance(ours[layer], theirs[layer]) for layer in layers]).mean(dim=0)

    return reward


def _distance(of_images: Tensor, of_targets: Tensor) -> Tensor:
    ours, theirs = by_target(*(F.normalize(_positions(hidden), dim=-1) for hidden in (of_images, of_targets)))
    return (ours - theirs).square().sum(dim=-1).mean(dim=-1).flatten()


def _positions(hidden: Tensor) -> Tensor:
    """(B, L, D), from that or from (B, D, H, W)."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
