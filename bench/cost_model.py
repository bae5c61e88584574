"""What an iteration costs, from sizes alone: network calls, network passes, and what the ranks send each other.

docs/scaling.md derives the formulas; bench.scaling holds them against measurements, bench.at_scale carries them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

MASTER_BYTES = 4  # of a weight in the optimizer and in the averaged student, whatever the precision


@dataclass(frozen=True)
class Job:
    """The sizes of an iteration.

    Attributes:
        conditions: per iteration, over all ranks.
        group_size: samples of a condition.
        steps: of the student.
        prefix: deterministic steps before the window, which a group shares.
        window: stochastic steps.
        micro_batch: most pairs in one forward and backward pass of a rank.
        rollout_batch: most latents in one forward pass of the rollout; None: all.
        updates: optimizer steps, over all inner epochs.
        inner_epochs: passes over the pairs.
        evaluations: network evaluations of a latent at a step: 2 with guidance.
        ranks: processes, each with conditions / ranks whole groups.
        stage: of ZeRO.
    """

    conditions: int
    group_size: int
    steps: int
    prefix: int
    window: int
    micro_batch: int
    rollout_batch: int | None = None
    updates: int = 1
    inner_epochs: int = 1
    evaluations: int = 1
    ranks: int = 1
    stage: int = 0

    @property
    def groups(self) -> int:
        """Groups of one rank."""
        return self.conditions // self.ranks

    @property
    def samples(self) -> int:
        """Samples of one rank."""
        return self.groups * self.group_size


class Message(NamedTuple):
    """A kind of collective in one iteration: its phase, its name, and the bytes of whole tensors, all calls added."""

    phase: str
    name: str
    payload: float


def rollout_calls(job: Job) -> list[int]:
    """Latents in each network call of a rank's rollout: the steps of the prefix see one row a group."""
    rows = [job.groups] * job.prefix + [job.samples] * (job.steps - job.prefix)
    return [part * job.evaluations for count in rows for part in _split(count, job.rollout_batch or count)]


def update_calls(job: Job) -> list[int]:
    """Latents in each network call, forward and backward, of a rank's update."""
    pairs = job.samples * job.window * job.inner_epochs // job.updates
    return [part * job.evaluations for _ in range(job.updates) for part in _split(pairs, job.micro_batch)]


def passes(job: Job) -> dict[str, int]:
    """Network evaluations of one latent, over all ranks, by role."""
    trained = sum(update_calls(job)) * job.ranks
    return {"student_forward": sum(rollout_calls(job)) * job.ranks + trained, "student_backward": trained}


def messages(job: Job, parameters: int, weight_bytes: int = 4) -> list[Message]:
    """What the ranks send each other in an iteration because of the weights.

    As DeepSpeed 0.19 does it: stages 1 and 2 reduce gradients by an all-reduce (the ZeRO paper, arXiv 1910.02054, by
    a reduce-scatter, half of that), stage 2 at each micro-batch; stage 3 gathers the weights at each network call.

    Args:
        parameters: trainable ones.
        weight_bytes: of a weight and a gradient in the precision of training.
    """
    if job.ranks == 1:
        return []
    whole, micro_batches = parameters * weight_bytes, len(update_calls(job))
    if job.stage == 3:
        return [
            Message("rollout", "allgather_base", whole * len(rollout_calls(job))),
            Message("student forward", "allgather_base", whole * micro_batches),
            Message("student backward", "allgather_base", whole * micro_batches),
            Message("student backward", "reduce_scatter_base", whole * micro_batches),
            Message("average", "allgather_base", parameters * MASTER_BYTES),
        ]
    result = [Message("student backward", "allreduce", whole * (micro_batches if job.stage == 2 else job.updates))]
    if job.stage:
        result.append(Message("optimizer step", "allgather_base", whole * job.updates))
        result.append(Message("average", "allreduce", parameters * MASTER_BYTES))
    return result


def wire_bytes(message: Message, ranks: int) -> float:
    """Bytes that each rank sends, and receives, by a ring: an all-reduce is a reduce-scatter and an all-gather."""
    return message.payload * (2 if message.name == "allreduce" else 1) * (ranks - 1) / ranks


def memory_bytes(parameters: int, job: Job, *, weight_bytes: int, copies: dict[str, int]) -> dict[str, float]:
    """Bytes of weights and states on a rank, activations apart.

    Args:
        copies: name -> bytes a weight of networks that no stage partitions (the teacher, a reference, ...).
    """
    mixed = weight_bytes < MASTER_BYTES
    shares = {
        "weights": (weight_bytes, 3),
        "gradients": (weight_bytes, 2),
        "optimizer": (2 * MASTER_BYTES + (MASTER_BYTES if mixed else 0), 1),
    }
    student = {
        name: parameters * size / (job.ranks if job.stage >= stage else 1) for name, (size, stage) in shares.items()
    }
    return student | {name: parameters * size for name, size in copies.items()}


def as_job(config: Any, *, prefix: int, window: int, ranks: int = 1) -> Job:
    """The sizes of an `engine.Config`, for one place of the window."""
    return Job(
        conditions=config.rollout.conditions,
        group_size=config.rollout.group_size,
        steps=config.student.steps,
        prefix=prefix,
        window=window,
        micro_batch=config.train.micro_batch,
        rollout_batch=config.rollout.batch_size,
        updates=config.train.updates * config.train.inner_epochs,
        inner_epochs=config.train.inner_epochs,
        evaluations=1 if config.student.guidance == 1 else 2,
        ranks=ranks,
        stage=config.zero.stage,
    )


def _split(count: int, most: int) -> list[int]:
    return [min(most, count - first) for first in range(0, count, most)]
