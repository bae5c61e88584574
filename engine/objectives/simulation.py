"""Backward simulation: a few-step student is trained on the states that its own sampler meets (DMD2, arXiv 2405.14867,
section 4.5), so nothing differs between training and drawing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.models.denoiser import Condition, Denoiser
from engine.models.process import level_of, to_image
from engine.rl import GaussianPolicy
from engine.rl.rollout import timesteps_of
from engine.sampling import student_policy

from .contract import Context
from .draws import Draws, Rows


@torch.no_grad()
def simulate(
    denoiser: Denoiser,
    policy: GaussianPolicy,
    x: Tensor,
    condition: Condition,
    start: Tensor,
    stop: Tensor,
    *,
    step_noise: Callable[[int], Tensor],
    guidance: float = 1.0,
    batch_size: int | None = None,
) -> tuple[Tensor, int]:
    """Walk each row through its own steps of a policy.

    Args:
        policy: T steps.
        x: (B, C, H, W) the latent that step `start` of each row reads; pure noise for step 0.
        condition: tensors (B, ...).
        start, stop: (B,) int64 in 0..T: the first step of a row, and the one that it stops before; T is the end.
        step_noise: maps a step index to standard normal noise (B, C, H, W); asked for stochastic steps only.
        batch_size: most latents in one forward pass; None: all.

    Returns:
        The latents (B, C, H, W) fp32, and the network evaluations of one latent that they took.
    """
    x, passes = x.float().clone(), 0
    calls = -(-len(x) // (batch_size or len(x)))
    for i in range(len(policy.timesteps)):
        a, b, std = (float(value[i]) for value in (policy.a, policy.b, policy.std))
        noise = step_noise(i).to(x) if std else None
        for part in ((start <= i) & (i < stop)).nonzero().flatten().tensor_split(calls):
            # A rank without a row to walk makes the call all the same, with one that stays as it is: all ranks must
            # make as many calls of a network that ZeRO-3 spreads over them.
            rows = part if len(part) else torch.zeros(1, dtype=torch.int64, device=x.device)
            own = {name: value[rows] for name, value in condition.items()}
            prediction = denoiser.guided(x[rows], timesteps_of(policy, i, x[rows]), own, guidance=guidance)
            passes += len(rows) * denoiser.passes(guidance)
            if len(part):
                x[part] = a * x[part] + b * prediction + (0.0 if noise is None else std * noise[part])
    return x, passes


class StudentSampler:
    """The student's sampler, walked without gradients to a step and taken with them there.

    Args:
        context: of the objective.

    Attributes:
        policy: T steps.
        levels: (T,) float64 in [0, 1], the noise level of the latent that each step reads.
        gain: (T,) fp32 on this rank's device: what a unit of each step's prediction adds to its image, without sign.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.policy = student_policy(context.config, context.student)
        self.levels = level_of(context.student.schedule, self.policy.timesteps)
        unit = torch.ones(len(self.levels), 1)
        change = to_image(context.student.schedule, 0 * unit, unit, self.policy.timesteps)
        self.gain = change.abs().flatten().to(context.device)

    def steps_between(self, low: float, high: float, key: str) -> Tensor:
        """Steps (K,) int64 on this rank's device that read noise levels in [low, high].

        Args:
            key: of the configuration, that an error names.

        Raises:
            EngineError: there are none.
        """
        steps = ((self.levels >= low) & (self.levels <= high)).nonzero().flatten()
        if not len(steps):
            levels = ", ".join(f"{level:.3g}" for level in self.levels.tolist())
            raise EngineError(
                f"{key}: none of the student's steps reads a noise level in [{low:g}, {high:g}]; "
                f"with student.steps={len(self.levels)} their levels are {levels}"
            )
        return steps.to(self.context.device)

    def walk(self, draws: Draws, number: int, rows: Rows, x: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """The latents (B, C, H, W) fp32 that steps `stop` (B,) read; after T steps the final ones.

        Args:
            x: (B, C, H, W) what steps `start` (B,) read.
        """
        x, passes = simulate(
            self.context.student,
            self.policy,
            x,
            rows.condition,
            start,
            stop,
            step_noise=lambda step: draws.noise(f"step {step}", number, rows),
            guidance=self.context.config.student.guidance,
            batch_size=self.context.config.rollout.batch_size,
        )
        self.context.account.passes["student_forward"] += passes
        return x

    def image(self, x: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The image (B, C, H, W) fp32 that the student predicts at steps (B,), with gradients where they are enabled.

        Rows are taken in parts of rollout.batch_size where there are no gradients; a loss has small ones already.
        """
        context, guidance = self.context, self.context.config.student.guidance
        passes = len(x) * context.student.passes(guidance)
        context.account.passes["student_forward"] += passes
        if torch.is_grad_enabled():
            context.account.passes["student_backward"] += passes
        size = len(x) if torch.is_grad_enabled() else context.config.rollout.batch_size or len(x)
        images = []
        for rows in torch.arange(len(x), device=x.device).split(size):
            timestep = timesteps_of(self.policy, step[rows], x[rows])
            own = {name: value[rows] for name, value in condition.items()}
            prediction = context.student.guided(x[rows], timestep, own, guidance=guidance)
            images.append(to_image(context.student.schedule, x[rows], prediction, timestep))
        return torch.cat(images)
