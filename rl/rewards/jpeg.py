"""How well an image compresses: DDPO's reward (arXiv 2305.13301), a black box without a gradient."""

from __future__ import annotations

from torch import Tensor

from .contract import Asked, Reward
from .pictures import encoded, pictures


def jpeg_reward(*, quality: int) -> Reward:
    """Negative size in kB (1000 bytes) of the image as a JPEG file; a negative weight asks for incompressible images.

    Args:
        quality: Pillow's, 1 to 100.

    Returns:
        The reward; it ignores the targets.
    """

    def reward(images: Tensor, targets: Tensor, asked: Asked) -> Tensor:
        sizes = [len(encoded(picture, format="JPEG", quality=quality)) for picture in pictures(images)]
        return images.new_tensor([-size / 1000 for size in sizes])

    return reward
