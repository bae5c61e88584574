"""Similarity to the teacher's image as an encoder sees it: ReDiF's reward (arXiv 2512.22802)."""

from __future__ import annotations

from torch import Tensor

from .contract import Asked, Encoder, Reward, cosine


def feature_reward(encoder: Encoder) -> Reward:
    """Cosine of the features of the student's and of the teacher's image, in [-1, 1].

    Args:
        encoder: gives features (B, D).

    Returns:
        The reward. A zero feature vector scores 0. Gradients reach the student's images only.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        return cosine(encoder(images).features, encoder(targets).features)

    return reward
