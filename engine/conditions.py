"""Conditions: fixed, seeded lists of what is asked for, and the initial noise that goes with each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.denoiser import Condition
from engine.rl.rewards import Asked
from engine.sources import Source


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed that depends on all parts, so that streams of noise never meet.

    Noise is addressed, not streamed: it does not depend on the number of ranks, the batch size or where a run was
    resumed.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (len(seeds), *shape), fp32, row i from seeds[i] alone (on the CPU: alike on any device)."""
    generator = torch.Generator()
    rows = torch.empty(len(seeds), *shape)
    for row, seed in zip(rows, seeds, strict=True):
        torch.randn(shape, generator=generator.manual_seed(seed), out=row)
    return rows


@dataclass(frozen=True)
class ConditionPool:
    """`size` conditions of one split, each with its own initial noise.

    Attributes:
        split: "train" | "held_out" | "evaluation"; pools of different splits share no noise.
        seed: of the whole list.
        size: number of conditions; the rows of the source take turns.
        source: what is asked for.
        latent_shape: (C, H, W) of the noise.
    """

    split: str
    seed: int
    size: int
    source: Source
    latent_shape: tuple[int, int, int]

    def condition(self, indices: Tensor) -> Condition:
        """Network conditions (len(indices), ...) of pool indices (N,) int64."""
        return self.source.condition(indices % len(self.source))

    def asked(self, indices: Tensor) -> Asked:
        """What rewards are told of pool indices (N,) int64."""
        return self.source.asked(indices % len(self.source))

    def captions(self, indices: Tensor) -> list[str]:
        """What a picture writes over each of pool indices (N,)."""
        return [self.source.caption(row) for row in (indices % len(self.source)).tolist()]

    def initial_noise(self, indices: Tensor) -> Tensor:
        """(N, C, H, W) fp32 standard normal noise of pool indices (N,) int64."""
        return noise([seed_of("initial", self.split, self.seed, int(i)) for i in indices], self.latent_shape)

    def key(self, index: int) -> str:
        """What identifies a condition in a cache: what it asks for and its noise."""
        name = self.source.name(index % len(self.source))
        return f"{name} noise={seed_of('initial', self.split, self.seed, index)}"

    def draw(self, count: int, *, iteration: int) -> Tensor:
        """`count` different pool indices (count,) int64 for one iteration: each pool pass is a new permutation."""
        first = iteration * count
        passes = range(first // self.size, (first + count - 1) // self.size + 1)
        order = torch.cat([self._permutation(number) for number in passes])
        drawn = order[first - passes.start * self.size :][:count]
        # Where two permutations meet, an index may come twice; the later one is replaced by the next unused.
        seen = dict.fromkeys(drawn.tolist())
        spare = (i for i in order[first - passes.start * self.size + count :].tolist() if i not in seen)
        while len(seen) < count:
            seen[next(spare)] = None
        return torch.tensor(list(seen))

    def _permutation(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.split, self.seed, number))
        return torch.randperm(self.size, generator=generator)
