"""The averaged student: a running mean of the trained weights, which is what is evaluated and exported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine import zero


class AveragedWeights:
    """fp32 running mean of the trainable weights, in host memory; the GPU holds the trained student alone.

    Args:
        engine: the student's DeepSpeed engine; all ranks call every method together.
        decay: share of the mean that stays when `follow` is called.

    Attributes:
        values: name of a parameter -> its mean, fp32 on the CPU.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self.values: dict[str, Tensor] = {
            name: value.to("cpu", torch.float32, copy=True) for name, value in zero.full_parameters(engine)
        }

    @torch.no_grad()
    def follow(self) -> None:
        """Move the mean towards the trained weights."""
        for name, value in zero.full_parameters(self._engine):
            self.values[name].lerp_(value.to(self.values[name]), 1 - self.decay)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the student's network computes with the mean; after it, with the trained weights again."""
        trained = zero.write_parameters(self._engine, self.values)
        try:
            yield
        finally:
            zero.write_parameters(self._engine, trained)

    def fingerprint(self) -> str:
        """SHA-256 of names and values."""
        digest = hashlib.sha256()
        for name, value in sorted(self.values.items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load(self, values: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's mean.

        Raises:
            ValueError: names or shapes that are not those of the trained weights.
        """
        shapes, given = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (self.values, values))
        if shapes != given:
            differing = sorted(n for n in {*shapes, *given} if shapes.get(n) != given.get(n))
            raise ValueError(f"{len(differing)} averaged weights differ from the trained ones, as {differing[0]}")
        self.values = {name: value.float() for name, value in values.items()}
