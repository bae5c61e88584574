"""From images in [0, 1] to what a vision model was trained on: the steps of its own image processor, differentiable.

The same function prepares the student's and the teacher's images. It reads the directory's preprocessor_config.json
(transformers 5 may write it into processor_config.json instead).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import RewardError

PROCESSORS = ("CLIP", "Bit", "DINOv3ViT", "ViT", "DeiT", "Siglip")  # those whose steps are the ones below
MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers of the resampling filters


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, normalise.

    Attributes:
        size: (height, width), or the length of the shorter edge, in pixels; None: images keep their size.
        mode: filter of the resize, antialiased.
        crop: (height, width) of the centre; None: nothing is cropped.
        scale: what [0, 1] is multiplied by before it is normalised.
        mean: 3 numbers that are subtracted.
        std: 3 numbers that are divided by.
    """

    size: tuple[int, int] | int | None
    mode: str
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, directory: Path) -> Preprocessing:
        """What the image processor that is saved in a directory does.

        Raises:
            RewardError: there is none, or it does something else.
        """
        config = _read(directory)
        processor = str(config.get("image_processor_type", config.get("feature_extractor_type")))
        if re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", processor) not in PROCESSORS:
            raise RewardError(
                f"its preprocessor config is of a {processor}; the image processors of {', '.join(PROCESSORS)} are "
                "supported"
            )
        try:
            size, crop = None, None
            if config.get("do_center_crop"):
                crop = _height_and_width(config["crop_size"])
            if config.get("do_resize", True):
                # A bare number is the shorter edge where the centre is cropped, and the side of a square elsewhere.
                size = config["size"]
                if isinstance(size, dict) and set(size) == {"shortest_edge"}:
                    size = int(size["shortest_edge"])
                elif isinstance(size, dict) or crop is None:
                    size = _height_and_width(size)
            mode = MODES.get(config["resample"]) if size is not None else "bicubic"
            mean, std = (0.0,) * 3, (1.0,) * 3
            if config.get("do_normalize", True):
                mean, std = tuple(map(float, config["image_mean"])), tuple(map(float, config["image_std"]))
            scale = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
        except (KeyError, TypeError, ValueError) as error:
            raise RewardError(f"its preprocessor config cannot be read: {type(error).__name__} {error}") from None
        if mode is None:
            raise RewardError(
                f"its preprocessor config has resample={config['resample']}; 2 (bilinear) and 3 (bicubic) are supported"
            )
        smallest = (size, size) if isinstance(size, int) else size
        if crop and smallest and (crop[0] > smallest[0] or crop[1] > smallest[1]):
            raise RewardError(f"its preprocessor config crops {crop} of images of {smallest}")
        return cls(size, mode, crop, scale, mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Prepares images.

        Args:
            images: (B, 1 or 3, H, W) in [0, 1]; one channel is taken for all three.

        Returns:
            (B, 3, H', W') fp32, differentiable in the images.

        Raises:
            RewardError: another number of channels, or images that are smaller than the crop.
        """
        if images.shape[1] not in (1, 3):
            raise RewardError(f"images must have 1 or 3 channels, got {tuple(images.shape)}")
        x = images.float().expand(-1, 3, -1, -1)
        size = self._size_of(x)
        # Width, then height. Bicubic overshoots at edges, which 8-bit images cannot hold after either pass.
        for shape in ((x.shape[2], size[1]), size):
            if shape != tuple(x.shape[2:]):
                x = F.interpolate(x, shape, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            height, width = self.crop
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            if top < 0 or left < 0:
                raise RewardError(f"images of {size} pixels are smaller than the model's crop of {self.crop}")
            x = x[..., top : top + height, left : left + width]
        mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (self.mean, self.std))
        return (x * self.scale - mean) / std

    def _size_of(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        if width <= height:
            return int(self.size * height / width), self.size
        return self.size, int(self.size * width / height)


def _read(directory: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            config = json.loads((directory / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise RewardError(f"its {name} cannot be read: {error}") from None
        if name == "preprocessor_config.json" or "image_processor" in config:
            return config.get("image_processor", config)
    raise RewardError("it has no preprocessor_config.json, which says how images are prepared; copy the model's own")


def _height_and_width(size: int | dict[str, int]) -> tuple[int, int]:
    return (int(size["height"]), int(size["width"])) if isinstance(size, dict) else (int(size), int(size))
