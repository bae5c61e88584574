"""The random numbers of a distillation: conditions, noise and noise levels, addressed rather than streamed.

A row depends on the objective, the role, the number of its optimizer step and its place in the batch over all ranks, so
ranks, micro-batches and resumption change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import ranks
from engine.conditions import noise, seed_of
from engine.models.denoiser import Condition
from engine.models.process import timestep_at

from .contract import Context


@dataclass(frozen=True)
class Rows:
    """This rank's B rows of one optimizer step.

    Attributes:
        slots: (B,) int64, places in the batch of all ranks.
        indices: (B,) int64, indices in the pool of training conditions.
        condition: what the network is told (B, ...), on the rank's device.
    """

    slots: Tensor
    indices: Tensor
    condition: Condition


class Draws:
    """The random numbers of one role of one objective.

    Args:
        context: of the objective.
        name: what addresses them: the objective's kind and the role.
    """

    def __init__(self, context: Context, name: str) -> None:
        self.context = context
        self.name = name

    def rows(self, number: int) -> Rows:
        """This rank's share of the train.batch_size conditions of an optimizer step; rows that the pool has not are
        drawn again, with noise of their own."""
        context, count = self.context, self.context.config.train.batch_size
        slots = torch.arange(count)[ranks.share(count)]
        size = context.pool.size
        passes = [context.pool.draw(min(count, size), iteration=number * -(-count // size) + turn)
                  for turn in range(-(-count // size))]  # fmt: skip
        indices = torch.cat(passes)[slots]
        condition = {name: value.to(context.device) for name, value in context.pool.condition(indices).items()}
        return Rows(slots, indices, condition)

    def noise(self, what: str, number: int, rows: Rows) -> Tensor:
        """Standard normal noise (B, C, H, W) fp32 on the rank's device.

        Args:
            what: tells apart the draws of one optimizer step.
        """
        seeds = [self._seed(what, number, int(slot)) for slot in rows.slots]
        return noise(seeds, self.context.pool.latent_shape).to(self.context.device)

    def uniform(self, what: str, number: int, rows: Rows) -> Tensor:
        """(B,) float64 in [0, 1), on the rank's device."""
        generator = torch.Generator().manual_seed(self._seed(what, number, -1))
        values = torch.rand(self.context.config.train.batch_size, generator=generator, dtype=torch.float64)
        return values[rows.slots].to(self.context.device)

    def steps(self, what: str, number: int, rows: Rows, count: int) -> Tensor:
        """(B,) int64 in 0..count-1, on the rank's device."""
        return (self.uniform(what, number, rows) * count).long()

    def timesteps(self, what: str, number: int, rows: Rows, *, lowest: float = 0.0, highest: float = 1.0) -> Tensor:
        """Timesteps (B,), uniform over the noise levels from `lowest` to `highest` that are in the objective's band."""
        low, high = self.context.band
        low, high = max(low, lowest), min(high, highest)
        level = low + (high - low) * self.uniform(what, number, rows)
        return timestep_at(self.context.teacher.schedule, level)

    def _seed(self, what: str, number: int, slot: int) -> int:
        return seed_of(self.name, what, self.context.config.seed, number, slot)
