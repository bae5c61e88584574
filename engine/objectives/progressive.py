"""Progressive distillation: one step of the student does what several steps of its teacher do, in stages.

Salimans and Ho 2022 (arXiv 2202.00512), for any numbers of steps K -> N instead of halvings: the teacher walks from
one of the student's timesteps to the next in as many of its steps as lie between, and the student's deterministic step

    z'' = a z + b f

is to land where the teacher did, so its target prediction is (z'' - a z) / b. For diffusions this is the paper's
x = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha) in the student's own prediction type, and for flows
the mean velocity between the two states.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine import ranks, zero
from engine.config import Config
from engine.errors import EngineError
from engine.models import process
from engine.models.denoiser import Condition
from engine.models.schedules import DiffusionSchedule, Schedule
from engine.rl import GaussianPolicy, ddim_policy, flow_sde_policy
from engine.rl.rollout import timesteps_of
from engine.sampling import deterministic_policy

from .chain import per_latent, walk
from .contract import Context, Examples, Loss, Objective, Role
from .draws import Draws

STAGE_TEACHER = "stage_teacher"
STEEPEST = 20.0
"""Most that an error of the prediction counts as one of the image: at alpha = 0.05 for noise prediction, which says
nothing of the image where alpha is 0."""


@dataclass(frozen=True)
class Path:
    """The teacher's way past the student's timesteps.

    Attributes:
        policy: the teacher's deterministic steps.
        bounds: (N + 1,) which of them starts at each of the student's N timesteps, and their number at the end.
    """

    policy: GaussianPolicy
    bounds: tuple[int, ...]


def teacher_path(schedule: Schedule, teacher: Tensor, student: Tensor) -> Path:
    """The teacher's timesteps, of which those nearest to the student's are moved there, so that it has a state at each
    and takes as many steps as before. Where the grids are nested nothing moves.

    Args:
        teacher: (K,) descending.
        student: (N,) descending, N <= K.
    """
    teacher, student = teacher.double(), student.double()
    kept = torch.ones(len(teacher), dtype=torch.bool)
    kept[(teacher[None] - student[:, None]).abs().argmin(1)] = False
    nodes = torch.cat([teacher[kept], student]).sort(descending=True).values
    bounds = [int((nodes == timestep).nonzero()) for timestep in student]
    return Path(_through(schedule, nodes), (*bounds, len(nodes)))


def target_prediction(policy: GaussianPolicy, step: Tensor, x: Tensor, landing: Tensor) -> Tensor:
    """The prediction (B, C, H, W) with which deterministic steps (B,) of a policy go from x to `landing`."""
    a, b = (per_latent(value.to(step.device)[step], x) for value in (policy.a, policy.b))
    return (landing - a * x) / b


def prediction_weight(schedule: Schedule, timestep: Tensor, weighting: str) -> Tensor:
    """(B,) float64: what turns a squared error of the prediction into that of the image that it means, weighted by
    SNR + 1 ("snr_plus_one"; for velocities that is 1) or max(SNR, 1) ("truncated_snr")."""
    alpha, sigma = process.levels(schedule, timestep)
    snr = (alpha / sigma).square()
    one = torch.ones(len(timestep), 1, dtype=torch.float64, device=timestep.device)
    slope = process.to_image(schedule, torch.zeros_like(one), one, timestep).flatten().abs()
    return (snr + 1 if weighting == "snr_plus_one" else snr.clamp(min=1)) * slope.clamp(max=STEEPEST).square()


def stages_of(config: Config) -> tuple[int, ...]:
    """Steps of the student after each stage.

    Raises:
        EngineError: stages that do not lead from the teacher's steps to the student's.
    """
    given, last = config.objective.progressive.stages, config.student.steps
    if given is None:
        return (last,)
    falls = all(more > fewer for more, fewer in itertools.pairwise(given))
    fits = falls and bool(given) and given[-1] == last and given[0] <= config.teacher.steps
    if not fits or len(given) > config.iterations:
        raise EngineError(
            f"objective.progressive.stages={list(given)} must fall from at most teacher.steps={config.teacher.steps} "
            f"to student.steps={last}, in no more stages than the {config.iterations} iterations"
        )
    return given


class Progressive(Objective):
    """The error of a stage's predictions, whose teacher is the frozen one or the student at the end of the last stage.

    Raises:
        EngineError: impossible stages, or one without a step in the objective's band.
    """

    kind: ClassVar[str] = "progressive"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._settings = context.config.objective.progressive
        self._stages = stages_of(context.config)
        self._draws = Draws(context, f"{self.kind} student")
        for steps in self._stages:  # before anything is trained
            self._in_band(steps)
        self._stage = 0
        self._enter()

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        """A frozen copy of the student, where there is more than one stage."""
        if len(stages_of(config)) == 1:
            return {}
        return {STAGE_TEACHER: Role(lambda roles: copy.deepcopy(roles.student.network), lr=None)}

    def begin(self, iteration: int) -> dict[str, float]:
        """Go on to the next stage where it is time, and draw the teacher's trajectories of a stage that is new."""
        stage = iteration * len(self._stages) // self.context.config.iterations
        if stage > self._stage:  # and not back, where a resumed run has more iterations
            self._stage = stage
            self._promote()
            self._enter()
        if self._settings.states == "trajectory" and self._trajectories is None:
            with self.context.account.timed("teacher"):
                self._trajectories = self._draw_trajectories()
        return {"progressive/steps": float(self._stages[self._stage])}

    def draw(self, role: str, number: int) -> Examples:
        """States `x` at steps `step` (B,) of the stage's student, and `landing`, where the teacher went from there, if
        its trajectories are known."""
        rows = self._draws.rows(number)
        step = self._trained[self._draws.steps("step", number, rows, len(self._trained))]
        if self._trajectories is not None:
            x, landing = (self._trajectories[rows.indices, step.cpu() + i].to(self.context.device) for i in (0, 1))
            return Examples({"x": x, "step": step, "landing": landing}, rows.condition)
        image = self.context.collector.teacher_latents(self.context.pool, rows.indices)
        noise, timestep = self._draws.noise("noise", number, rows), timesteps_of(self._policy, step, image)
        x = process.diffuse(self._teacher.schedule, image, noise, timestep)
        return Examples({"x": x, "step": step}, rows.condition)

    def loss(self, role: str, examples: Examples) -> Loss:
        """The weighted squared error of the prediction."""
        student, guidance = self.context.student, self.context.config.student.guidance
        x, step = examples["x"], examples["step"]
        landing = examples["landing"] if "landing" in examples.values else self._land(x, step, examples.condition)
        timestep = timesteps_of(self._policy, step, x)
        prediction = student.guided(x, timestep, examples.condition, guidance=guidance)
        for way in ("student_forward", "student_backward"):
            self.context.account.passes[way] += len(examples) * student.passes(guidance)
        error = (prediction - target_prediction(self._policy, step, x, landing)).square().flatten(1).mean(1)
        weight = prediction_weight(student.schedule, timestep, self._settings.weighting)
        return Loss((weight.to(error) * error).mean(), {"progressive/error": error.detach().mean()})

    def state_dict(self) -> dict[str, Tensor]:
        return {"stage": torch.tensor(self._stage)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._stage = int(state["stage"])
        self._enter()

    @torch.no_grad()
    def _promote(self) -> None:
        """The student as it is becomes the teacher."""
        own = dict(self.context.networks[STAGE_TEACHER].named_parameters())
        for name, value in zero.full_parameters(self.context.student.network):
            own[name].copy_(value)

    def _enter(self) -> None:
        """What belongs to a stage."""
        config, context, first = self.context.config, self.context, self._stage == 0
        self._teacher, self._guidance, self._role = context.teacher, config.teacher.guidance, "teacher"
        if not first:
            self._teacher = context.student.with_network(context.networks[STAGE_TEACHER])
            self._guidance, self._role = config.student.guidance, STAGE_TEACHER
        steps = config.teacher.steps if first else self._stages[self._stage - 1]
        teacher = deterministic_policy(context.teacher, steps).timesteps
        self._policy = deterministic_policy(context.student, self._stages[self._stage])
        self._path = teacher_path(context.teacher.schedule, teacher, self._policy.timesteps)
        self._trained = self._in_band(self._stages[self._stage])
        self._trajectories: Tensor | None = None

    def _in_band(self, steps: int) -> Tensor:
        """Those of a student's steps that start at a noise level of the band."""
        schedule, (low, high) = self.context.teacher.schedule, self.context.band
        level = process.level_of(schedule, deterministic_policy(self.context.student, steps).timesteps)
        found = ((level >= low) & (level <= high)).nonzero().flatten()
        if not len(found):
            raise EngineError(
                f"objective.bands.progressive=[{low:g}, {high:g}] holds none of the noise levels "
                f"{[round(value, 3) for value in level.tolist()]} of a student of {steps} steps"
            )
        return found.to(self.context.device)

    def _draw_trajectories(self) -> Tensor:
        """The teacher's states (pool, N + 1, C, H, W) on the CPU at the student's N steps, from the noise that it
        starts at to its image; each rank draws a share of the pool, in batches that depend on nothing else."""
        context, config, bounds = self.context, self.context.config, self._path.bounds
        pool, drawn = context.pool, []
        for indices in torch.arange(pool.size)[ranks.share(pool.size)].split(
            config.rollout.batch_size or config.train.micro_batch
        ):
            condition = {name: value.to(context.device) for name, value in pool.condition(indices).items()}
            states = [pool.initial_noise(indices).to(context.device)]
            for first, last in zip((0, *bounds[1:-1]), bounds[1:], strict=True):
                states.append(self._taught(states[-1], condition, first, last))
            drawn.append(torch.stack(states, dim=1).cpu())
        return ranks.gather(torch.cat(drawn))

    def _land(self, x: Tensor, step: Tensor, condition: Condition) -> Tensor:
        """Where the teacher goes from states x (B, C, H, W) in the student's steps (B,)."""
        landing = torch.empty_like(x)
        for i in step.unique().tolist():
            own = (step == i).nonzero().flatten()
            its = {name: value[own] for name, value in condition.items()}
            landing[own] = self._taught(x[own], its, self._path.bounds[i], self._path.bounds[i + 1])
        return landing

    def _taught(self, x: Tensor, condition: Condition, first: int, last: int) -> Tensor:
        """The teacher's latents after its steps from `first` to before `last`; their passes are counted."""
        policy = self._path.policy
        part = GaussianPolicy(*(getattr(policy, name)[first:last] for name in ("timesteps", "a", "b", "std")))
        passes = self._teacher.passes(self._guidance)
        self.context.account.passes[self._role] += len(x) * (last - first) * passes
        with torch.no_grad():
            return walk(self._teacher, part, x, condition, guidance=self._guidance)


def _through(schedule: Schedule, timesteps: Tensor) -> GaussianPolicy:
    """The deterministic sampler at other timesteps than its own."""
    if isinstance(schedule, DiffusionSchedule):
        return ddim_policy(
            schedule.alphas_cumprod,
            timesteps,
            eta=0.0,
            prediction_type=schedule.prediction_type,
            final_alpha_cumprod=schedule.final_alpha_cumprod,
        )
    _, sigmas = process.levels(schedule, timesteps)
    return flow_sde_policy(torch.cat([sigmas, sigmas.new_zeros(1)]), noise_level=0.0)
