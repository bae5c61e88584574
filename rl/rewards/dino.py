"""Likeness to the teacher's image in the features of DINOv2 or DINOv3."""

from __future__ import annotations

from torch import Tensor

from .contract import Asked, Encoder, Reward, cosine


def dino_reward(encoder: Encoder, *, tokens: str) -> Reward:
    """Cosine of the two images' tokens, in [-1, 1].

    Args:
        encoder: gives "cls" (B, D) or "patch" (B, L, D).
        tokens: "cls": the cosine of the class tokens, likeness of content. "patch": the mean over positions of the
            cosine of the patch tokens at that position, likeness of content and place.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        similarity = cosine(encoder(images)[tokens], encoder(targets)[tokens])
        return similarity if tokens == "cls" else similarity.mean(dim=1)

    return reward
