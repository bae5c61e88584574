"""The frozen encoder of a pixel discriminator: images to feature maps of several depths, differentiable in the images.

It is never one that judges the result: the digits have the reward's encoder, not the evaluation's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.models.digits import load_reward_encoder
from engine.rl.rewards import RewardError
from engine.rl.rewards.local_model import Models
from engine.rl.rewards.settings import PerceptualSettings

from .settings import PixelEncoder

Features = Callable[[Tensor], list[Tensor]]
"""Images (B, 1 or 3, H, W) in [0, 1] -> maps (B, L, D) or (B, D, H, W), the least deep first."""


def load_features(
    settings: PixelEncoder, key: str, device: torch.device, *, digits: bool, batch_size: int, models: Models
) -> Features:
    """The encoder that the settings name.

    Args:
        key: of the configuration, that errors name.
        digits: whether the images are digits, which the embedded encoder is for.
        batch_size: most images in one pass.
        models: loads the model of a directory.

    Raises:
        EngineError: no directory for other images, or one that does not hold a vision model with these layers.
    """
    if settings.path is None:
        if not digits:
            raise EngineError(
                f"{key}.path is not set; the teacher does not draw digits, so give the directory of a vision model in "
                "transformers format, such as DINOv2 or CLIP"
            )
        encoder = load_reward_encoder().to(device)

        def of_digits(images: Tensor) -> list[Tensor]:
            fine = encoder.fine(encoder.stem(2 * images - 1))
            return [fine, encoder.coarse(encoder.down(fine))]

        return of_digits
    term = PerceptualSettings(
        path=settings.path, layers=settings.layers, precision=settings.precision, batch_size=batch_size
    )
    try:
        model = models({key: term}, device)[key]
    except RewardError as error:
        raise EngineError(str(error).removeprefix("reward.terms.")) from None

    def of_model(images: Tensor) -> list[Tensor]:
        encoding = model(images)
        return [encoding[layer] for layer in settings.layers]

    return of_model


@torch.no_grad()
def channels(features: Features, image: Tensor) -> list[int]:
    """The channels of each map, found by an image (1, C, H, W)."""
    return [of.shape[1] if of.dim() == 4 else of.shape[2] for of in features(image)]
