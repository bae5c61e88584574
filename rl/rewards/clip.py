"""Rewards in the embedding of a CLIP model: likeness to the teacher's image, and to the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .contract import Asked, Encoder, Reward, RewardError, cosine


def clip_reward(encoder: Encoder) -> Reward:
    """Cosine of the embeddings of the student's and of the teacher's image, in [-1, 1].

    Args:
        encoder: gives "embedding" (B, D).
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        return cosine(encoder(images)["embedding"], encoder(targets)["embedding"])

    return reward


def clip_text_reward(encoder: Encoder, *, embed: Callable[[Sequence[str]], Tensor], scale: float, name: str) -> Reward:
    """Cosine of the embeddings of the student's image and of its prompt, times a scale.

    Args:
        encoder: gives "embedding" (B, D).
        embed: prompts -> (B, D).
        scale: 1 for the raw cosine of `clip_text`; the model's exp(logit_scale), 100 for most, for the models that were
            trained on human preferences (PickScore, HPS).
        name: of the term, for errors.

    Returns:
        The reward; it ignores the targets. It raises RewardError without one "prompt" an image.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        if "prompt" not in asked:
            given = ", ".join(asked) or "nothing"
            raise RewardError(f"{name} needs the prompts that were asked for, got {given}")
        prompts = asked["prompt"]
        if len(prompts) != len(images):
            raise RewardError(f"{name} needs {len(images)} prompts, one an image, got {len(prompts)}")
        return scale * cosine(encoder(images)["embedding"], embed(prompts))

    return reward
