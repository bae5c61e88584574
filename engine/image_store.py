"""Images of an evaluation on disk: written once under a key of all that they depend on, and never taken for others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.errors import EngineError

MANIFEST = "manifest.json"
_BROKEN = (OSError, SyntaxError, ValueError)  # what Pillow raises for files that are missing, cut or of no known format


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1], any floating dtype, as the 8-bit values 0..255 that a PNG holds: rounded to the nearest."""
    return (images.float() * 255).round().to(torch.uint8)


class ImageStore:
    """One sub-folder of PNG files, named by a hash of what the images depend on.

    An image is there whole or not at all, so a folder that was left incomplete is completed: each image is read and
    looked at, and one that is missing or damaged is None to its reader, who draws it.

    Args:
        folder: parent of the sub-folders of all settings; created when needed. Ranks and runs may share it.
        settings: all that the images depend on, as JSON; written to `manifest.json` beside them.

    Raises:
        EngineError: the sub-folder's manifest is of other settings, or none at all.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, indent=2) + "\n"
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST
        drawn = any(self.folder.glob("*.png"))  # looked at first: another rank writes the manifest, then images
        if not manifest.exists():
            if drawn:
                raise EngineError(
                    f"{self.folder} has images and no {MANIFEST}, so nothing says what drew them; remove the folder"
                )
            unfinished = _unfinished(manifest)
            unfinished.write_text(text)
            os.replace(unfinished, manifest)
        if manifest.read_text() != text:
            raise EngineError(f"{manifest} is not of the settings that its folder is named after; remove the folder")

    def read(self, index: int) -> Tensor | None:
        """Image (C, H, W) uint8 of an index; None where it is missing or damaged."""
        try:
            with Image.open(self._path(index)) as image:
                pixels = np.array(image)
        except _BROKEN:
            return None
        return _channels_first(pixels)

    def write(self, index: int, image: Tensor) -> None:
        """Write the image of an index: (C, H, W) uint8, C = 1 (gray) or 3 (RGB)."""
        path = self._path(index)
        pixels = image.permute(1, 2, 0).cpu().numpy()
        unfinished = _unfinished(path)
        # level 1: a third of the time of the default, files 5 to 10 % larger
        Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(
            unfinished, format="png", compress_level=1
        )
        os.replace(unfinished, path)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"


def image_files(folder: Path) -> list[Path]:
    """The PNG and JPEG files below a folder, in the order of their names.

    Raises:
        EngineError: no such folder.
    """
    if not folder.is_dir():
        raise EngineError(f"{folder} is not a folder; one of PNG or JPEG images is needed")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def image_batches(files: Sequence[Path], *, gray: bool, batch_size: int) -> Iterator[Tensor]:
    """Image files as (B, C, H, W) uint8, C = 1 (gray) or 3 (RGB), consecutive ones of one size together.

    Raises:
        EngineError: names a file that cannot be read.
    """
    batch: list[Tensor] = []
    for path in files:
        image = _read(path, gray)
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)


def _read(path: Path, gray: bool) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if gray else "RGB"))
    except _BROKEN as error:
        raise EngineError(f"{path} is not an image: {' '.join(str(error).split())}; remove or replace it") from None
    return _channels_first(pixels)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).contiguous()


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")
