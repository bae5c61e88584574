"""The student's own sampler as a differentiable chain, from initial noise to the final latent.

`engine.rl.rollout` takes the same steps for policy optimisation, where no gradient passes from one to the next. Here it
may pass through all of them, or through the last few, which is what costs memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.denoiser import Condition, Denoiser
from engine.rl import GaussianPolicy
from engine.rl.rollout import timesteps_of
from engine.sampling import student_policy

from .contract import Context, Examples
from .draws import Draws


def walk(
    denoiser: Denoiser,
    policy: GaussianPolicy,
    x: Tensor,
    condition: Condition,
    *,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    gradient_steps: int | None = None,
) -> Tensor:
    """The latents (B, C, H, W) after all steps of a policy, x <- a x + b f + std z, in the dtype of x.

    Args:
        policy: T steps.
        x: (B, C, H, W) initial latents.
        condition: tensors (B, ...).
        noise: (B, S, C, H, W) standard normal z of the S stochastic steps, in their order; None where there are none.
        gradient_steps: number of last steps that gradients pass through; the earlier ones keep nothing. None: all.
    """
    steps = len(policy.timesteps)
    first = 0 if gradient_steps is None else steps - gradient_steps
    taken = 0
    for step, stochastic in enumerate(policy.stochastic.tolist()):
        a, b, std = (float(value[step]) for value in (policy.a, policy.b, policy.std))
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= first):
            prediction = denoiser.guided(x, timesteps_of(policy, step, x), condition, guidance=guidance)
            x = a * x + b * prediction
            if stochastic:
                x = x + std * noise[:, taken]
                taken += 1
    return x


class Chain:
    """The student's walks from the noise of the pool's conditions, beside the latents that the teacher reached from it.

    Args:
        context: of the objective.
        name: what addresses the random numbers: the objective's kind.
        gradient_steps: number of last steps that gradients pass through; None: all.

    Attributes:
        policy: the student's sampler.
    """

    def __init__(self, context: Context, name: str, gradient_steps: int | None) -> None:
        self.context = context
        self.policy = student_policy(context.config, context.student)
        steps = len(self.policy.timesteps)
        self.gradient_steps = steps if gradient_steps is None else min(gradient_steps, steps)
        self._draws = Draws(context, f"{name} student")

    def draw(self, number: int) -> Examples:
        """What the walks of an optimizer step start from and aim at: `index` (B,) in the pool, `initial` and `target`
        (B, C, H, W), and `noise` (B, S, C, H, W) where the sampler has S > 0 stochastic steps."""
        context, rows = self.context, self._draws.rows(number)
        values = {
            "index": rows.indices.to(context.device),
            "initial": context.pool.initial_noise(rows.indices).to(context.device),
            "target": context.collector.teacher_latents(context.pool, rows.indices),
        }
        stochastic = self.policy.stochastic.nonzero().flatten().tolist()
        if stochastic:
            values["noise"] = torch.stack([self._draws.noise(f"step {i}", number, rows) for i in stochastic], dim=1)
        return Examples(values, rows.condition)

    def final(self, examples: Examples) -> Tensor:
        """The student's final latents (B, C, H, W) fp32, with gradients; their passes are counted."""
        return walk_student(self.context, self.policy, examples, examples.values.get("noise"), self.gradient_steps)


def walk_student(
    context: Context, policy: GaussianPolicy, examples: Examples, noise: Tensor | None, gradient_steps: int
) -> Tensor:
    """`walk` of the student from the examples' `initial`; counts the passes.

    Args:
        noise: as `walk`'s.
        gradient_steps: number of last steps that gradients pass through, where they are enabled.
    """
    student, guidance = context.student, context.config.student.guidance
    evaluations = len(examples) * student.passes(guidance)
    context.account.passes["student_forward"] += evaluations * len(policy.timesteps)
    if torch.is_grad_enabled():
        context.account.passes["student_backward"] += evaluations * gradient_steps
    return walk(
        student,
        policy,
        examples["initial"],
        examples.condition,
        guidance=guidance,
        noise=noise,
        gradient_steps=gradient_steps,
    )


def per_latent(values: Tensor, x: Tensor) -> Tensor:
    """Scalars (B,) in the dtype of latents x (B, ...), shaped to multiply them."""
    return values.to(x).view(-1, *[1] * (x.dim() - 1))
