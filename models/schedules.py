"""Noise schedules: what a network's training says about its timesteps, one class per family."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loading import LoadingError, one_line, read_json

FLOW = "FlowMatchEulerDiscreteScheduler"
DIFFUSION = "DDIMScheduler"
CONSISTENCY_STEPS = 50
"""Of the grid that latent consistency models are distilled on, where the number is not given."""
CONFIG = "scheduler/scheduler_config.json"


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


def load_scheduler(directory: Path, *, flow: bool = False, forced: Mapping[str, Any] | None = None) -> Any:
    """The deterministic scheduler of a directory: diffusers' Euler for flows, DDIM otherwise, which nothing cuts.

    Warns where the stock pipeline, with the scheduler that the directory has, would give other images.

    Args:
        directory: in diffusers format.
        flow: of a flow family; a directory whose scheduler is one of flow matching is a flow in any family.
        forced: settings that the stock pipeline forces on the scheduler.

    Raises:
        LoadingError: there is no scheduler, or none of diffusers.
    """
    import diffusers

    kind = read_json(directory, CONFIG).get("_class_name")
    stock = getattr(diffusers, str(kind), None)
    if stock is None or not hasattr(stock, "set_timesteps"):
        raise LoadingError(f"{directory}/{CONFIG} is of a {kind}, which is not a scheduler of diffusers")
    try:
        config = stock.from_pretrained(directory, subfolder="scheduler").config
    except Exception as error:  # diffusers raises many kinds for entries that it cannot read
        raise LoadingError(f"{directory}/{CONFIG} cannot be read: {one_line(error)}") from None
    changes = {"stochastic_sampling": False}
    name = FLOW
    if not (flow or kind == FLOW):
        name = DIFFUSION
        # Where a scheduler has no such entry, DDIM's default is to cut, which no affine step does.
        changes = {"clip_sample": False, "thresholding": False, **(forced or {})}
        if config.get("timestep_spacing") == "linspace":
            # DDIM steps by 1000 / steps whatever the spacing; between these timesteps lies another distance.
            changes["timestep_spacing"] = "trailing"
    _warn(directory, kind, name, config, changes)
    return getattr(diffusers, name).from_config(config, **changes)


def renoising(scheduler: Any) -> Any:
    """diffusers' scheduler of multi-step consistency sampling for what a deterministic one was loaded for: LCM, or for
    a flow stochastic Euler steps."""
    from diffusers import LCMScheduler

    if type(scheduler).__name__ == FLOW:
        return type(scheduler).from_config(scheduler.config, stochastic_sampling=True)
    return LCMScheduler.from_config(scheduler.config, original_inference_steps=CONSISTENCY_STEPS, timestep_scaling=10.0)


def consistency_timesteps(train_timesteps: int, steps: int) -> Tensor:
    """The timesteps (steps,) int64 that LCM samples at: evenly spaced ones of the 50 that it was distilled on.

    Raises:
        ValueError: for steps that are not in 1..50, or fewer than 50 training timesteps.
    """
    every = train_timesteps // CONSISTENCY_STEPS
    if not 1 <= steps <= CONSISTENCY_STEPS or every < 1:
        raise ValueError(
            f"the renoising sampler takes 1 to {CONSISTENCY_STEPS} steps of at least {CONSISTENCY_STEPS} training "
            f"timesteps; got {steps} of {train_timesteps}"
        )
    chosen = torch.arange(steps, dtype=torch.int64) * CONSISTENCY_STEPS // steps
    return (CONSISTENCY_STEPS - chosen) * every - 1


def schedule_of(scheduler: Any, arguments: Callable[[int], dict[str, Any]] | None = None) -> Schedule:
    """The schedule of a diffusers scheduler.

    Args:
        scheduler: as `load_scheduler` gives it.
        arguments: maps a number of steps to the keywords of `set_timesteps`; None: just that number.
    """
    available = scheduler.config.num_train_timesteps

    def set_steps(steps: int) -> None:
        if not 1 <= steps <= available:
            raise LoadingError(f"{steps} steps of a schedule of {available}; give between 1 and {available}")
        scheduler.set_timesteps(**(arguments(steps) if arguments else {"num_inference_steps": steps}))

    def timesteps(steps: int) -> torch.Tensor:
        set_steps(steps)
        return scheduler.timesteps.clone()

    def sigmas(steps: int) -> torch.Tensor:
        set_steps(steps)
        return scheduler.sigmas.double()

    if not hasattr(scheduler, "alphas_cumprod"):
        return FlowSchedule(sigmas)
    return DiffusionSchedule(
        alphas_cumprod=scheduler.alphas_cumprod.double(),
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
        prediction_type=scheduler.config.prediction_type,
        timesteps=timesteps,
    )


def _warn(directory: Path, kind: str, name: str, config: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    reasons = [] if kind == name else [f"it is a {kind}"]
    reasons += [f"{key}=true" for key, value in changes.items() if value is False and config.get(key)]
    if "timestep_spacing" in changes:
        reasons.append("timestep_spacing=linspace, for which trailing is taken")
    if reasons:
        warnings.warn(
            f"{directory}/scheduler: {', '.join(reasons)}; the sampler takes the steps of a {name}, which are affine "
            "and cut nothing, so its images differ from those of the stock scheduler. Exports name the one they need",
            stacklevel=3,
        )
