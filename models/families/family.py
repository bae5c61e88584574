"""What the pipelines of one diffusers class have of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..denoiser import Call, Condition

Config = Mapping[str, Any]
"""The content of a component's config.json."""

Encode = Callable[[Any, list[str], list[str], tuple[int, int], int], Condition]
"""encode(pipeline, prompts, negative, resolution, tokens): the stock pipeline that holds the encoders, B prompts, B
negative prompts, (H, W) in pixels, the most tokens of a prompt -> tensors (B, ...); row i depends on prompt i alone,
under `negative_` on negative prompt i alone."""

SetTimesteps = Callable[[Config, int, int], dict[str, Any]]
"""set_timesteps(scheduler, steps, tokens): a flow scheduler's config, the steps, and the tokens of an image -> what the
stock pipeline passes to the scheduler's method of that name."""


def sample_size(config: Config) -> tuple[int, int, int]:
    """(C, H, W) of the latents that a network was trained on, as most configurations say it."""
    size = config["sample_size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return config["in_channels"], height, width


@dataclass(frozen=True)
class Family:
    """What the pipelines of one diffusers class have of their own; the rest is the same for all.

    Attributes:
        name: as people say it.
        pipelines: diffusers' pipeline classes, as `model_index.json` names them.
        component: of the pipeline, that denoises: "unet" | "transformer".
        network: diffusers' class of that component.
        call: one evaluation of it.
        encode: prompts to conditions; None: conditioned on classes.
        max_tokens: the longest prompt, by the tokenizers that read it to the end (the first that a directory has).
        classes: number of classes, from the network's config; None: conditioned on text.
        guidance_kind: from the network's config; see `Denoiser`.
        latent_shape: (C, H, W) that the stock pipeline takes, from the network's config.
        patch: both sides of a latent are multiples of this, from the network's config.
        largest: the longest side of a latent, from the network's config; None: any.
        resizable: whether the network takes other sizes than its own.
        has_vae: False where the network works on pixels.
        set_timesteps: of flow families; None: a diffusion, sampled by DDIM.
        scheduler: settings that the stock pipeline forces on its scheduler.
    """

    name: str
    pipelines: tuple[str, ...]
    component: str
    network: str
    call: Call
    encode: Encode | None = None
    max_tokens: Mapping[str, int] = field(default_factory=dict)
    classes: Callable[[Config], int | None] = lambda config: None
    guidance_kind: Callable[[Config], str] = lambda config: "classifier_free"
    latent_shape: Callable[[Config], tuple[int, int, int]] = sample_size
    patch: Callable[[Config], int] = lambda config: 1
    largest: Callable[[Config], int | None] = lambda config: None
    resizable: bool = True
    has_vae: bool = True
    set_timesteps: SetTimesteps | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def patch_size(config: Config) -> int:
    """The side of a transformer's patches."""
    return config["patch_size"]


def shift_of(scheduler: Config, tokens: int) -> float:
    """mu of a flow scheduler's dynamic shift, linear in the number of image tokens, as FLUX and SD3 compute it."""
    few, many = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    low, high = scheduler["base_shift"], scheduler["max_shift"]
    return low + (high - low) * (tokens - few) / (many - few)
