"""Does the image show the class that was asked for? Needs no teacher image; the counterpart of CLIPScore for labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .contract import Asked, Encoder, Reward, RewardError


def class_log_prob_reward(encoder: Encoder) -> Reward:
    """Log-probability that the encoder's classifier gives to the `class_labels` that were asked for, <= 0.

    Args:
        encoder: gives logits (B, classes).

    Returns:
        The reward; it ignores the targets. It raises RewardError without `class_labels` (B,) int64 that are
        classes of the encoder.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        if "class_labels" not in asked:
            given = ", ".join(asked) or "nothing"
            raise RewardError(f"class_log_prob needs the condition's class_labels, got {given}")
        labels, logits = asked["class_labels"], encoder(images).logits.float()
        if labels.shape != logits.shape[:1]:
            raise RewardError(f"class_labels must be ({len(logits)},), one an image, got {tuple(labels.shape)}")
        outside = int(((labels < 0) | (labels >= logits.shape[1])).sum())
        if outside:
            raise RewardError(f"{outside} of {len(labels)} class_labels are not classes 0..{logits.shape[1] - 1}")
        return F.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)

    return reward
