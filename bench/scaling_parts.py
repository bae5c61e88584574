"""The parts of an iteration, each called alone and timed: what bench.scaling's prediction is the sum of."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cost_model import Job, rollout_calls, update_calls
from engine import zero
from engine.conditions import noise
from engine.kernels import policy_sample
from engine.rl.rollout import coefficients, predict_step
from engine.trainer import Trainer

REPEATS = 4


class Parts:
    """Least seconds of an iteration's parts, and the work of a network pass.

    Args:
        trainer: of the iteration.
        jobs: whose batches are timed.
        now: a clock.

    Attributes:
        forward, training, reward: batch -> seconds of a step of a rollout, of a forward and backward pass, of a reward.
        noise: seconds of one sample's noise for one step.
        step: seconds of an optimizer step and of the average.
        flops: of a network pass.
    """

    def __init__(self, trainer: Trainer, jobs: Iterable[Job], now: Callable[[], float]) -> None:
        policy, shape = trainer.objective.policies[0], trainer.pool.latent_shape
        plain = trainer.student.with_network(trainer.engine.module)
        self.now = now

        def conditions(size: int) -> tuple:
            return (
                torch.randn(size, *shape),
                torch.zeros(size, dtype=torch.int64),
                trainer.pool.condition(torch.arange(size)),
            )

        def draw(size: int) -> Callable[[], object]:
            x, step, condition = conditions(size)

            def call() -> None:
                pred = predict_step(plain, policy, x, step, condition, 1.0)[0]
                policy_sample(x, pred, *coefficients(policy, step), noise=x)

            return torch.no_grad()(call)

        def train(size: int) -> Callable[[], object]:
            x, step, condition = conditions(size)

            def call() -> None:
                plain.network.zero_grad()
                predict_step(plain, policy, x, step, condition, 1.0)[0].square().mean().backward()

            return call

        def reward(size: int) -> Callable[[], object]:
            groups = size // trainer.config.rollout.group_size
            latents, targets, indices = torch.randn(size, *shape), torch.randn(groups, *shape), torch.arange(groups)
            return lambda: trainer.collector.score(latents, targets, trainer.pool, indices)

        jobs = list(jobs)
        self.forward = self._by_size(draw, (size for job in jobs for size in [*rollout_calls(job), job.groups]))
        self.training = self._by_size(train, (size for job in jobs for size in update_calls(job)))
        self.reward = self._by_size(reward, (job.samples for job in jobs))
        self.noise = self._least(lambda: noise(list(range(16)), (8, *shape))) / 128
        self.step = self._least(_step(trainer))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predict_step(plain, policy, torch.randn(1, *shape), 0, trainer.pool.condition(torch.zeros(1).long()), 1.0)
        self.flops = counter.get_total_flops()
        plain.network.zero_grad()

    def predict(self, job: Job, teacher_steps: int) -> dict[str, float]:
        """Seconds of an iteration of a rank, by phase.

        Args:
            teacher_steps: for each of its conditions; 0 where the targets are cached.
        """
        noises = job.samples * job.window * self.noise
        return {
            "teacher": teacher_steps * self.forward[job.groups],
            "rollout": sum(self.forward[size] for size in rollout_calls(job)) + noises,
            "reward": self.reward[job.samples],
            "update": sum(self.training[size] for size in update_calls(job)) + job.updates * self.step,
        }

    def as_dict(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "now"}

    def _by_size(self, make: Callable[[int], Callable[[], object]], sizes: Iterable[int]) -> dict[int, float]:
        return {size: self._least(make(size)) for size in sorted(set(sizes))}

    def _least(self, function: Callable[[], object]) -> float:
        times = []
        for _ in range(REPEATS + 1):
            started = self.now()
            function()
            times.append(self.now() - started)
        return min(times[1:])


def _step(trainer: Trainer) -> Callable[[], object]:
    """AdamW with clipping, and the average, on copies of the weights."""
    copies = [torch.nn.Parameter(p.detach().clone()) for _, p in zero.full_parameters(trainer.engine)]
    averaged = [p.detach().clone() for p in copies]
    for parameter in copies:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(copies)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(averaged, copies, strict=True):
                mean.lerp_(value, 0.1)

    return call
