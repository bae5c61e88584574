"""VarDiU: an upper bound on the KL divergence from the student's noised images to the teacher's, by a posterior over
the noise that the images were made of (Wang et al. 2025, arXiv 2508.20646).

For images x0 = g(z), noised to x = alpha x0 + sigma noise with distribution q against the teacher's p, Bayes' rule
log q(x) = log q(x | z) + log p(z) - log q(z | x), with any density r in the place of the student's own posterior, gives

    E[log q(x | z) + log p(z) - log r(z | x) - log p(x)] = KL(q || p) + E KL(q(z | x) || r(z | x)).

Its first two terms are constant. So the posterior learns by maximum likelihood, and the student from the gradient of
-log r(z | x) - <score_p(x), alpha x0>: one pulls images apart, the other towards the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.errors import EngineError
from engine.models.denoiser import Condition, Denoiser
from engine.models.lora import ADAPTER
from engine.models.posterior import FlowPosterior, GaussianPosterior, MixturePosterior
from engine.models.process import diffuse, level_of, levels, score, timestep_at, to_noise
from engine.roles import Roles
from engine.sampling import student_policy

from .chain import per_latent, walk_student
from .contract import STUDENT, Context, Examples, Loss, Objective, Role
from .critic import build_critic
from .draws import Draws, Rows
from .settings import LEVELS
from .settings import Posterior as Settings

POSTERIOR = "posterior"
Weight = Literal["none", "sigma", "sigma2"]


def bound_loss(
    log_posterior: Tensor,
    teacher_score: Tensor,
    image: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    control_variate: bool = True,
) -> Tensor:
    """What to minimise, (B,) in the inputs' dtype: its gradient estimates that of the bound without bias.

    The control variate <-noise / sigma, alpha image> has a gradient of mean zero. With it and the student's own
    posterior, every sample's gradient is alpha (score_q - score_p), that of Diff-Instruct with the exact score.

    Args:
        log_posterior: (B,) log r(z | x), with gradients in x.
        teacher_score: (B, ...) gradient of log p at x; taken as constant.
        image, noise: (B, ...) of which x = alpha image + sigma noise is made.
        alpha, sigma: (B,) of the noise levels.
    """
    pull = teacher_score + noise / per_latent(sigma, noise) if control_variate else teacher_score
    return -log_posterior - alpha.to(image) * (pull.detach() * image).flatten(1).sum(1)


def level_weight(sigma: Tensor, kind: Weight) -> Tensor:
    """Weight (B,) of the bound at noise levels sigma (B,): 1, sigma or sigma^2."""
    return sigma ** {"none": 0, "sigma": 1, "sigma2": 2}[kind]


def annealed_level(uniform: Tensor, progress: float, low: float, high: float, power: tuple[float, float]) -> Tensor:
    """Noise levels low + u^p (high - low) like `uniform`; p goes from the first to the second `power` over the run, in
    equal ratios, so from coarse to fine.

    Args:
        uniform: u, in [0, 1).
        progress: share of the run that is over, in [0, 1].
    """
    start, end = power
    return low + uniform ** (start * (end / start) ** progress) * (high - low)


def make_head(settings: Settings, channels: int) -> nn.Module:
    """The density of `objective.vardiu.posterior` over latents of C channels."""
    if settings.head == "gaussian":
        return GaussianPosterior(channels)
    if settings.head == "mixture":
        return MixturePosterior(channels, settings.components)
    return FlowPosterior(
        channels, layers=settings.layers, components=settings.components, width=settings.width, image=True
    )


class DenoiserPosterior(nn.Module):
    """A posterior over the noise that images were made of, by a diffusion network and a small convolutional head that
    reads its prediction; near the standard normal at first, which is all that pure noise tells.

    Args:
        denoiser: whose network is to be trained.
        head: a density of models/posterior.py over (initial noise, step noises...) stacked by channels.
        width: channels between the convolutions.
    """

    def __init__(self, denoiser: Denoiser, head: nn.Module, width: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.network = denoiser.network
        channels = denoiser.latent_shape[0]
        self.parameters_of = nn.Sequential(
            nn.Conv2d(2 * channels + 1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, head.parameters_per_position, 3, padding=1),
        )
        nn.init.normal_(self.parameters_of[-1].weight, std=0.01)  # not 0, or the components of a mixture stay alike
        nn.init.zeros_(self.parameters_of[-1].bias)
        self.head = head

    def forward(self, z: Tensor, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """log r(z | x): (B,) fp32, with gradients in x.

        Args:
            z: (B, (1 + S) C, H, W) all noise that an image was made of.
            x: (B, C, H, W) the image, noised.
            timestep: (B,) how far.
            condition: tensors (B, ...).
        """
        schedule = self.denoiser.schedule
        noise = to_noise(schedule, x, self.denoiser.guided(x, timestep, condition), timestep)
        level = per_latent(level_of(schedule, timestep), x).expand_as(x[:, :1])
        dtype = next(self.parameters_of.parameters()).dtype
        parameters = self.parameters_of(torch.cat([noise, x, level], 1).to(dtype)).float()
        return self.head(z, parameters)


def build_posterior(roles: Roles, config: Config) -> DenoiserPosterior:
    """The posterior of a run: the teacher's network, to be trained, with a new head; alike on every rank."""
    settings = config.objective.vardiu.posterior
    denoiser = roles.teacher.with_network(build_critic(roles, config))
    denoiser = denoiser.with_adapter(ADAPTER if config.lora.rank else None)
    noises = 1 + int(student_policy(config, roles.student).stochastic.sum())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = make_head(settings, noises * denoiser.latent_shape[0])
        return DenoiserPosterior(denoiser, head, settings.width)


