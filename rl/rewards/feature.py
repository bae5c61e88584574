"""Similarity to the teacher's image as an encoder sees it: ReDiF's reward (arXiv 2512.22802)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.denoiser import Condition

from .contract import Encoder, Reward


def feature_reward(encoder: Encoder, *, mean: Tensor | None = None) -> Reward:
    """Cosine of the features of the student's and of the teacher's image, in [-1, 1].

    Args:
        encoder: gives features (B, D).
        mean: (D,) a mean feature vector to subtract from both sides. Features that are all positive (after a ReLU) sit
            in one narrow cone, where every cosine is close to 1; seen from their mean they spread again.

    Returns:
        The reward. A zero feature vector scores 0. Gradients reach the student's images only.
    """

    def reward(images: Tensor, targets: Tensor, condition: Condition) -> Tensor:
        features = encoder(images).features.float()
        with torch.no_grad():
            target_features = encoder(targets).features.float()
        if mean is not None:
            centre = mean.to(features)
            features, target_features = features - centre, target_features - centre
        return F.cosine_similarity(features, target_features, dim=1)

    return reward
