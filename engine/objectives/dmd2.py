"""DMD2: distribution matching, and a GAN on the critic's own features (Yin et al. 2024, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.errors import EngineError
from engine.models.discriminator import ClassifyingDenoiser, discriminator_loss, generator_loss
from engine.models.process import diffuse, timestep_at
from engine.real_images import RealImages

from .contract import STUDENT, Context, Examples, Loss, Objective, Role
from .critic import CRITIC, critic_role, denoising_loss
from .score_matching import ScoreMatching, matching_loss


class Dmd2(Objective):
    kind: ClassVar[str] = "dmd2"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.objective.dmd2
        self.matching = ScoreMatching(context, self.kind, "dmd", self.settings)
        self.real = None
        if self.settings.gan_weight:
            self.real = RealImages(context, self.settings.real_images, "objective.dmd2.real_images")

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        settings = config.objective.dmd2
        if not settings.gan_weight:
            return {CRITIC: critic_role(config, settings.critic)}
        return {CRITIC: critic_role(config, settings.critic, wrap=partial(_classifying, seed=config.seed))}

    def before_student(self) -> Sequence[str]:
        return (CRITIC,) * self.settings.critic.updates

    def draw(self, role: str, number: int) -> Examples:
        if role == STUDENT:
            return self.matching.examples(number)
        examples = self.matching.critic_examples(number)
        if self.real is None:
            return examples
        draws = self.matching.draws[CRITIC]
        rows = draws.rows(number)
        level = draws.uniform("real level", number, rows)
        real = {
            "real_image": self.real(draws, number, rows),
            "real_noise": draws.noise("real noise", number, rows),
            "real_timestep": timestep_at(self.context.teacher.schedule, level),
        }
        return Examples({**examples.values, **real}, examples.condition)

    def loss(self, role: str, examples: Examples) -> Loss:
        if role == CRITIC:
            return Loss(self.matching.critic.loss(examples)) if self.real is None else self._critic_loss(examples)
        matching = self.matching
        image = matching.image(examples)
        with torch.set_grad_enabled(self.real is not None):  # through the critic to the image, for the GAN
            x = matching.noised(image, examples)
            fake = matching.critic.predict(x, examples["timestep"], examples.condition)
        gradient = matching.gradient(image, fake.detach(), examples)
        loss = matching_loss(image, gradient)
        figures = {"matching/gradient": gradient.square().mean().sqrt()}
        if self.real is not None:
            gan = generator_loss([self._logits])
            if self.context.config.zero.stage == 3:
                # DeepSpeed gathers and releases weights as a gradient comes to a network's output, also one of 0.
                gan = gan + 0 * fake.sum()
            loss = loss + self.settings.gan_weight * gan
            figures["gan/generator"] = gan
        return Loss(loss * examples["weight"].mean(), figures)

    def _critic_loss(self, examples: Examples) -> Loss:
        """Denoising of the student's images and, by the logits of the same pass, telling them from real ones."""
        matching, schedule, count = self.matching, self.context.teacher.schedule, len(examples)
        timestep = torch.cat([examples["timestep"], examples["real_timestep"]])
        real = diffuse(schedule, examples["real_image"], examples["real_noise"], examples["real_timestep"])
        both = {name: torch.cat([value, value]) for name, value in examples.condition.items()}
        prediction = matching.critic.predict(
            torch.cat([matching.noised(examples["image"], examples), real]), timestep, both
        )
        values = (examples[name] for name in ("image", "noise", "timestep"))
        denoising = denoising_loss(schedule, prediction[:count], *values)
        classifying = discriminator_loss([self._logits[count:]], [self._logits[:count]])
        return Loss(
            denoising + self.settings.classifier_weight * classifying,
            {"critic/denoising": denoising, "gan/discriminator": classifying},
        )

    @property
    def _logits(self) -> Tensor:
        """Of the critic's last pass."""
        network = self.context.networks[CRITIC]
        return getattr(network, "module", network).logits


def _classifying(network: nn.Module, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return ClassifyingDenoiser(network)
        except ValueError as error:
            raise EngineError(f"objective.dmd2.gan_weight: {error}, which the head reads; set it to 0") from None
