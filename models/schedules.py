"""Noise schedules: what a network's training says about its timesteps, one class per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DiffusionSchedule:
    """Variance-preserving diffusion with discrete training timesteps (DDPM, DDIM).

    Attributes:
        alphas_cumprod: (train_timesteps,) float64, the cumulative product of 1 - beta.
        final_alpha_cumprod: the value that stands after the last step (1.0: the image without noise).
        prediction_type: "epsilon" | "v_prediction" | "sample".
        timesteps: maps a number of steps to the descending timesteps (steps,) int64.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: str
    timesteps: Callable[[int], Tensor]


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: x = (1 - sigma) image + sigma noise, and the network predicts the velocity noise - image.

    Attributes:
        sigmas: maps a number of steps to the descending noise levels (steps + 1,) float64, from 1 (or near) to 0.
    """

    sigmas: Callable[[int], Tensor]


Schedule = DiffusionSchedule | FlowSchedule
