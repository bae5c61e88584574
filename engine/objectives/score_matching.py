"""Distribution matching by two scores: the teacher's against that of a critic, which knows the student's images.

For student images x0, noised to x = alpha x0 + sigma noise with distribution q against the teacher's p, the gradient of
KL(q || p) with respect to an image is alpha (score_q(x) - score_p(x)) (Diff-Instruct, Luo et al. 2023, arXiv
2305.18455). With scores written through the images mu that the networks predict, score = (alpha mu - x) / sigma^2, it
is alpha^2 / sigma^2 (mu_fake - mu_real).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.models.denoiser import Condition
from engine.models.process import diffuse, levels, timestep_at, to_image

from .contract import STUDENT, Context, Examples
from .critic import CRITIC, Critic
from .draws import Draws, Rows
from .settings import Matching
from .simulation import StudentSampler

Normaliser = Literal["none", "sigma2", "dmd"]


def matching_gradient(
    image: Tensor, real: Tensor, fake: Tensor, alpha: Tensor, sigma: Tensor, *, normaliser: Normaliser
) -> Tensor:
    """The direction in which student images should not go, (B, ...) in the inputs' dtype.

    Args:
        image: (B, ...) of the student.
        real, fake: (B, ...) images that teacher and critic predict from the noised ones.
        alpha, sigma: (B,) of the noise levels.
        normaliser: "none": the gradient of the KL; "sigma2": of the KL weighted by sigma^2; "dmd": fake - real over the
            mean of |image - real|, 0 where that is 0 (DMD2, Yin et al. 2024, arXiv 2405.14867).
    """
    alpha, sigma = (value.to(image).view(-1, *[1] * (image.dim() - 1)) for value in (alpha, sigma))
    if normaliser == "none":
        return (alpha / sigma).square() * (fake - real)
    if normaliser == "sigma2":
        return alpha.square() * (fake - real)
    scale = (image - real).abs().flatten(1).mean(1).view_as(alpha)
    return ((fake - real) / scale).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(image: Tensor, gradient: Tensor) -> Tensor:
    """1/2 mean ||image - stopgrad(image - gradient)||^2, whose gradient in the image is gradient / numel."""
    image = image.to(gradient)  # in its precision, so that the difference is the gradient and not its rounding
    return 0.5 * (image - (image - gradient).detach()).square().mean()


def weigh_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, ...) as it is, with its gradient multiplied by weights (B,)."""
    weight = weight.to(x).view(-1, *[1] * (x.dim() - 1))
    return weight * x + ((1 - weight) * x).detach()


class ScoreMatching:
    """The matching of one objective: what student and critic are trained on, and the loss of the student's images.

    Args:
        context: of the objective, with the network "critic".
        kind: of the objective.
        normaliser: see `matching_gradient`.
        settings: of the objective.
        steps: (K,) ascending, of the student's steps that are trained; None: those in objective.bands.
    """

    def __init__(
        self,
        context: Context,
        kind: str,
        normaliser: Normaliser,
        settings: Matching,
        steps: Tensor | None = None,
    ) -> None:
        low, high = settings.levels
        if low >= high:
            raise EngineError(f"objective.{kind}.levels=[{low}, {high}] is empty; the first must be the smaller")
        self.context = context
        self.normaliser = normaliser
        self.settings = settings
        self.sampler = StudentSampler(context)
        if steps is None:
            steps = self.sampler.steps_between(*context.band, f"objective.bands.{kind}")
        self.steps = steps
        self.critic = Critic(context)
        self.draws = {role: Draws(context, f"{kind} {role}") for role in (STUDENT, CRITIC)}

    def rows(self, number: int) -> Rows:
        """Of a step of the student: one alone while the critic warms up, as nothing is learned from it."""
        rows = self.draws[STUDENT].rows(number)
        if not self._warming_up(number):
            return rows
        return Rows(rows.slots[:1], rows.indices[:1], {name: value[:1] for name, value in rows.condition.items()})

    def examples(self, number: int) -> Examples:
        """States of the student's sampler, one at a trained step for each row, where their image is noised to, and the
        weight of each in the loss."""
        draws, rows = self.draws[STUDENT], self.rows(number)
        x, step = self._states(draws, number, rows)
        noise = self._noise(draws, number, rows, *self.settings.levels)
        weight = torch.full_like(x[:, 0, 0, 0], float(not self._warming_up(number)))
        return Examples({"x": x, "step": step, "weight": weight, **noise}, rows.condition)

    def critic_examples(self, number: int) -> Examples:
        """Student images of trained steps, to be noised to all levels alike."""
        draws = self.draws[CRITIC]
        rows = draws.rows(number)
        x, step = self._states(draws, number, rows)
        image = self.sampler.image(x, step, rows.condition)
        return Examples({"image": image, **self._noise(draws, number, rows, 0.0, 1.0)}, rows.condition)

    def image(self, examples: Examples) -> Tensor:
        """The student's images (B, C, H, W) at the examples' states, whose gradients are weighed by balance_steps."""
        return self.student_image(examples["x"], examples["step"], examples.condition)

    def student_image(self, x: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """The same at latents (B, C, H, W) that steps (B,) read."""
        image = self.sampler.image(x, step, condition)
        if not self.settings.balance_steps:
            return image
        return weigh_gradient(image, 1 / self.sampler.gain[step].clamp(min=1))

    def noised(self, image: Tensor, examples: Examples) -> Tensor:
        """Images with the examples' noise at their timesteps."""
        return diffuse(self.context.teacher.schedule, image, examples["noise"], examples["timestep"])

    @torch.no_grad()
    def gradient(self, image: Tensor, fake: Tensor, examples: Examples) -> Tensor:
        """`matching_gradient` (B, C, H, W) float64 of student images.

        Args:
            image: (B, C, H, W).
            fake: (B, C, H, W) the critic's prediction, in its own terms, at `noised(image, examples)`.
        """
        context, timestep = self.context, examples["timestep"]
        schedule, guidance = context.teacher.schedule, context.config.teacher.guidance
        x = self.noised(image, examples)
        real = context.teacher.guided(x, timestep, examples.condition, guidance=guidance)
        context.account.passes["teacher"] += len(x) * context.teacher.passes(guidance)
        # In float64: where alpha is small, the images are small differences of large numbers.
        real, fake = (to_image(schedule, x.double(), prediction.double(), timestep) for prediction in (real, fake))
        return matching_gradient(image.double(), real, fake, *levels(schedule, timestep), normaliser=self.normaliser)

    def _warming_up(self, number: int) -> bool:
        return number < self.settings.critic.warmup

    def _states(self, draws: Draws, number: int, rows: Rows) -> tuple[Tensor, Tensor]:
        step = self.steps[draws.steps("step", number, rows, len(self.steps))]
        initial = draws.noise("initial", number, rows)
        return self.sampler.walk(draws, number, rows, initial, torch.zeros_like(step), step), step

    def _noise(self, draws: Draws, number: int, rows: Rows, low: float, high: float) -> dict[str, Tensor]:
        level = low + (high - low) * draws.uniform("level", number, rows)
        return {
            "noise": draws.noise("noise", number, rows),
            "timestep": timestep_at(self.context.teacher.schedule, level),
        }
