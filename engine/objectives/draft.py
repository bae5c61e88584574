"""Direct reward fine-tuning: the reward's own gradient, through the decoder and the student's last steps.

DRaFT (Clark et al. 2023, arXiv 2309.17400; K last steps: DRaFT-K), with a reward that also sees the teacher's image.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from engine.errors import ADVICE, EngineError
from engine.rl.rewards import CompositeReward, RewardError

from .chain import Chain
from .contract import Context, Examples, Loss, Objective


class Draft(Objective):
    """Minus the weighted sum of rewards of the student's images.

    Raises:
        EngineError: a term of the reward has no gradient.
    """

    kind: ClassVar[str] = "draft"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        require_gradient(context.reward)
        self._chain = Chain(context, self.kind, context.config.objective.draft.gradient_steps)

    def draw(self, role: str, number: int) -> Examples:
        """Conditions with their noise and the teacher's latents."""
        return self._chain.draw(number)

    def loss(self, role: str, examples: Examples) -> Loss:
        """Minus the mean reward, with a gradient through decoder and steps."""
        context = self.context
        images = context.decode(self._chain.final(examples))
        with torch.no_grad():
            targets = context.decode(examples["target"])
        try:
            total, terms = context.reward(images, targets, context.pool.asked(examples["index"].cpu()))
        except RewardError as error:
            raise EngineError(f"objective draft: {error}; {ADVICE}") from None
        figures = {f"draft/{name}": value.mean().detach() for name, value in terms.items()}
        return Loss(-total.mean(), {"draft/reward": total.mean().detach(), **figures})


def require_gradient(reward: CompositeReward) -> None:
    """Refuse a reward that cannot be differentiated by the student's images.

    Raises:
        EngineError: names the terms.
    """
    black = [name for name, term in reward.terms.items() if term.weight and not term.differentiable]
    if black:
        raise EngineError(
            f"objective draft needs the reward's gradient, and reward.terms has {', '.join(black)} without one; "
            "take them out, or learn by objective.kind=grpo, which needs none"
        )
