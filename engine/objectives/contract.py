"""What an objective is to the trainer: the networks it needs, what they are trained on, their losses, and the order of
their optimizer steps.

The trainer knows no method. An iteration is `train.inner_epochs * train.updates` optimizer steps of the student; before
each of them the objective's own roles take theirs (`before_student`). Objectives that act together share the student's
step: the gradients of their weighted losses add up in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from engine import ranks
from engine.models.denoiser import Condition, Denoiser
from engine.rl.rewards.local_model import Models, load_models

if TYPE_CHECKING:
    from engine.account import Account
    from engine.collector import Collector, Decode
    from engine.conditions import ConditionPool
    from engine.config import Config
    from engine.models.pipelines import Pipeline
    from engine.rl.rewards import CompositeReward
    from engine.roles import Roles
    from engine.teacher_cache import TeacherCache

STUDENT = "student"


@dataclass(frozen=True)
class Role:
    """A network that an objective has beside teacher and student.

    Attributes:
        build: makes it from the run's networks, fp32 on the CPU, alike on every rank.
        lr: learning rate at the start, which falls as the student's does; None: nothing steps it by a gradient.
        precision: that it computes in; None: the student's.
    """

    build: Callable[[Roles], nn.Module]
    lr: float | None
    precision: str | None = None


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch.

    Attributes:
        loss: scalar, the mean over its examples, with a gradient in the role that is trained.
        figures: detached scalars, means over its examples; they reach the metrics under these names.
        worst: detached scalars of which the largest of all micro-batches counts.
    """

    loss: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    worst: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """What one optimizer step of a role is computed from: B examples on this rank.

    Attributes:
        values: name -> tensor (B, ...), on the rank's device.
        condition: what the network is told of each (B, ...).
    """

    values: Mapping[str, Tensor]
    condition: Condition = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def split(self, size: int) -> Iterator[Examples]:
        """Parts of at most `size` examples, in order."""
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            yield Examples(
                {name: value[rows] for name, value in self.values.items()},
                {name: value[rows] for name, value in self.condition.items()},
            )


@dataclass(frozen=True)
class Context:
    """What an objective works with, on this rank.

    Attributes:
        config: of the run.
        pipeline: the teacher's directory.
        teacher: frozen.
        student: around its DeepSpeed engine; calling it with gradients enabled trains it.
        reference: the frozen initial student, or None where objective.kl_coef is 0.
        networks: the objective's own roles, by name: around their engines where they are trained.
        pool: of training conditions.
        targets: the teacher's final latents.
        reward: scores images against the teacher's.
        decode: latents to images in [0, 1].
        collector: rolls out by a policy and scores; what policy optimisation learns from.
        account: of passes and seconds.
        device: of this rank.
        band: share of the noise levels that the objective acts on, 0 the image and 1 pure noise.
        models: loads vision models of local directories.
    """

    config: Config
    pipeline: Pipeline
    teacher: Denoiser
    student: Denoiser
    reference: Denoiser | None
    networks: Mapping[str, nn.Module]
    pool: ConditionPool
    targets: TeacherCache
    reward: CompositeReward
    decode: Decode
    collector: Collector
    account: Account
    device: torch.device
    band: tuple[float, float] = (0.0, 1.0)
    models: Models = load_models


class Objective(ABC):
    """One way to learn; its methods are called by all ranks together.

    Attributes:
        kind: its name in objective.kind.
    """

    kind: ClassVar[str]

    def __init__(self, context: Context) -> None:
        self.context = context

    @staticmethod
    def roles(config: Config) -> Mapping[str, Role]:
        """The networks it needs beside teacher and student, by name."""
        return {}

    @staticmethod
    def examples(config: Config, student: Denoiser) -> int:
        """Examples of a rank in one optimizer step of the student."""
        return config.train.batch_size // ranks.world_size()

    def start(self) -> None:
        """Once in a run that starts anew, when the student's initial weights stand; a resumed run loads its state."""

    def begin(self, iteration: int) -> dict[str, float]:
        """Before the optimizer steps of an iteration, counted from 0.

        Returns:
            Metrics of it.
        """
        return {}

    def before_student(self) -> Sequence[str]:
        """The roles whose optimizers are stepped before each step of the student's, in order; always the same."""
        return ()

    @abstractmethod
    def draw(self, role: str, number: int) -> Examples:
        """What one optimizer step of a role is computed from; called without gradients.

        Args:
            role: "student" or one of its own.
            number: of this role's optimizer step since the start of the run, counted from 0. All randomness is
                addressed by it, so that a resumed run goes on exactly.
        """

    @abstractmethod
    def loss(self, role: str, examples: Examples) -> Loss:
        """The loss of a micro-batch; the parameters of its other roles have requires_grad off."""

    def check(self, figures: Mapping[str, float]) -> None:
        """Before the student's optimizer step, with the step's figures and worst: raise EngineError to refuse it."""

    def stepped(self, role: str, number: int) -> None:
        """After an optimizer step of a role, the student's included."""

    def end(self) -> dict[str, float]:
        """After the optimizer steps of an iteration; returns metrics of it."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors beside the roles' engines that an exact continuation needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's `state_dict`."""
