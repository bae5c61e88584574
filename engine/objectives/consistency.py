"""Consistency distillation in its multi-step latent form (LCM, Luo et al. 2023, arXiv 2310.04378).

The image that the student predicts is to be the same at neighbouring points of the teacher's trajectory. With
f(x, t) = c_skip(t) x + c_out(t) image(x, t), which is x itself at t = 0,

    x_t = alpha image + sigma noise      s = the grid's next timestep      x_s = one guided step of the teacher
    loss = distance( f(x_t, t),  f_averaged(x_s, s) )

The images are the teacher's own, so no data are needed. The scalings are LCM's, for diffusions and for flows alike,
whose network reads sigma * 1000: within the first thousandth of the noise levels they turn from latent to network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from engine.averaging import AveragedWeights
from engine.config import Config
from engine.errors import EngineError
from engine.models import process
from engine.models.schedules import Schedule
from engine.rl.policies import consistency_scalings
from engine.rl.rollout import coefficients, timesteps_of
from engine.sampling import deterministic_policy, student_policy

from .chain import per_latent
from .contract import Context, Examples, Loss, Objective, Role
from .draws import Draws
from .progressive import teacher_path
from .regression import pseudo_huber

TARGET = "consistency_target"


def consistent_image(schedule: Schedule, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
    """f(x, t) (B, C, H, W): the image that a prediction means, and x itself at timestep 0."""
    skip, out = (per_latent(value, x) for value in consistency_scalings(timestep))
    return skip * x + out * process.to_image(schedule, x, prediction, timestep)


class Consistency(Objective):
    """The distance of predicted images at neighbouring timesteps of the grid.

    The grid is that of the teacher's deterministic sampler at `grid` steps, with the student's own timesteps in it,
    from the highest of these down; what lies above is never met.

    Raises:
        EngineError: no timestep is left to train on.
    """

    kind: ClassVar[str] = "consistency"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config = context.config
        self._settings = config.objective.consistency
        self._draws = Draws(context, f"{self.kind} student")
        schedule, own = context.teacher.schedule, student_policy(config, context.student).timesteps
        grid = deterministic_policy(context.teacher, self._settings.grid).timesteps
        self._solver = teacher_path(schedule, grid, own).policy
        timesteps, (low, high) = self._solver.timesteps, context.band
        level = process.level_of(schedule, timesteps)
        trained = (timesteps <= own[0]) & (timesteps > 0) & (level >= low) & (level <= high)
        self._trained = trained.nonzero().flatten().to(context.device)
        if not len(self._trained):
            raise EngineError(
                f"objective.bands.consistency=[{low:g}, {high:g}] holds no timestep of the grid of "
                f"objective.consistency.grid={self._settings.grid} up to the student's first, {own[0]:g}"
            )
        self._next = torch.cat([timesteps[1:], timesteps.new_zeros(1)]).to(context.device)
        self._target = context.student
        if self._settings.decay:
            self._target = context.student.with_network(context.networks[TARGET])

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        """The averaged student, where it is averaged."""
        if not config.objective.consistency.decay:
            return {}
        return {TARGET: Role(lambda roles: copy.deepcopy(roles.student.network), lr=None)}

    def start(self) -> None:
        """The average begins with the student as it is."""
        if self._settings.decay:
            self._averaged = AveragedWeights(self.context.student.network, self._settings.decay)
            self._install()

    def draw(self, role: str, number: int) -> Examples:
        """States `x` at places `place` (B,) of the grid: the teacher's images with noise."""
        context, rows = self.context, self._draws.rows(number)
        place = self._trained[self._draws.steps("place", number, rows, len(self._trained))]
        image = context.collector.teacher_latents(context.pool, rows.indices)
        noise = self._draws.noise("noise", number, rows)
        x = process.diffuse(context.teacher.schedule, image, noise, timesteps_of(self._solver, place, image))
        return Examples({"x": x, "place": place}, rows.condition)

    def loss(self, role: str, examples: Examples) -> Loss:
        """The distance from the averaged student's image at the next timestep, where the teacher leads."""
        context, settings = self.context, self._settings
        x, place, condition = examples["x"], examples["place"], examples.condition
        schedule, guidance = context.student.schedule, context.config.student.guidance
        timestep = timesteps_of(self._solver, place, x)
        with torch.no_grad():
            taught = context.teacher.guided(x, timestep, condition, guidance=context.config.teacher.guidance)
            a, b, _ = (per_latent(value, x) for value in coefficients(self._solver, place))
            x_next, next_timestep = a * x + b * taught, self._next[place].to(timestep.dtype)
            prediction = self._target.guided(x_next, next_timestep, condition, guidance=guidance)
            target = consistent_image(schedule, x_next, prediction, next_timestep)
        prediction = context.student.guided(x, timestep, condition, guidance=guidance)
        difference = consistent_image(schedule, x, prediction, timestep) - target
        self._count(len(examples))
        if settings.loss == "mse":
            return Loss(difference.square().mean())
        return Loss(pseudo_huber(difference, settings.huber_c))

    def stepped(self, role: str, number: int) -> None:
        """The average follows the student."""
        if self._settings.decay:
            self._averaged.follow()
            self._install()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._averaged.values) if self._settings.decay else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._averaged.load(dict(state))
        self._install()

    @torch.no_grad()
    def _install(self) -> None:
        """Round the average, which is kept in fp32, to the network that computes with it."""
        own = dict(self.context.networks[TARGET].named_parameters())
        for name, value in self._averaged.values.items():
            own[name].copy_(value)

    def _count(self, examples: int) -> None:
        context, passes = self.context, self.context.account.passes
        evaluations = examples * context.student.passes(context.config.student.guidance)
        passes["teacher"] += examples * context.teacher.passes(context.config.teacher.guidance)
        for way in (TARGET if self._settings.decay else "student_forward", "student_forward", "student_backward"):
            passes[way] += evaluations
