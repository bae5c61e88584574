"""DPM-Solver++ as a second sampler of the teacher: what few steps are worth without any training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.models.denoiser import Condition, Denoiser
from engine.models.pipelines import Pipeline
from engine.models.schedules import FlowSchedule


def dpm_scheduler(pipeline: Pipeline, steps: int) -> Any:
    """diffusers' DPM-Solver++ (2M; Lu et al. 2022, arXiv 2211.01095) with the settings of a directory's scheduler.

    A flow's noise levels are shifted as its own scheduler shifts them.
    """
    from diffusers import DPMSolverMultistepScheduler

    config = DPMSolverMultistepScheduler.load_config(pipeline.directory, subfolder="scheduler")
    changes: dict[str, Any] = {
        **pipeline.family.scheduler,
        "algorithm_type": "dpmsolver++",
        "thresholding": False,  # as with our own samplers, nothing is cut
        "variance_type": None,  # denoisers give no variance that the scheduler should cut off
    }
    if isinstance(pipeline.denoiser.schedule, FlowSchedule):
        changes |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": False}
        changes["flow_shift"] = _shift(pipeline, steps)
    return DPMSolverMultistepScheduler.from_config(config, **changes)


def _shift(pipeline: Pipeline, steps: int) -> float:
    """The shift of a flow's noise levels; a dynamic one depends on the number of image tokens."""
    family, config, denoiser = pipeline.family, pipeline.scheduler.config, pipeline.denoiser
    if not config.use_dynamic_shifting:
        return config.shift
    _, height, width = denoiser.latent_shape
    tokens = height * width // family.patch(denoiser.network.config) ** 2
    return math.exp(family.set_timesteps(config, steps, tokens)["mu"])


@torch.no_grad()
def dpm_sample(
    denoiser: Denoiser, scheduler: Any, x: Tensor, condition: Condition, *, steps: int, guidance: float
) -> tuple[Tensor, int]:
    """Final latents and the network passes they took.

    Args:
        denoiser: the teacher.
        scheduler: of `dpm_scheduler`.
        x: (B, C, H, W) fp32 standard normal noise.
        condition: tensors (B, ...).
        steps: number of steps.
        guidance: as for `Denoiser.predict`.

    Returns:
        (B, C, H, W) fp32, and B times the passes of each step.
    """
    scheduler.set_timesteps(steps)
    passes = len(x) * len(scheduler.timesteps) * denoiser.passes(guidance)
    for timestep in scheduler.timesteps:
        pred, uncond = denoiser.predict(x, timestep.to(x.device).expand(len(x)), condition, guidance=guidance)
        pred = pred.float() if uncond is None else uncond.float().lerp(pred.float(), guidance)
        x = scheduler.step(pred, timestep, x, return_dict=False)[0]
    return x, passes
