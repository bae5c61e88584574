"""From a denoiser and a configuration to a sampler policy, and from a pool of conditions to images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.conditions import ConditionPool, noise, seed_of
from engine.config import Config
from engine.errors import EngineError
from engine.models.denoiser import Denoiser
from engine.models.schedules import DiffusionSchedule, Schedule, consistency_timesteps
from engine.rl import GaussianPolicy, cps_policy, dance_sde_policy, ddim_policy, flow_sde_policy, renoise_policy
from engine.rl.rollout import rollout

DIFFUSION_KINDS = ("ddim", "renoise")
FLOW_KINDS = ("flow_sde", "dance_sde", "cps", "renoise")


def make_policy(
    denoiser: Denoiser, kind: str, steps: int, eta: float, *, stochastic_steps: Sequence[int] | None = None
) -> GaussianPolicy:
    """The sampler policy of a denoiser.

    Args:
        kind: a policy that fits the denoiser's schedule: "ddim" for diffusion, "flow_sde" | "dance_sde" | "cps" for
            flow matching, "renoise" for both.
        steps: number of steps.
        eta: the sampler's noise; 0 makes every step deterministic.
        stochastic_steps: indices of the steps that keep their noise; None: all.

    Raises:
        EngineError: for a kind that does not fit, naming those that do, and for steps or noise that it cannot have.
    """
    fitting = kinds_for(denoiser)
    if kind not in fitting:
        raise EngineError(
            f"{kind} does not fit a teacher with a {type(denoiser.schedule).__name__}; "
            f"fitting kinds: {', '.join(fitting)}"
        )
    try:
        return _policy(denoiser.schedule, kind, steps, eta, stochastic_steps)
    except ValueError as error:
        raise EngineError(str(error)) from None


def kinds_for(denoiser: Denoiser) -> tuple[str, ...]:
    """The policy kinds that fit a denoiser's schedule."""
    return DIFFUSION_KINDS if isinstance(denoiser.schedule, DiffusionSchedule) else FLOW_KINDS


def _policy(
    schedule: Schedule, kind: str, steps: int, eta: float, stochastic_steps: Sequence[int] | None
) -> GaussianPolicy:
    if kind == "ddim":
        return ddim_policy(
            schedule.alphas_cumprod,
            schedule.timesteps(steps),
            eta=eta,
            prediction_type=schedule.prediction_type,
            final_alpha_cumprod=schedule.final_alpha_cumprod,
            stochastic_steps=stochastic_steps,
        )
    if isinstance(schedule, DiffusionSchedule):
        return renoise_policy(
            schedule.alphas_cumprod,
            consistency_timesteps(len(schedule.alphas_cumprod), steps),
            eta=eta,
            prediction_type=schedule.prediction_type,
            stochastic_steps=stochastic_steps,
        )
    sigmas = schedule.sigmas(steps)
    if kind == "flow_sde":
        return flow_sde_policy(sigmas, noise_level=eta, stochastic_steps=stochastic_steps)
    if kind == "dance_sde":
        return dance_sde_policy(sigmas, eta=eta, stochastic_steps=stochastic_steps)
    if kind == "renoise":
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must be in [0, 1], as the share of the next level's noise that is fresh")
        eta = math.asin(eta) * 2 / math.pi
    return cps_policy(sigmas, noise_level=eta, stochastic_steps=stochastic_steps)


def deterministic_policy(denoiser: Denoiser, steps: int) -> GaussianPolicy:
    """The eta = 0 sampler: what teachers draw with, and students too unless student.sampler says otherwise."""
    return make_policy(denoiser, kinds_for(denoiser)[0], steps, 0.0)


def student_policy(config: Config, denoiser: Denoiser) -> GaussianPolicy:
    """The student's own sampler at student.steps, as student.sampler names it: what it is judged by and exported with.

    Raises:
        EngineError: for steps that it cannot have.
    """
    if config.student.sampler == "renoise":
        return make_policy(denoiser, "renoise", config.student.steps, 1.0)
    return deterministic_policy(denoiser, config.student.steps)


def sample(
    denoiser: Denoiser,
    policy: GaussianPolicy,
    pool: ConditionPool,
    indices: Tensor,
    *,
    guidance: float,
    device: torch.device,
    batch_size: int | None = None,
) -> tuple[Tensor, int]:
    """Final latents (N, C, H, W) fp32 of pool indices (N,), one sample each, and the network passes they took.

    Step noise is addressed by condition and step, so the images do not depend on batches or ranks.
    """
    condition = {name: value.to(device) for name, value in pool.condition(indices).items()}

    def step_noise(step: int) -> Tensor:
        return noise([seed_of("step", pool.split, pool.seed, int(i), step) for i in indices], pool.latent_shape)

    drawn = rollout(
        denoiser,
        policy,
        pool.initial_noise(indices).to(device),
        condition,
        guidance=guidance,
        step_noise=step_noise,
        batch_size=batch_size,
    )
    return drawn.final, drawn.passes
