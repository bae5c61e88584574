"""The denoiser: a network, the noise schedule that it was trained on, and how the two are read.

Teacher, student, frozen reference and averaged student are all denoisers: the same schedule around another network
(`denoiser.with_network(network)`) or another adapter of one network (`denoiser.with_adapter(name)`), so rollout and
update cannot differ in anything but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .loading import LoadingError
from .lora import activate
from .schedules import Schedule

Condition = Mapping[str, Tensor]
"""Tensors (B, ...) that the network reads beside latent and timestep: `class_labels` for class models; for text models
what the encoders give, and under `negative_` and the same name what they give for the negative prompt."""

NEGATIVE = "negative_"

Call = Callable[[nn.Module, Tensor, Tensor, Condition, float | None], Tensor]
"""call(network, x, timestep, condition, guidance) -> prediction like x: one evaluation in the network's own terms.
`guidance` is None unless it is embedded."""


@dataclass(frozen=True)
class Denoiser:
    """A network that predicts noise, velocity or image from a noised latent, with its schedule.

    Attributes:
        network: a diffusers model, or a DeepSpeed engine around one.
        schedule: the noise schedule that the network was trained on.
        latent_shape: (C, H, W) of one latent.
        call: how the network is evaluated; reads the entries of a condition that it knows.
        unconditional: maps a condition to those entries that classifier-free guidance subtracts.
        guidance_kind: "classifier_free" (two evaluations a step) | "embedded" (the network reads the weight) | "none"
            (distilled to need none).
        classes: number of classes that a condition may ask for; None: conditioned on text.
        adapter: the LoRA adapter that is active while this role predicts; None: none. Networks without adapters
            ignore it.
    """

    network: nn.Module
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    call: Call
    unconditional: Callable[[Condition], Condition]
    guidance_kind: str
    classes: int | None
    adapter: str | None = None

    def with_network(self, network: nn.Module) -> Denoiser:
        """The same denoiser around another network of the same interface."""
        return replace(self, network=network)

    def with_adapter(self, adapter: str | None) -> Denoiser:
        """The same denoiser, predicting with another adapter of its network, or with none."""
        return replace(self, adapter=adapter)

    def predict(
        self, x: Tensor, timestep: Tensor, condition: Condition, *, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """One network evaluation of a batch, or the guidance pair in one batched pass.

        Args:
            x: (B, C, H, W) latents, any floating dtype; the network sees them, and the condition, in its own.
            timestep: (B,) what the schedule's policies give: int64 training timesteps, or fp32 sigma * 1000.
            condition: tensors (B, ...).
            guidance: classifier-free guidance weight w of f_u + w (f_c - f_u); at 1 the unconditional half is left out.
                Where the guidance is embedded, what the network is told.

        Returns:
            (pred, pred_uncond), each (B, C, H, W) in the network's dtype; pred_uncond is None after a single pass.
        """
        # A quantised weight is an integer tensor, and under ZeRO-3 an empty one, but of the dtype that it computes in.
        dtype = next(value.dtype for value in self.network.parameters() if value.is_floating_point())
        condition = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
        if self.passes(guidance) == 1:
            return self._call(x.to(dtype), timestep, condition, guidance), None
        both = _guidance_pair(condition, self.unconditional(condition))
        pred = self._call(torch.cat([x, x]).to(dtype), torch.cat([timestep, timestep]), both, guidance)
        return tuple(pred.chunk(2))

    def guided(self, x: Tensor, timestep: Tensor, condition: Condition, *, guidance: float = 1.0) -> Tensor:
        """The guided prediction f_u + w (f_c - f_u), (B, C, H, W) fp32; arguments as `predict`'s."""
        prediction, unconditional = self.predict(x, timestep, condition, guidance=guidance)
        if unconditional is None:
            return prediction.float()
        return unconditional.float().lerp(prediction.float(), guidance)

    def passes(self, guidance: float) -> int:
        """Network evaluations that one latent costs at one step."""
        return 1 if guidance == 1.0 or self.guidance_kind != "classifier_free" else 2

    def _call(self, x: Tensor, timestep: Tensor, condition: Condition, guidance: float) -> Tensor:
        embedded = guidance if self.guidance_kind == "embedded" else None
        active = activate(self.network, self.adapter)
        if torch.is_grad_enabled():  # left on: gradient checkpointing runs this forward again during backward
            return self.call(self.network, x, timestep, condition, embedded)
        with active:
            return self.call(self.network, x, timestep, condition, embedded)


def check_guidance(denoiser: Denoiser, guidance: float) -> None:
    """Refuse a guidance weight that a denoiser cannot follow.

    Raises:
        LoadingError: names the weights that are allowed.
    """
    allowed = {
        "classifier_free": ("any finite number; 1 is no guidance", math.isfinite(guidance)),
        "embedded": ("a finite number >= 0, which the network is told", math.isfinite(guidance) and guidance >= 0),
        "none": ("1, as this network was distilled to sample without guidance", guidance == 1.0),
    }
    text, fits = allowed[denoiser.guidance_kind]
    if not fits:
        raise LoadingError(f"guidance={guidance} is not possible; allowed: {text}")


def null_class(classes: int) -> Callable[[Condition], Condition]:
    """The unconditional half of class models: the label after the last class."""
    return lambda condition: {"class_labels": torch.full_like(condition["class_labels"], classes)}


def negative_prompt(condition: Condition) -> Condition:
    """The unconditional half of text models: the entries of the negative prompt, under the names of the prompt's."""
    return {name.removeprefix(NEGATIVE): value for name, value in condition.items() if name.startswith(NEGATIVE)}


def _guidance_pair(condition: Condition, nothing: Condition) -> dict[str, Tensor]:
    if not nothing:
        raise ValueError(f"guidance needs the negative prompt, but the condition holds only {', '.join(condition)}")
    both = {name: value for name, value in condition.items() if not name.startswith(NEGATIVE)}
    return {name: torch.cat([value, nothing.get(name, value)]) for name, value in both.items()}
