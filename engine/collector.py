"""How the samples of an iteration come about: conditions, the teacher's targets, rollouts, and their rewards.

An iteration is rolled out in parts. While one part is rolled out, a thread decodes and scores the one before, so a
reward that waits (for a server, for the CPU) costs no time of the GPU. All parts are drawn by the same student, so
nothing about the samples depends on their number.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from engine import ranks
from engine.account import Account
from engine.conditions import ConditionPool, noise, seed_of
from engine.config import Config
from engine.models.denoiser import Condition, Denoiser
from engine.rl import GaussianPolicy
from engine.rl.rewards import CompositeReward
from engine.rl.rollout import Trajectory, join, rollout
from engine.teacher_cache import TeacherCache

Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, H, W) -> images (B, c, h, w) fp32 in [0, 1]."""


@dataclasses.dataclass
class Batch:
    """One rank's conditions of one iteration: M whole groups.

    Attributes:
        iteration: counted from 0.
        slots: (M,) int64, places in the iteration's list of conditions, over all ranks.
        indices: (M,) int64, pool indices.
        condition: network conditions (M, ...).
    """

    iteration: int
    slots: Tensor
    indices: Tensor
    condition: Condition

    def split(self, parts: int) -> list[Batch]:
        """Consecutive groups, as equal in number as they can be."""
        return [
            Batch(
                self.iteration,
                self.slots[rows],
                self.indices[rows],
                {name: value[rows.to(value.device)] for name, value in self.condition.items()},
            )
            for rows in torch.arange(len(self.slots)).tensor_split(parts)
            if len(rows)
        ]


@dataclasses.dataclass
class Samples:
    """What an iteration learns from.

    Attributes:
        batch: the conditions of this rank.
        policy: that drew the samples.
        trajectory: of this rank, M * group_size samples.
        terms: name -> (N,) float64 unweighted rewards of the samples of all ranks, on the CPU.
    """

    batch: Batch
    policy: GaussianPolicy
    trajectory: Trajectory
    terms: dict[str, Tensor]


class Collector:
    """Draws and scores the samples of one rank.

    Args:
        config: of the run.
        student: draws them.
        pool: of training conditions.
        targets: the teacher's latents.
        reward: scores images against the teacher's.
        decode: latents to images.
        account: of passes and seconds.
    """

    def __init__(
        self,
        config: Config,
        student: Denoiser,
        pool: ConditionPool,
        targets: TeacherCache,
        reward: CompositeReward,
        decode: Decode,
        account: Account,
    ) -> None:
        self.config = config
        self.student = student
        self.pool = pool
        self.targets = targets
        self.reward = reward
        self.decode = decode
        self.account = account
        self.device = ranks.device()

    def collect(self, iteration: int, policy: GaussianPolicy) -> Samples:
        """The samples of one iteration, with the rewards of all ranks."""
        batch = self.draw_conditions(iteration)
        with self.account.timed("teacher"):
            latents = self.teacher_latents(self.pool, batch.indices)
        with _scorer(self.device) as submit:
            parts, scores, first = [], [], 0
            with self.account.timed("rollout"):
                for part in batch.split(self.config.rollout.chunks):
                    target = latents[first : first + len(part.slots)]
                    first += len(part.slots)
                    parts.append(self.roll_out(part, policy))
                    if first < len(batch.slots):
                        scores.append(submit(self.score, parts[-1].final, target, self.pool, part.indices))
            with self.account.timed("reward"):
                last = self.score(parts[-1].final, target, self.pool, part.indices)
                tables = [*(score.result() for score in scores), last]
                terms = {name: torch.cat([table[name] for table in tables]) for name in last}
                rewards = ranks.gather(torch.stack(list(terms.values()), dim=1))
        return Samples(batch, policy, join(parts), dict(zip(terms, rewards.unbind(1), strict=True)))

    def draw_conditions(self, iteration: int) -> Batch:
        """This rank's share of the iteration's conditions; the list of all ranks is the same for any number of them."""
        count = self.config.rollout.conditions
        slots = torch.arange(count)[ranks.share(count)]
        indices = self.pool.draw(count, iteration=iteration)[slots]
        condition = {name: value.to(self.device) for name, value in self.pool.condition(indices).items()}
        return Batch(iteration, slots, indices, condition)

    def teacher_latents(self, pool: ConditionPool, indices: Tensor, *, role: str = "teacher") -> Tensor:
        """Target latents (M, C, H, W), drawn once per condition; their passes count as `role`."""
        before = self.targets.passes
        latents = self.targets.targets(pool, indices, self.device)
        self.account.passes[role] += self.targets.passes - before
        return latents

    def roll_out(self, batch: Batch, policy: GaussianPolicy) -> Trajectory:
        """group_size samples of each condition by the student's policy."""
        config, size, shape = self.config, self.config.rollout.group_size, self.pool.latent_shape
        initial, repeat = self.pool.initial_noise(batch.indices), size
        if config.rollout.pairing == "prompt":
            # Each sample starts from noise of its own, so no two rows of a group are ever equal.
            initial, repeat = self._noise("initial", batch, shape, rows=size), 1
        trajectory = rollout(
            self.student,
            policy,
            initial.to(self.device),
            batch.condition,
            guidance=config.student.guidance,
            group_size=repeat,
            step_noise=lambda step: self._noise("step", batch, shape, rows=size, step=step),
            batch_size=config.rollout.batch_size,
        )
        self.account.passes["student_forward"] += trajectory.passes
        return trajectory

    @torch.no_grad()
    def score(self, latents: Tensor, targets: Tensor, pool: ConditionPool, indices: Tensor) -> dict[str, Tensor]:
        """Unweighted rewards, name -> (N,) float64 on the CPU, of N latents that belong to M conditions.

        Args:
            latents: (N, C, H, W) final latents, N / M of each condition.
            targets: (M, C, H, W) the teacher's.
            indices: (M,) pool indices.
        """
        asked = pool.asked(indices.repeat_interleave(len(latents) // len(targets)))
        _, terms = self.reward(self.decode(latents), self.decode(targets), asked)
        return {name: value.double().cpu() for name, value in terms.items()}

    def _noise(self, kind: str, batch: Batch, shape: tuple[int, ...], *, rows: int, step: int = 0) -> Tensor:
        seeds = [seed_of(kind, self.config.seed, batch.iteration, int(slot), step) for slot in batch.slots]
        return noise(seeds, (rows, *shape)).flatten(0, 1)


@contextlib.contextmanager
def _scorer(device: torch.device) -> Iterator[Callable[..., Future]]:
    """A function that starts a call in another thread and, on a GPU, on another stream; its call must end on the CPU,
    so that nothing of it runs any more when its result is read."""
    if device.type != "cuda":
        with ThreadPoolExecutor(1) as executor:
            yield executor.submit
        return
    stream = torch.cuda.Stream(device)

    def run(ready: torch.cuda.Event, function: Callable, *arguments: object) -> object:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            return function(*arguments)

    with ThreadPoolExecutor(1) as executor:
        yield lambda function, *arguments: executor.submit(
            run, torch.cuda.current_stream(device).record_event(), function, *arguments
        )
