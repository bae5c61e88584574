"""A reward that the user wrote, imported by its name."""

from __future__ import annotations

import difflib
import importlib

import torch
from torch import Tensor

from .contract import Asked, Reward, RewardError


def user_reward(function: str, *, name: str) -> Reward:
    """The reward `module:function`.

    Args:
        function: "package.module:function"; called as function(images, targets, asked) with images and targets
            (B, C, H, W) fp32 in [0, 1], one target an image, and `asked` as rewards get it; returns a tensor (B,).
        name: of the term, for errors.

    Raises:
        RewardError: nothing can be imported by the name. Errors inside the function pass as they are.
    """
    module_name, _, attribute = function.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise RewardError(f"reward.terms.{name}: {function!r} names no function; give module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward.terms.{name}: there is no module {error.name!r} for {function}; "
            "add its folder to the environment's PYTHONPATH"
        ) from error
    called = getattr(module, attribute, None)
    if not callable(called):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"reward.terms.{name}: {module_name} has no function {attribute!r}{hint}")

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        score = called(images, targets.repeat_interleave(len(images) // len(targets), 0), asked)
        if not isinstance(score, torch.Tensor):
            raise RewardError(f"{function} must return a tensor ({len(images)},), got {type(score).__name__}")
        return score.to(images.device)

    return reward
