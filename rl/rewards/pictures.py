"""8-bit pictures of images, for what is measured on files."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

from .contract import RewardError


def pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images (B, 1 or 3, H, W) in [0, 1], rounded to 8 bits; one channel is taken for all three."""
    if images.shape[1] not in (1, 3):
        raise RewardError(f"images must have 1 or 3 channels, got {tuple(images.shape)}")
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise RewardError(f"{bad} of {len(images)} images hold values that are not finite")
    pixels = (images.detach().float() * 255).round().clamp(0, 255).byte()
    return [Image.fromarray(array) for array in pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()]


def encoded(picture: Image.Image, **options: object) -> bytes:
    """The bytes of a picture's file; the options are those of Pillow's save."""
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()
