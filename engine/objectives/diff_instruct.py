"""Diff-Instruct: the integral KL divergence from the student's noised images to the teacher's (Luo et al. 2023, arXiv
2305.18455), for students of several steps by backward simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from engine.config import Config

from .contract import STUDENT, Context, Examples, Loss, Objective, Role
from .critic import CRITIC, critic_role
from .score_matching import ScoreMatching, matching_loss


class DiffInstruct(Objective):
    kind: ClassVar[str] = "diff_instruct"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        settings = context.config.objective.diff_instruct
        self.matching = ScoreMatching(context, self.kind, settings.weight, settings)

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        return {CRITIC: critic_role(config, config.objective.diff_instruct.critic)}

    def before_student(self) -> Sequence[str]:
        return (CRITIC,) * self.context.config.objective.diff_instruct.critic.updates

    def draw(self, role: str, number: int) -> Examples:
        return self.matching.examples(number) if role == STUDENT else self.matching.critic_examples(number)

    def loss(self, role: str, examples: Examples) -> Loss:
        matching = self.matching
        if role == CRITIC:
            return Loss(matching.critic.loss(examples))
        image = matching.image(examples)
        with torch.no_grad():
            x = matching.noised(image, examples)
            fake = matching.critic.predict(x, examples["timestep"], examples.condition)
        gradient = matching.gradient(image, fake, examples)
        loss = matching_loss(image, gradient) * examples["weight"].mean()
        return Loss(loss, {"matching/gradient": gradient.square().mean().sqrt()})
