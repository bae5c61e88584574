"""The embedded models: a diffusion teacher of 8x8 digits and two encoders, small enough to ship and to train on a CPU.

`python -m engine.models.digits --output-dir DIR` trains them again.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from .data import digits
from .encoders import EvaluationEncoder, RewardEncoder

__all__ = ["TEACHER_DIR", "digits", "load_evaluation_encoder", "load_reward_encoder"]

_FOLDER = Path(__file__).parent

TEACHER_DIR: Path = _FOLDER / "teacher"
"""The teacher in diffusers format: an epsilon-predicting UNet2DModel, latents (B, 1, 8, 8) in [-1, 1], class_labels
(B,) in 0..9 and 10 for "no class", with its DDIMScheduler."""


def load_reward_encoder() -> RewardEncoder:
    """The encoder of the reward: images (B, 1, 8, 8) in [0, 1] to features (B, 128) and logits (B, 10).

    In eval mode and frozen; gradients still reach the images.
    """
    return _load(RewardEncoder, "reward_encoder")


def load_evaluation_encoder() -> EvaluationEncoder:
    """The encoder of the evaluation, never of the reward: images (B, 1, 8, 8) in [0, 1] to features (B, 64) and logits.

    In eval mode and frozen.
    """
    return _load(EvaluationEncoder, "evaluation_encoder")


def _load(kind: type[nn.Module], name: str) -> nn.Module:
    from safetensors import safe_open

    with safe_open(_FOLDER / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["training"])[name]
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    encoder = kind(config["width"], config["features"])
    encoder.load_state_dict(weights)
    return encoder.eval().requires_grad_(False)
