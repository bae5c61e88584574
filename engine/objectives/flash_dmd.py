"""Flash-DMD: distribution matching where noise is high, a GAN on pixels where it is low, and a critic that is moved
towards the student (arXiv 2511.20549)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine import ranks
from engine.config import Config
from engine.errors import EngineError
from engine.models.discriminator import Heads, discriminator_loss, generator_loss
from engine.models.process import diffuse
from engine.preflight import is_digits
from engine.real_images import RealImages
from engine.rl.rewards.local_model import Models
from engine.rl.rollout import timesteps_of
from engine.roles import Roles

from .contract import STUDENT, Context, Examples, Loss, Objective, Role
from .critic import CRITIC, critic_role
from .draws import Draws, Rows
from .injection import inject
from .pixel_features import Features, channels, load_features
from .score_matching import ScoreMatching, matching_loss
from .simulation import StudentSampler

DISCRIMINATOR = "discriminator"


class FlashDmd(Objective):
    kind: ClassVar[str] = "flash_dmd"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = settings = context.config.objective.flash_dmd
        if context.config.student.architecture and settings.critic.keep < 1:
            raise EngineError(
                f"objective.flash_dmd.critic.keep={settings.critic.keep} moves the critic, which has the teacher's "
                "architecture, towards a student of another (student.architecture); set it to 1"
            )
        low, high = context.band
        sampler, key = StudentSampler(context), "objective.flash_dmd.boundary"
        self.low_steps = sampler.steps_between(low, math.nextafter(settings.boundary, 0), key)
        high_steps = sampler.steps_between(max(low, settings.boundary), high, key)
        self.matching = ScoreMatching(context, self.kind, "dmd", settings, high_steps)
        self.features = load_pixel_features(context.config, context.models, digits=is_digits(context.teacher))
        self.real = RealImages(context, settings.real_images, "objective.flash_dmd.real_images")
        self._heads = context.networks[DISCRIMINATOR]
        self.draws = {role: Draws(context, f"{self.kind} low {role}") for role in (STUDENT, DISCRIMINATOR)}

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        settings = config.objective.flash_dmd
        heads = Role(partial(_build_heads, config=config), lr=settings.discriminator_lr)
        return {CRITIC: critic_role(config, settings.critic), DISCRIMINATOR: heads}

    def before_student(self) -> Sequence[str]:
        return (CRITIC,) * self.settings.critic.updates + (DISCRIMINATOR,)

    def draw(self, role: str, number: int) -> Examples:
        if role == CRITIC:
            return self.matching.critic_examples(number)
        draws, sampler = self.draws[role], self.matching.sampler
        if role == DISCRIMINATOR:
            rows = draws.rows(number)
            first = torch.zeros_like(rows.indices, device=self.context.device)
            x, step = self._low_states(draws, number, rows, draws.noise("initial", number, rows), first)
            fake = sampler.image(x, step, rows.condition)
            return Examples({"fake": fake, "real": self.real(draws, number, rows)})
        examples, rows = self.matching.examples(number), self.matching.rows(number)
        x, step = self._low_states(draws, number, rows, examples["x"], examples["step"])
        return Examples({**examples.values, "low_x": x, "low_step": step}, examples.condition)

    def loss(self, role: str, examples: Examples) -> Loss:
        if role == CRITIC:
            return Loss(self.matching.critic.loss(examples))
        if role == DISCRIMINATOR:
            with torch.no_grad():
                fake, real = (self._features_of(examples[name]) for name in ("fake", "real"))
            both = self._heads([torch.cat(pair) for pair in zip(real, fake, strict=True)])
            return Loss(discriminator_loss(*zip(*(logits.chunk(2) for logits in both), strict=True)))
        matching, condition = self.matching, examples.condition
        # Both bands in one pass of the student.
        both = {name: torch.cat([value, value]) for name, value in condition.items()}
        x, step = (torch.cat([examples[name], examples[f"low_{name}"]]) for name in ("x", "step"))
        image, low = matching.student_image(x, step, both).chunk(2)
        with torch.no_grad():
            fake = matching.critic.predict(matching.noised(image, examples), examples["timestep"], condition)
        gradient = matching.gradient(image, fake, examples)
        gan = generator_loss(self._heads(self._features_of(low)))
        loss = matching_loss(image, gradient) + self.settings.gan_weight * gan
        return Loss(
            loss * examples["weight"].mean(),
            {"matching/gradient": gradient.square().mean().sqrt(), "gan/generator": gan},
        )

    def stepped(self, role: str, number: int) -> None:
        critic = self.settings.critic
        if role == STUDENT and critic.keep < 1 and number >= critic.warmup:
            inject(self.context.networks[CRITIC], self.context.student.network, critic.keep)

    def _low_states(self, draws: Draws, number: int, rows: Rows, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) at low noise and the steps (B,) that read them: the student's own images, drawn to their
        end from the latents before steps (B,), and noised again."""
        sampler = self.matching.sampler
        clean = sampler.walk(draws, number, rows, x, step, torch.full_like(step, len(sampler.levels)))
        low = self.low_steps[draws.steps("low step", number, rows, len(self.low_steps))]
        noise = draws.noise("low noise", number, rows)
        timestep = timesteps_of(sampler.policy, low, clean)
        return diffuse(self.context.student.schedule, clean, noise, timestep), low

    def _features_of(self, latents: Tensor) -> list[Tensor]:
        passes = self.context.account.passes  # of the encoder; the heads are small beside it
        passes[f"{DISCRIMINATOR}_forward"] += len(latents)
        if torch.is_grad_enabled():
            passes[f"{DISCRIMINATOR}_backward"] += len(latents)
        return self.features(self.context.decode(latents))


def load_pixel_features(config: Config, models: Models, *, digits: bool) -> Features:
    """The encoder of `objective.flash_dmd.encoder` on this rank's device."""
    return load_features(
        config.objective.flash_dmd.encoder,
        "objective.flash_dmd.encoder",
        ranks.device(),
        digits=digits,
        batch_size=config.train.micro_batch,
        models=models,
    )


def _build_heads(roles: Roles, config: Config) -> nn.Module:
    features = load_pixel_features(config, roles.models, digits=is_digits(roles.teacher))
    blank = roles.decode(torch.zeros(1, *roles.teacher.latent_shape, device=ranks.device()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Heads(channels(features, blank))
