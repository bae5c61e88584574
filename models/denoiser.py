"""The denoiser: a network, the noise schedule that it was trained on, and how the two are read.

Teacher, student, frozen reference and averaged student are all denoisers: the same schedule around another network
(`denoiser.with_network(network)`), so rollout and update cannot differ in anything but the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .schedules import Schedule

Condition = Mapping[str, Tensor]
"""Keyword tensors (B, ...) that the network takes beside latent and timestep; `class_labels` for class models."""


@dataclass(frozen=True)
class Denoiser:
    """A network that predicts noise, velocity or image from a noised latent, with its schedule.

    Attributes:
        network: called as `network(x, t, **condition)`; returns the prediction (B, C, H, W), as a tensor or as a
            diffusers output with `.sample`.
        schedule: the noise schedule that the network was trained on.
        latent_shape: (C, H, W) of one latent.
        classes: number of classes that a condition may ask for.
        unconditional: maps a condition to the one that classifier-free guidance subtracts.
    """

    network: nn.Module
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    classes: int
    unconditional: Callable[[Condition], Condition]

    def with_network(self, network: nn.Module) -> Denoiser:
        """The same denoiser around another network of the same interface."""
        return replace(self, network=network)

    def predict(
        self, x: Tensor, timestep: Tensor, condition: Condition, *, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """One network evaluation of a batch, or the guidance pair in one batched pass.

        Args:
            x: (B, C, H, W) latents, any floating dtype; the network sees them in its own.
            timestep: (B,) what the schedule's policies give: int64 training timesteps, or fp32 sigma * 1000.
            condition: tensors (B, ...).
            guidance: classifier-free guidance weight w of f_u + w (f_c - f_u); at 1 the unconditional half is left out.

        Returns:
            (pred, pred_uncond), each (B, C, H, W) in the network's dtype; pred_uncond is None at guidance 1.
        """
        x = x.to(next(self.network.parameters()).dtype)
        if guidance == 1.0:
            return _sample(self.network(x, timestep, **condition)), None
        nothing = self.unconditional(condition)
        both = {name: torch.cat([value, nothing[name]]) for name, value in condition.items()}
        pred = _sample(self.network(torch.cat([x, x]), torch.cat([timestep, timestep]), **both))
        return tuple(pred.chunk(2))

    def passes(self, guidance: float) -> int:
        """Network evaluations that one latent costs at one step."""
        return 1 if guidance == 1.0 else 2


def _sample(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample
