"""One run in the plane: a one-step generator learns the target by VarDiU or by Diff-Instruct.

Losses, noise levels and posteriors are the engine's own; only networks and loop are this package's.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.models.posterior import FlowPosterior, GaussianPosterior, MixturePosterior
from engine.objectives.score_matching import matching_gradient, matching_loss
from engine.objectives.vardiu import annealed_level, bound_loss, level_weight

from .networks import NOISE, SPREAD, Denoiser, Generator, Posterior
from .target import Mixture

HEADS: dict[str, Callable[[], nn.Module]] = {
    "gaussian": lambda: GaussianPosterior(NOISE),
    "mixture": lambda: MixturePosterior(NOISE, components=8),
    "flow": lambda: FlowPosterior(NOISE, layers=2, components=4, width=32, image=False),
}


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        head: VarDiU with this posterior of HEADS; None: Diff-Instruct.
        updates: steps of the posterior or of the critic for each of the generator.
        lr: of the generator; after Schedule.hold it falls to 0 along a cosine, as helper_lr does.
        helper_lr: of posterior or critic.
        longer: factor on the schedule's steps.
    """

    head: str | None
    updates: int
    lr: float
    helper_lr: float
    longer: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """What all methods share.

    Attributes:
        steps: of the generator, where a method does not ask for more.
        batch: samples of a step.
        width: of all networks.
        low, high: noise levels.
        power: of `annealed_level`.
        weight: of `level_weight`, by sigma / high.
        ramp: share of the run after which the power stays.
        hold: share of the run after which the learning rates fall.
        decay: of the generator's averaged weights, which are judged.
        critic_start: steps of regression on the exact denoiser that a critic starts with.
    """

    steps: int
    batch: int
    width: int
    low: float
    high: float
    power: tuple[float, float]
    weight: str
    ramp: float
    hold: float
    decay: float
    critic_start: int


@dataclass(frozen=True)
class Result:
    """Of one run.

    Attributes:
        generator: with averaged weights.
        seconds: of the processor.
        passes: role -> network evaluations of one sample, a backward pass as 2; the critic's start is left out.
    """

    generator: Generator
    seconds: float
    passes: dict[str, int]


