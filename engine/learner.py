"""A network that is trained, on a DeepSpeed engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from engine import ranks, zero
from engine.config import Config


class Learner:
    """One role's network with its engine and optimizer.

    Args:
        config: of the run, with the role's own precision and learning rate.
        network: fp32; trained in place.
        micro_batch: examples in one forward pass of a rank.
        accumulation: most micro-batches in one optimizer step.

    Attributes:
        engine: the DeepSpeed engine.
    """

    def __init__(self, config: Config, network: nn.Module, *, micro_batch: int, accumulation: int) -> None:
        self.config = config
        self.engine = zero.initialize(
            config, network, micro_batch=micro_batch, accumulation=accumulation, world_size=ranks.world_size()
        )
        self._trainable = [parameter for _, parameter in zero.trainable_parameters(self.engine)]

    def set_learning_rate(self, share: float) -> None:
        """Train with this share of the learning rate at the start."""
        zero.set_learning_rate(self.engine, self.config.optimizer.lr * share)

    def step(self, losses: Sequence[Callable[[], Tensor]], before: Callable[[], None]) -> Tensor | float:
        """One optimizer step on the sum of losses.

        Args:
            losses: each computed when the one before has been propagated back.
            before: called once all gradients stand, before the weights change.

        Returns:
            The norm of the gradient over all ranks before clipping.
        """
        # DeepSpeed divides each loss by the micro-batches that it was told of, however many there are.
        scale = self.engine.gradient_accumulation_steps()
        for place, loss in enumerate(losses):
            last = place == len(losses) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss() * scale)
            if last:
                before()
            norm = zero.step(self.engine)
        return norm

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, gradients flow through the network and leave none in it."""
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        # The engine takes a gradient through its own outputs for the start of its own backward pass.
        self.engine.forward = lambda *arguments, **options: self.engine.module(*arguments, **options)
        try:
            yield
        finally:
            del self.engine.forward
            for parameter in self._trainable:
                parameter.requires_grad_(True)
