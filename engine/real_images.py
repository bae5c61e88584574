"""Real images of the conditions that are trained on: what a discriminator holds the student's images against."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.errors import EngineError
from engine.image_store import image_batches
from engine.models.digits import digits
from engine.objectives.contract import Context
from engine.objectives.draws import Draws, Rows
from engine.preflight import DIGIT_SHAPE

METADATA = "metadata.jsonl"


class RealImages:
    """Latents of images that are real to a discriminator, each of the condition that a row asks for.

    Args:
        context: of the objective.
        source: None: the teacher's images; "digits": the embedded ones that the teacher was trained on; or a folder in
            Hugging Face's imagefolder form: its metadata.jsonl has a line {"file_name": ..., "text": prompt} for each
            image, or for a teacher of classes {"file_name": ..., "label": number}.
        key: of the configuration, that errors name.

    Raises:
        EngineError: images that do not fit the teacher, or a condition without an image.
    """

    def __init__(self, context: Context, source: str | None, key: str) -> None:
        self.context = context
        self._of: dict[str | int, list[Path | Tensor]] | None = None
        self._latents = cache(self._read)
        if source is None:
            return
        self._of = _digits(context, key) if source == "digits" else _folder(Path(source), context, key)
        asked = self._asked(torch.arange(context.pool.size))
        missing = sorted({str(of) for of in asked if of not in self._of})
        if missing:
            raise EngineError(
                f"{key}={source} has no image of {len(missing)} conditions that are trained on, as {missing[0]!r}"
            )

    def __call__(self, draws: Draws, number: int, rows: Rows) -> Tensor:
        """Latents (B, C, H, W) fp32 of rows, on their device."""
        context = self.context
        if self._of is None:
            return context.collector.teacher_latents(context.pool, rows.indices)
        places, latents = draws.uniform("real", number, rows).tolist(), []
        for place, of in zip(places, self._asked(rows.indices), strict=True):
            chosen = self._of[of][int(place * len(self._of[of]))]
            latents.append(chosen if isinstance(chosen, Tensor) else self._latents(chosen))
        return torch.stack(latents).to(context.device)

    def _asked(self, indices: Tensor) -> list[str | int]:
        asked = self.context.pool.asked(indices)
        return asked["prompt"] if "prompt" in asked else asked["class_labels"].tolist()

    def _read(self, path: Path) -> Tensor:
        """The latent (C, H, W) of a file: its shorter side brought to the images' size, the centre cut out."""
        context = self.context
        size = context.decode(torch.zeros(1, *context.teacher.latent_shape, device=context.device)).shape
        (image,) = image_batches([path], gray=size[1] == 1, batch_size=1)
        image = image.float() / 255
        scale = max(wanted / given for wanted, given in zip(size[2:], image.shape[2:], strict=True))
        scaled = [max(wanted, round(given * scale)) for wanted, given in zip(size[2:], image.shape[2:], strict=True)]
        image = F.interpolate(image, scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = ((given - wanted) // 2 for given, wanted in zip(scaled, size[2:], strict=True))
        image = image[..., top : top + size[2], left : left + size[3]]
        return context.pipeline.encode_images(image)[0].cpu()


def _digits(context: Context, key: str) -> dict[int, list[Tensor]]:
    if context.teacher.latent_shape != DIGIT_SHAPE:
        raise EngineError(f"{key}=digits: the teacher's latents are {context.teacher.latent_shape}, not digits")
    images, labels = digits("train")
    return {label: list(images[labels == label]) for label in range(10)}


def _folder(folder: Path, context: Context, key: str) -> dict[str | int, list[Path]]:
    name, kind = ("text", str) if context.teacher.classes is None else ("label", int)
    try:
        lines = (folder / METADATA).read_text().splitlines()
    except OSError:
        raise EngineError(
            f"{key}={folder}: there is no {METADATA} in it; give a folder in Hugging Face's imagefolder form, digits, "
            "or null for the teacher's images"
        ) from None
    found: dict[str | int, list[Path]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            of, path = row[name], folder / row["file_name"]
        except (ValueError, KeyError, TypeError):
            of, path = None, folder
        if not isinstance(of, kind) or not path.is_file():
            raise EngineError(
                f'{key}: line {number} of {folder / METADATA} must be {{"file_name": FILE, "{name}": ...}} with a file '
                f"that exists and {'a prompt' if kind is str else 'the number of a class'}"
            )
        found[of.strip() if kind is str else of].append(path)
    return found
