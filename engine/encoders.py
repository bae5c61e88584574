"""The encoders of an evaluation, from local files: FID's Inception, DINO and CLIP.

All of them look at 8-bit images, because that is what a user keeps: figures of images read from a folder are those of
the same images fresh from the sampler. CLIP and DINO prepare them as their own image processors do, by the same code as
the rewards; Inception as FID does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from engine.errors import EngineError
from engine.inception import InceptionV3, WeightsError, load_inception
from engine.rl.rewards import RewardError
from engine.rl.rewards.local_model import LocalModel, load_models
from engine.rl.rewards.settings import ClipTextSettings, DinoSettings, ModelSettings


class Encoder(Protocol):
    """Images to features.

    Attributes:
        reads_text: whether it has `embed(prompts)`, features (B, D) fp32 on the CPU to compare with those of images.
    """

    reads_text: bool

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) uint8, on any device -> features (B, D) fp32 on the CPU."""


class EncoderSettings(BaseModel):
    """Keys of an entry of evaluation.encoders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["inception", "dino", "clip"]
    path: str
    """A directory in transformers format; for inception the file weights-inception-2015-12-05-6726825d.pth."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Most images in one pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and activations; inception has fp32 only, which its figures are defined in."""


def load_encoders(settings: Mapping[str, Mapping[str, Any]], device: torch.device, *, text: bool) -> dict[str, Encoder]:
    """The encoders of evaluation.encoders, in their order.

    Args:
        settings: name -> keys of EncoderSettings.
        text: whether prompts are asked for, so that CLIP keeps its text tower.

    Raises:
        EngineError: names the key: an unknown or missing one, or a path that does not hold what its kind needs.
    """
    return {name: _load(name, entry, device, text) for name, entry in settings.items()}


def _load(name: str, entry: Mapping[str, Any], device: torch.device, text: bool) -> Encoder:
    key = f"evaluation.encoders.{name}"
    try:
        settings = EncoderSettings.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([key, *map(str, first["loc"])])
        raise EngineError(
            f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}; an encoder has "
            f"{', '.join(EncoderSettings.model_fields)}, and a kind is inception, dino or clip"
        ) from None
    if settings.kind == "inception":
        return _inception(key, settings, device)
    kind = {"dino": DinoSettings, "clip": ClipTextSettings if text else ModelSettings}[settings.kind]
    try:
        model = load_models({name: kind(**settings.model_dump(exclude={"kind"}))}, device)[name]
    except RewardError as error:
        reason = str(error).removeprefix(f"reward.terms.{name}.path={settings.path}: ")
        raise EngineError(f"{key}.path={settings.path}: {reason}") from None
    return _Model(model, "cls" if settings.kind == "dino" else "embedding")


def _inception(key: str, settings: EncoderSettings, device: torch.device) -> Encoder:
    if settings.precision != "fp32":
        raise EngineError(
            f"{key}.precision={settings.precision}: figures of Inception are defined in fp32; leave it out"
        )
    try:
        network = load_inception(Path(settings.path).expanduser())
    except WeightsError as error:
        raise EngineError(f"{key}.path={settings.path}: {error}") from None
    return _Inception(network.to(device), settings.batch_size, device)


class PooledPixels:
    """The pixels themselves, pooled to at most 8x8: what judges images where no encoder is given."""

    reads_text = False

    def __call__(self, images: Tensor) -> Tensor:
        size = [min(8, side) for side in images.shape[-2:]]
        return F.adaptive_avg_pool2d(images.float() / 255, size).flatten(1).cpu()


class _Inception:
    reads_text = False

    def __init__(self, network: InceptionV3, batch_size: int, device: torch.device) -> None:
        self.network, self.batch_size, self.device = network, batch_size, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = images.expand(-1, 3, -1, -1).split(self.batch_size)
        return torch.cat([self.network(part.to(self.device)).cpu() for part in parts])


class _Model:
    """A model of transformers: DINO's class token, or CLIP's projected embeddings."""

    def __init__(self, model: LocalModel, reads: str) -> None:
        self.model, self.reads = model, reads
        self.reads_text = "prompts" in model.reads

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = images.split(self.model.batch_size)
        return torch.cat([self.model(part.to(self.model.device) / 255)[self.reads].cpu() for part in parts])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        return self.model.embed(prompts).cpu()
