"""Regression: the student's final latent against the teacher's from the same noise, through the student's own steps.

Behaviour cloning on pairs of noise and image, as in the distillation of a deterministic sampler into one step (Luhman
and Luhman 2021, arXiv 2101.02388), for any number of steps.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .chain import Chain
from .contract import Context, Examples, Loss, Objective


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """The mean of sqrt(d^2 + c^2) - c: d^2 / 2c for differences far below c, |d| far above (LCM, arXiv 2310.04378).

    Args:
        difference: any shape.
        c: > 0, in the units of the difference.
    """
    return ((difference.square() + c**2).sqrt() - c).mean()


class Regression(Objective):
    """The distance of final latents."""

    kind: ClassVar[str] = "regression"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._settings = context.config.objective.regression
        self._chain = Chain(context, self.kind, self._settings.gradient_steps)

    def draw(self, role: str, number: int) -> Examples:
        """Conditions with their noise and the teacher's latents."""
        return self._chain.draw(number)

    def loss(self, role: str, examples: Examples) -> Loss:
        """The distance, with a gradient through the student's steps."""
        difference = self._chain.final(examples) - examples["target"]
        if self._settings.loss == "mse":
            return Loss(difference.square().mean())
        return Loss(pseudo_huber(difference, self._settings.huber_c))
