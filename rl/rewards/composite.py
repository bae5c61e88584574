"""The weighted sum of named rewards, with everything checked that would otherwise train on nonsense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .aesthetic import aesthetic_reward, load_head
from .class_log_prob import class_log_prob_reward
from .clip import clip_reward, clip_text_reward
from .contract import Asked, Encoder, Reward, RewardError
from .dino import dino_reward
from .endpoint import endpoint_reward
from .feature import feature_reward
from .jpeg import jpeg_reward
from .local_model import LocalModel, Models, load_models
from .perceptual import perceptual_reward
from .pixel import pixel_reward
from .settings import FunctionSettings, ModelSettings, RewardTerms, TermSettings, read_terms
from .standardizer import Standardizer
from .user_function import user_reward

RANGE_TOLERANCE = 1e-3  # rounding of a bf16 decoder at 1 is larger than fp32's, and still no mistake of range
GIVEN_ENCODER = ("feature", "class_log_prob")
BLACK_BOXES = ("jpeg", "http")
ASKS = {"class_log_prob": "class_labels", "clip_text": "prompt", "pickscore": "prompt", "hps": "prompt"}


@dataclass(frozen=True)
class Term:
    """One reward of a sum.

    Attributes:
        weight: its factor.
        make: the encoder, as one call of the composite sees it -> the reward.
        model: the encoder that it reads; None: the composite's, or none.
        differentiable: whether gradients reach the student's images; if not, it is called without.
        asks: the key of `asked` that it cannot do without; None: there is none.
    """

    weight: float
    make: Callable[[Encoder], Reward]
    model: LocalModel | None = None
    differentiable: bool = True
    asks: str | None = None


def make_reward(
    terms: RewardTerms,
    *,
    device: torch.device | str,
    encoder: Encoder | None = None,
    standardize: bool = False,
    models: Models = load_models,
) -> CompositeReward:
    """The reward sum_i weight_i * reward_i(images, targets, asked).

    Args:
        terms: name -> weight, or a mapping with `kind` (by default the name), `weight` and the kind's own keys
            (docs/rewards.md); at least one weight that is not 0.
        device: where models of local directories are loaded to, once for all terms that share a directory.
        encoder: read by "feature" and "class_log_prob", and may be None without them.
        standardize: give the composite a Standardizer of its terms.
        models: loads the models of local directories.

    Returns:
        A callable that returns the sum and each unweighted term.

    Raises:
        RewardError: (a ValueError) for unknown names, unusable settings, missing files or a missing encoder.
    """
    read = read_terms(terms)
    for name, (kind, _) in read.items():
        if kind in GIVEN_ENCODER and encoder is None:
            raise RewardError(f"reward.terms.{name}: the reward {name} reads an encoder, and none was given")
    loaded = models(
        {name: settings for name, (_, settings) in read.items() if isinstance(settings, ModelSettings)},
        torch.device(device),
    )
    made = {}
    for name, (kind, settings) in read.items():
        function = isinstance(settings, FunctionSettings)
        made[name] = Term(
            weight=settings.weight,
            make=_maker(name, kind, settings, loaded.get(name)),
            model=loaded.get(name),
            differentiable=settings.differentiable if function else kind not in BLACK_BOXES,
            asks=ASKS.get(kind),
        )
    weights = {name: term.weight for name, term in made.items()}
    return CompositeReward(made, encoder, Standardizer(weights) if standardize else None)


def _maker(name: str, kind: str, settings: TermSettings, model: LocalModel | None) -> Callable[[Encoder], Reward]:
    match kind:
        case "feature":
            return feature_reward
        case "class_log_prob":
            return class_log_prob_reward
        case "pixel":
            return _alone(pixel_reward)
        case "clip":
            return clip_reward
        case "clip_text":
            return partial(clip_text_reward, embed=model.embed, scale=1.0, name=name)
        case "pickscore" | "hps":
            return partial(clip_text_reward, embed=model.embed, scale=model.logit_scale, name=name)
        case "dino":
            return partial(dino_reward, tokens=settings.tokens)
        case "perceptual":
            return partial(perceptual_reward, layers=settings.layers)
        case "aesthetic":
            try:
                head = load_head(settings.head, model.network.config.projection_dim, model.device)
            except RewardError as error:
                raise RewardError(f"reward.terms.{name}.head={settings.head}: {error}") from None
            return partial(aesthetic_reward, head=head)
        case "jpeg":
            return _alone(jpeg_reward(quality=settings.quality))
        case "http":
            return _alone(endpoint_reward(settings, name=name))
        case _:
            return _alone(user_reward(kind, name=name))


def _alone(reward: Reward) -> Callable[[Encoder], Reward]:
    return lambda _: reward


@dataclass(frozen=True)
class CompositeReward:
    """A weighted sum of rewards; made by `make_reward`. Calls keep no state, so another thread may make them, on the
    CUDA stream that is current there.

    Attributes:
        terms: name -> term.
        encoder: of the terms without a model of their own.
        standardizer: running statistics, for the caller to update with the rewards of all ranks; the composite itself
            never reads them.
    """

    terms: Mapping[str, Term]
    encoder: Encoder | None = None
    standardizer: Standardizer | None = None

    def __call__(self, images: Tensor, targets: Tensor, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores a batch. Every encoder runs once on the images and once on the targets, whatever the number of terms.

        Args:
            images: (B, C, H, W) in [0, 1], any floating dtype; the caller clamps.
            targets: the teacher's images (M, C, H, W), the same range; M divides B, and each target stands for B / M
                consecutive images (a group of samples). It is encoded once.
            asked: what each image was asked to show: "class_labels" (B,) int64 or "prompt", a list of B strings.

        Returns:
            (total, terms): (B,) fp32 and name -> (B,) fp32 without weights; differentiable in the images where
            the terms are.

        Raises:
            RewardError: (a ValueError) for shapes that do not fit, images outside of [0, 1] by more than 1e-3, and
                rewards that are not finite, naming the term and the number of samples.
        """
        if images.dim() != 4 or images.shape[1:] != targets.shape[1:] or not _divides(len(targets), len(images)):
            raise RewardError(
                f"images and targets must be (B, C, H, W) of one shape, got {tuple(images.shape)} "
                f"and {tuple(targets.shape)}; or fewer targets, each for a group of consecutive images of one size"
            )
        _check_range("images", images)
        _check_range("targets", targets)
        images, targets = images.float(), targets.detach().float()
        known: dict[int, _Once] = {}
        scores = {}
        for name, term in self.terms.items():
            encoder = self.encoder if term.model is None else term.model
            reward = term.make(known.setdefault(id(encoder), _Once(encoder)))
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.differentiable):
                scores[name] = _checked(name, reward(images, targets, asked), len(images))
        return self.weighted(scores), scores

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """What advantages are made of: the weighted sum, in the standardizer's units if there is one."""
        return self.weighted(scores) if self.standardizer is None else self.standardizer.total(scores)

    def weighted(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (N,) of unweighted terms (N,): comparable over a run, and between runs."""
        return torch.stack([term.weight * scores[name] for name, term in self.terms.items()]).sum(dim=0)

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that terms read, each once."""
        encoders = [self.encoder, *(term.model.network for term in self.terms.values() if term.model is not None)]
        return list(dict.fromkeys(encoder for encoder in encoders if isinstance(encoder, nn.Module)))

    @property
    def differentiable(self) -> bool:
        """Whether the whole total is: each term that counts."""
        return all(term.differentiable for term in self.terms.values() if term.weight)


class _Once:
    """An encoder that remembers, for one call of the composite, what it said of each tensor."""

    def __init__(self, encoder: Encoder | None) -> None:
        self.encoder = encoder
        self.known: list[tuple[Tensor, Any]] = []

    def __call__(self, images: Tensor) -> Any:
        for seen, encoding in self.known:
            if seen is images:
                return encoding
        # encoders are frozen: there is nothing else to differentiate by
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            encoding = self.encoder(images)
        self.known.append((images, encoding))
        return encoding


def _divides(part: int, whole: int) -> bool:
    return part > 0 and whole > 0 and whole % part == 0


def _checked(name: str, score: Tensor, count: int) -> Tensor:
    if score.shape != (count,):
        raise RewardError(f"the reward {name} must be ({count},), one number an image, got {tuple(score.shape)}")
    bad = int((~score.isfinite()).sum())
    if bad:
        raise RewardError(f"the reward {name} is not finite for {bad} of {count} samples")
    return score.float()


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