def train(
    method: Method, schedule: Schedule, target: Mixture, seed: int, watch: Callable[[int, Generator], None]
) -> Result:
    """One run.

    Args:
        target: its exact score is the teacher's.
        watch: called after every tenth of the steps, with their number and the averaged generator.
    """
    began = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run = _Run(method, schedule, target)
        averaged = copy.deepcopy(run.generator).requires_grad_(False)
        steps = round(schedule.steps * method.longer)
        for step in range(steps):
            run.step(step / steps)
            share = 1 - min(schedule.decay, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, value in zip(averaged.parameters(), run.generator.parameters(), strict=True):
                    mean.lerp_(value, share)
            if (step + 1) * 10 % steps < 10:
                watch(step + 1, averaged)
    return Result(averaged, time.process_time() - began, run.passes)


class _Run:
    def __init__(self, method: Method, schedule: Schedule, target: Mixture) -> None:
        self.method, self.schedule, self.target = method, schedule, target
        self.generator = Generator(schedule.width)
        if method.head is None:
            self.helper: nn.Module = Denoiser(schedule.width)
            self._start_critic()
        else:
            self.helper = Posterior(HEADS[method.head](), schedule.width)
        networks = (self.generator, self.helper)
        self.optimizers = {network: torch.optim.Adam(network.parameters(), fused=True) for network in networks}
        self.passes = dict.fromkeys(("generator", "posterior" if method.head else "critic", "teacher"), 0)

    def step(self, progress: float) -> None:
        """One step of the generator, and those of posterior or critic that belong to it."""
        hold = self.schedule.hold
        share = (1 + math.cos(math.pi * max(0.0, (progress - hold) / (1 - hold)))) / 2
        for (_, optimizer), lr in zip(self.optimizers.items(), (self.method.lr, self.method.helper_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * share
        (self._diff_instruct if self.method.head is None else self._vardiu)(progress)

    def _vardiu(self, progress: float) -> None:
        for _ in range(self.method.updates - 1):
            with torch.no_grad():
                z, _, _, sigma, x = self._noised(progress)
            self._descend(self.helper, -self.helper(z, x, sigma).mean())
            self._count(generator=1, posterior=3)
        # The last step of the posterior shares its samples with the generator's, as in the paper's code.
        z, image, noise, sigma, x = self._noised(progress)
        log_posterior = self.helper(z, x, sigma)
        score = self.target.score(x.detach(), sigma)
        bound = bound_loss(log_posterior, score, image, noise, torch.ones_like(sigma), sigma)
        loss = (level_weight(sigma / self.schedule.high, self.schedule.weight) * bound).mean()
        gradient = torch.autograd.grad(loss, list(self.generator.parameters()), retain_graph=True)
        self._descend(self.helper, -log_posterior.mean())
        self._move(self.generator, gradient)
        self._count(generator=3, posterior=4, teacher=1)

    def _diff_instruct(self, progress: float) -> None:
        for _ in range(self.method.updates):
            with torch.no_grad():
                _, image, _, sigma, x = self._noised(progress)
            self._descend(self.helper, _denoising_loss(self.helper(x, sigma), image, sigma))
            self._count(generator=1, critic=3)
        _, image, _, sigma, x = self._noised(progress)
        with torch.no_grad():
            real, fake = self.target.denoise(x, sigma), self.helper(x, sigma)
            gradient = matching_gradient(image, real, fake, torch.ones_like(sigma), sigma, normaliser="none")
            gradient *= level_weight(sigma / self.schedule.high, self.schedule.weight).unsqueeze(1)
        self._descend(self.generator, matching_loss(image, gradient))
        self._count(generator=3, critic=1, teacher=1)

    def _noised(self, progress: float) -> tuple[Tensor, ...]:
        """Noise z, samples of it, the noise they get, its levels (N,), and the noised samples."""
        schedule = self.schedule
        z, noise = torch.randn(schedule.batch, NOISE), torch.randn(schedule.batch, 2)
        uniform = torch.rand(schedule.batch)
        sigma = annealed_level(uniform, min(progress / schedule.ramp, 1.0), schedule.low, schedule.high, schedule.power)
        image = self.generator(z)
        return z, image, noise, sigma, image + sigma.unsqueeze(1) * noise

    def _descend(self, network: nn.Module, loss: Tensor) -> None:
        self._move(network, torch.autograd.grad(loss, list(network.parameters())))

    def _move(self, network: nn.Module, gradient: Sequence[Tensor]) -> None:
        for parameter, value in zip(network.parameters(), gradient, strict=True):
            parameter.grad = value
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        self.optimizers[network].step()

    def _start_critic(self) -> None:
        """Regression on the exact denoiser at noised samples of the target, over log-uniform levels."""
        schedule = self.schedule
        optimizer = torch.optim.Adam(self.helper.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        for _ in range(schedule.critic_start):
            image = self.target.sample(schedule.batch, generator)
            sigma = schedule.low * (schedule.high / schedule.low) ** torch.rand(schedule.batch, generator=generator)
            x = image + sigma.unsqueeze(1) * torch.randn(image.shape, generator=generator)
            optimizer.zero_grad()
            _denoising_loss(self.helper(x, sigma), self.target.denoise(x, sigma), sigma).backward()
            optimizer.step()

    def _count(self, **passes: int) -> None:
        for role, number in passes.items():
            self.passes[role] += number * self.schedule.batch


def _denoising_loss(prediction: Tensor, image: Tensor, sigma: Tensor) -> Tensor:
    """Weighted as in EDM, (sigma^2 + spread^2) / (sigma spread)^2."""
    weight = (sigma**2 + SPREAD**2) / (sigma * SPREAD) ** 2
    return (weight * (prediction - image).square().sum(1)).mean()
