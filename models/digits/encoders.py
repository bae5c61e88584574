"""The two digit classifiers whose features the engine reads: one for the reward, another for the evaluation.

They share nothing but the training images. What the reward is maximised on must not be what the result is measured
with, so the reward encoder is a smooth residual network (GroupNorm, SiLU, strided convolutions) and the evaluation
encoder a plain one (BatchNorm, ReLU, max pooling).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import CLASSES


class Encoding(NamedTuple):
    """What an encoder says of a batch: features (B, D), the layer below the classifier, and logits (B, 10)."""

    features: Tensor
    logits: Tensor


class RewardEncoder(nn.Module):
    """Residual classifier, smooth in its input, so that a small change of the image is a small change of the reward.

    Args:
        width: channels at 8x8; twice as many at 4x4.
        features: D, dimensions of the feature vector.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.fine = _Residual(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = _Residual(2 * width)
        self.norm = nn.GroupNorm(8, 2 * width)
        # Pooled to 2x2, not to one value: the reward should tell where a stroke lies, not only that there is one.
        self.project = nn.Linear(2 * width * 4, features)
        self.classify = nn.Linear(features, CLASSES)

    def forward(self, images: Tensor) -> Encoding:
        """Encodes images (B, 1, 8, 8) in [0, 1]; differentiable in the images."""
        x = self.coarse(self.down(self.fine(self.stem(2 * images - 1))))
        features = self.project(F.avg_pool2d(F.silu(self.norm(x)), 2).flatten(1))
        return Encoding(features, self.classify(F.silu(features)))


class EvaluationEncoder(nn.Module):
    """Plain convolutional classifier whose features measure Frechet distance, precision and recall.

    Args:
        width: channels of the first layer; 3/2 of it in the second, twice in the third.
        features: D, dimensions of the feature vector, non-negative as the pooled features of Inception are.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        channels = (1, width, width * 3 // 2, width * 2)
        self.body = nn.Sequential(
            *_convolution(channels[0], channels[1]),
            *_convolution(channels[1], channels[2]),
            nn.MaxPool2d(2),
            *_convolution(channels[2], channels[3]),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels[3] * 4, features),
            nn.ReLU(),
        )
        self.classify = nn.Linear(features, CLASSES)

    def forward(self, images: Tensor) -> Encoding:
        """Encodes images (B, 1, 8, 8) in [0, 1]."""
        features = self.body(2 * images - 1)
        return Encoding(features, self.classify(features))


class _Residual(nn.Module):
    """x (B, C, H, W) plus two normalised convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(F.silu(self.norm_2(self.conv_1(F.silu(self.norm_1(x))))))


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def accuracy(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (B, 1, 8, 8) in [0, 1] that the encoder gives its label (B,)."""
    with torch.no_grad():
        return (encoder(images).logits.argmax(dim=1) == labels).double().mean().item()
