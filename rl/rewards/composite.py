"""The weighted sum of named rewards, with everything checked that would otherwise train on nonsense."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.denoiser import Condition

from .class_log_prob import class_log_prob_reward
from .contract import Encoder, Encoding, Reward, RewardError
from .feature import feature_reward
from .pixel import pixel_reward

RewardTerms = Mapping[str, float]
"""Name of a reward -> its weight in the sum."""

TERMS = ("feature", "class_log_prob", "pixel")
ENCODED_TERMS = ("feature", "class_log_prob")
RANGE_TOLERANCE = 1e-3  # rounding of a bf16 decoder at 1 is larger than fp32's, and still no mistake of range


def composite_reward(
    terms: RewardTerms, encoder: Encoder | None, *, feature_mean: Tensor | None = None
) -> CompositeReward:
    """The reward sum_i weight_i * reward_i(images, targets, condition).

    Args:
        terms: "feature", "class_log_prob" or "pixel" -> a finite weight; at least one that is not 0.
        encoder: read by "feature" and "class_log_prob", and may be None without them.
        feature_mean: (D,) subtracted from the features of both sides by "feature".

    Returns:
        A callable that returns the sum and each unweighted term.

    Raises:
        RewardError: (a ValueError) for unknown names, unusable weights or a missing encoder.
    """
    if not terms or not any(terms.values()):
        raise RewardError(f"no reward in {dict(terms)}; give at least one of {', '.join(TERMS)} a weight")
    for name, weight in terms.items():
        if name not in TERMS:
            near = difflib.get_close_matches(name, TERMS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RewardError(f"there is no reward {name!r}; {hint}allowed are {', '.join(TERMS)}")
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise RewardError(f"the weight of {name} must be a finite number, got {weight!r}")
        if name in ENCODED_TERMS and encoder is None:
            raise RewardError(f"the reward {name} reads an encoder, and none was given")
    return CompositeReward(dict(terms), encoder, feature_mean)


@dataclass(frozen=True)
class CompositeReward:
    """A weighted sum of rewards; made by `composite_reward`.

    Attributes:
        terms: name -> weight.
        encoder: shared by all terms, and run once on the images and once on the targets of a call.
        feature_mean: (D,) or None, the origin from which "feature" measures angles.
    """

    terms: RewardTerms
    encoder: Encoder | None
    feature_mean: Tensor | None = None

    def __call__(self, images: Tensor, targets: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores a batch.

        Args:
            images: (B, C, H, W) in [0, 1], any floating dtype; the caller clamps.
            targets: the teacher's images, the same shape and range, one for each of `images` (a group repeats its own).
            condition: tensors (B, ...); `class_labels` (B,) int64 for "class_log_prob".

        Returns:
            (total, terms): (B,) fp32 and name -> (B,) fp32 without weights; all differentiable in the images.

        Raises:
            RewardError: (a ValueError) for shapes that differ, images outside of [0, 1] by more than 1e-3, and rewards
                that are not finite, naming the term and the number of samples.
        """
        if images.dim() != 4 or images.shape != targets.shape:
            raise RewardError(
                f"images and targets must be (B, C, H, W) of one shape, got {tuple(images.shape)} "
                f"and {tuple(targets.shape)}"
            )
        _check_range("images", images)
        _check_range("targets", targets)
        images, targets = images.float(), targets.detach().float()
        rewards = self._rewards()
        scores = {name: rewards[name](images, targets, condition) for name in self.terms}
        for name, score in scores.items():
            bad = int((~score.isfinite()).sum())
            if bad:
                raise RewardError(f"the reward {name} is not finite for {bad} of {len(score)} samples")
        total = torch.stack([weight * scores[name] for name, weight in self.terms.items()]).sum(dim=0)
        return total, scores

    def _rewards(self) -> dict[str, Reward]:
        encoder = _Once(self.encoder)
        return {
            "feature": feature_reward(encoder, mean=self.feature_mean),
            "class_log_prob": class_log_prob_reward(encoder),
            "pixel": pixel_reward,
        }


class _Once:
    """An encoder that remembers, for one call of the composite, what it said of each tensor."""

    def __init__(self, encoder: Encoder | None) -> None:
        self.encoder = encoder
        self.known: list[tuple[Tensor, Encoding]] = []

    def __call__(self, images: Tensor) -> Encoding:
        for seen, encoding in self.known:
            if seen is images:
                return encoding
        encoding = self.encoder(images)
        self.known.append((images, encoding))
        return encoding


def _check_range(name: str, images: Tensor) -> None:
    # A nan compares as neither: it goes on to the terms, which report it by their names.
    outside = (images < -RANGE_TOLERANCE) | (images > 1 + RANGE_TOLERANCE)
    count = int(outside.flatten(1).any(dim=1).sum())
    if count:
        low, high = images.min().item(), images.max().item()
        raise RewardError(
            f"{count} of {len(images)} {name} leave [0, 1]: values from {low:.4g} to {high:.4g}; "
            "bring [-1, 1] to [0, 1] first and clamp after"
        )