class Vardiu(Objective):
    kind: ClassVar[str] = "vardiu"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.objective.vardiu
        self.levels = max(LEVELS[0], context.band[0]), min(LEVELS[1], context.band[1])
        if self.levels[0] >= self.levels[1]:
            raise EngineError(f"objective.bands.vardiu={list(context.band)} has no noise level in {list(LEVELS)}")
        self.policy = student_policy(context.config, context.student)
        self.stochastic = self.policy.stochastic.nonzero().flatten().tolist()
        steps = len(self.policy.timesteps)
        self.gradient_steps = min(self.settings.gradient_steps or steps, steps)
        self.draws = {role: Draws(context, f"{self.kind} {role}") for role in (STUDENT, POSTERIOR)}
        self.posterior = context.networks[POSTERIOR]

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        settings = config.objective.vardiu.posterior
        return {POSTERIOR: Role(lambda roles: build_posterior(roles, config), settings.lr, settings.precision)}

    def before_student(self) -> Sequence[str]:
        return (POSTERIOR,) * self.settings.posterior.updates

    def draw(self, role: str, number: int) -> Examples:
        draws = self.draws[role]
        rows = draws.rows(number)
        values = {
            "initial": draws.noise("initial", number, rows),
            "noise": draws.noise("noise", number, rows),
            "timestep": self._timesteps(role, number, rows),
        }
        if self.stochastic:
            values["steps"] = torch.stack([draws.noise(f"step {i}", number, rows) for i in self.stochastic], 1)
        examples = Examples(values, rows.condition)
        if role == STUDENT:
            return examples
        return Examples({**values, "x": self._noised(self._image(examples), examples)}, rows.condition)

    def loss(self, role: str, examples: Examples) -> Loss:
        if role == POSTERIOR:
            log_posterior = self._log_posterior(examples["x"], examples)
            return Loss(-(log_posterior / examples["x"][0].numel()).mean())
        image = self._image(examples)
        if self.settings.antithetic:
            image, examples = torch.cat([image, image]), _with_opposite_noise(examples)
        x = self._noised(image, examples)
        alpha, sigma = (value.to(image) for value in levels(self.context.teacher.schedule, examples["timestep"]))
        log_posterior = self._log_posterior(x, examples)
        teacher_score = self._teacher_score(x, examples)
        bound = bound_loss(
            log_posterior, teacher_score, image, examples["noise"], alpha, sigma,
            control_variate=self.settings.control_variate,
        )  # fmt: skip
        elements = image[0].numel()
        loss = (level_weight(sigma, self.settings.weight) * bound / elements).mean()
        return Loss(loss, {"posterior/log_prob": (log_posterior.detach() / elements).mean()})

    def _timesteps(self, role: str, number: int, rows: Rows) -> Tensor:
        train = self.context.config.train
        steps = self.context.config.iterations * train.inner_epochs * train.updates
        if role == POSTERIOR:
            steps *= self.settings.posterior.updates
        uniform = self.draws[role].uniform("level", number, rows)
        level = annealed_level(uniform, number / steps, *self.levels, self.settings.power)
        return timestep_at(self.context.teacher.schedule, level)

    def _image(self, examples: Examples) -> Tensor:
        """The student's final latents (B, C, H, W) fp32, with gradients where they are enabled."""
        return walk_student(self.context, self.policy, examples, examples.values.get("steps"), self.gradient_steps)

    def _noised(self, image: Tensor, examples: Examples) -> Tensor:
        return diffuse(self.context.teacher.schedule, image, examples["noise"], examples["timestep"])

    def _log_posterior(self, x: Tensor, examples: Examples) -> Tensor:
        passes = self.context.account.passes
        passes[f"{POSTERIOR}_forward"] += len(x)
        if torch.is_grad_enabled():
            passes[f"{POSTERIOR}_backward"] += len(x)
        z = examples["initial"]
        if self.stochastic:
            z = torch.cat([z.unsqueeze(1), examples["steps"]], 1).flatten(1, 2)
        return self.posterior(z, x, examples["timestep"], examples.condition)

    @torch.no_grad()
    def _teacher_score(self, x: Tensor, examples: Examples) -> Tensor:
        teacher, guidance = self.context.teacher, self.context.config.teacher.guidance
        self.context.account.passes["teacher"] += len(x) * teacher.passes(guidance)
        prediction = teacher.guided(x, examples["timestep"], examples.condition, guidance=guidance)
        return score(teacher.schedule, x, prediction, examples["timestep"])


def _with_opposite_noise(examples: Examples) -> Examples:
    """Each example with its noise and again with the opposite."""
    values = {name: torch.cat([value, -value if name == "noise" else value]) for name, value in examples.values.items()}
    return Examples(values, {name: torch.cat([value, value]) for name, value in examples.condition.items()})
