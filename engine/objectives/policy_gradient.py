"""Policy optimisation on the reward, ReDiF as it reads on paper (arXiv 2512.22802, algorithm 1): GRPO and PPO.

Conditions -> teacher targets -> rollout -> reward -> advantage -> clipped loss over shuffled (sample, step) pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from engine import ranks
from engine.collector import Batch, Samples
from engine.conditions import seed_of
from engine.config import Config
from engine.errors import ADVICE, EngineError
from engine.models.denoiser import Denoiser
from engine.rl import GaussianPolicy
from engine.rl.advantages import RunningBaseline, grpo_advantage
from engine.rl.losses import pair_loss, step_weights
from engine.rl.rewards import RewardError
from engine.rl.rollout import default_ratio_tolerance, first_pass_error
from engine.sampling import make_policy

from .contract import Context, Examples, Loss, Objective


class PolicyGradient(Objective):
    """What GRPO and PPO share: all but the baseline.

    Attributes:
        policies: the stochastic samplers that take turns, one for each place of policy.window.
        worst_ratio_error: largest |ratio - 1| before the first update of an iteration so far.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config = context.config
        self.policies = _policies(config, context.student)
        full = _policy(config, context.student)
        self.step_weights = step_weights(full, config.objective.step_weights)
        self.ratio_tolerance = config.train.ratio_tolerance or default_ratio_tolerance(full, config.precision)
        self.worst_ratio_error = 0.0
        self._iteration = 0

    @staticmethod
    def examples(config: Config, student: Denoiser) -> int:
        """(sample, step) pairs of a rank in one minibatch."""
        samples = config.rollout.conditions // ranks.world_size() * config.rollout.group_size
        return samples * int(_policies(config, student)[0].stochastic.sum()) // config.train.updates

    # ------------------------------------------------------------------ the algorithm

    def begin(self, iteration: int) -> dict[str, float]:
        """Collect the samples of an iteration and say how good each was."""
        self._iteration = iteration
        policy = self.policies[iteration % len(self.policies)]
        try:
            self._samples = self.context.collector.collect(iteration, policy)
        except RewardError as error:
            raise EngineError(f"iteration {iteration + 1}: {error}; {ADVICE}") from None
        rewards, metrics = self.rewards(self._samples)
        self._advantage = self.advantages(rewards, self._samples.batch)
        self._first_error: float | None = None
        if iteration == 0:
            self.check_first_pass(self._samples)
        return metrics

    def rewards(self, samples: Samples) -> tuple[Tensor, dict[str, float]]:
        """Rewards (samples of all ranks,) fp32 on this rank's device, and statistics of their unstandardised sum."""
        reward, terms, size = self.context.reward, samples.terms, self.context.config.rollout.group_size
        if reward.standardizer is not None:
            reward.standardizer.update(terms)
        total = reward.weighted(terms)
        metrics = {"reward/mean": total.mean().item(), "reward/std": total.std(unbiased=False).item()}
        metrics["reward/within_group_std"] = total.view(-1, size).std(1, unbiased=False).mean().item()
        for name, values in terms.items():
            metrics[f"reward/{name}"] = values.mean().item()
            metrics[f"reward/{name}_std"] = values.std(unbiased=False).item()
        return reward.total(terms).float().to(self.context.device), metrics

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        """Advantages of this rank's samples (N,) from the rewards of all ranks."""
        config, size = self.context.config, self.context.config.rollout.group_size
        advantage = self._centred(rewards, batch.iteration, scale=config.advantage.scale, clip=config.advantage.clip)
        return advantage.view(-1, size)[batch.slots].flatten()

    @abstractmethod
    def _centred(self, rewards: Tensor, iteration: int, *, scale: str, clip: float | None) -> Tensor:
        """Advantages of the samples of all ranks, by the method's baseline."""

    def check_first_pass(self, samples: Samples) -> None:
        """Score the first rollout again, all of it, before anything is trained on a ratio that is not 1."""
        student, guidance = self.context.student, self.context.config.student.guidance
        error = first_pass_error(
            student,
            samples.policy,
            samples.trajectory,
            samples.batch.condition,
            guidance=guidance,
            batch_size=min(
                self.context.config.train.micro_batch, self.examples(self.context.config, self.context.student)
            ),
        )
        self.context.account.passes["student_forward"] += len(samples.trajectory.step) * student.passes(guidance)
        self._refuse_ratio(error)

    def draw(self, role: str, number: int) -> Examples:
        """The pairs of one minibatch; each holds as many of every group."""
        train = self.context.config.train
        epoch, place = divmod(number % (train.inner_epochs * train.updates), train.updates)
        if place == 0:
            self._minibatches = list(self.minibatches(self._samples, epoch))
        return Examples({"pairs": self._minibatches[place]})

    def minibatches(self, samples: Samples, epoch: int) -> Iterator[Tensor]:
        """Pair indices (pairs of a rank / updates,) of each optimizer step of an inner epoch.

        Each group's pairs are shuffled by a generator of their own and dealt out evenly, so a minibatch is the same set
        of pairs on one rank and on many.
        """
        config, slots, pairs = self.context.config, samples.batch.slots, len(samples.trajectory.step)
        groups, size = len(slots), config.rollout.group_size
        stochastic_steps = pairs // (groups * size)
        pairs = torch.arange(pairs).view(stochastic_steps, groups, size)
        by_group = pairs.transpose(0, 1).reshape(groups, -1)
        order = [
            torch.randperm(by_group.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in (seed_of("shuffle", config.seed, samples.batch.iteration, epoch, int(slot)) for slot in slots)
        ]
        shuffled = by_group.gather(1, torch.stack(order)).to(self.context.device)
        for minibatch in shuffled.chunk(config.train.updates, dim=1):
            yield minibatch.flatten()

    def loss(self, role: str, examples: Examples) -> Loss:
        """The clipped loss of a micro-batch of pairs."""
        config, samples = self.context.config, self._samples
        result = pair_loss(
            self.context.student,
            samples.policy,
            samples.trajectory,
            examples["pairs"],
            samples.batch.condition,
            self._advantage,
            guidance=config.student.guidance,
            clip_range=config.objective.clip_range,
            reference=self.context.reference,
            kl_coef=config.objective.kl_coef,
            kl_kind=config.objective.kl_kind,
            kl_alpha=config.objective.kl_alpha,
            weights=self.step_weights,
        )
        self._count(len(examples))
        return Loss(
            result.loss,
            figures={"loss/clip_fraction": result.clip_fraction, "loss/kl": result.kl.mean()},
            worst={"ratio/error": (result.ratio - 1).abs().max()},
        )

    def check(self, figures: Mapping[str, float]) -> None:
        """The first step of an iteration is on-policy: its ratio is 1."""
        if self._first_error is None:
            self._first_error = figures["ratio/error"]
            self._refuse_ratio(self._first_error)

    def end(self) -> dict[str, float]:
        error = ranks.gather(torch.tensor([self._first_error], dtype=torch.float64)).max().item()
        self.worst_ratio_error = max(self.worst_ratio_error, error)
        std = ranks.gather(self._advantage).std(unbiased=False).item()
        del self._samples, self._advantage, self._minibatches
        return {"advantage/std": std, "ratio/first_pass_error": error}

    def state_dict(self) -> dict[str, Tensor]:
        return {"worst_ratio_error": torch.tensor(self.worst_ratio_error, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.worst_ratio_error = state["worst_ratio_error"].item()

    def _refuse_ratio(self, error: float) -> None:
        tolerance = self.ratio_tolerance
        if not error <= tolerance:
            raise EngineError(
                f"iteration {self._iteration + 1}: |ratio - 1| before the first update is {error:.3g}, beyond "
                f"train.ratio_tolerance={tolerance:g}; rollout and update do not agree, so no gradient would be right. "
                "Raise the tolerance only if the network itself is that inexact (low precision, batch-dependent layers)"
            )

    def _count(self, pairs: int) -> None:
        evaluations = pairs * self.context.student.passes(self.context.config.student.guidance)
        passes = self.context.account.passes
        passes["student_forward"] += evaluations
        passes["student_backward"] += evaluations
        if self.context.reference is not None:
            passes["reference"] += evaluations


class Grpo(PolicyGradient):
    """The baseline is the mean of the group."""

    kind: ClassVar[str] = "grpo"

    def _centred(self, rewards: Tensor, iteration: int, *, scale: str, clip: float | None) -> Tensor:
        return grpo_advantage(rewards, self.context.config.rollout.group_size, scale=scale, clip=clip)


class Ppo(PolicyGradient):
    """The baseline is a running mean of the condition's earlier rewards."""

    kind: ClassVar[str] = "ppo"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        config = context.config
        self.baseline = RunningBaseline(config.rollout.pool, decay=config.objective.baseline_decay)

    def _centred(self, rewards: Tensor, iteration: int, *, scale: str, clip: float | None) -> Tensor:
        config = self.context.config
        indices = self.context.pool.draw(config.rollout.conditions, iteration=iteration)
        return self.baseline.advantage(
            rewards, indices.repeat_interleave(config.rollout.group_size), scale=scale, clip=clip
        )

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.baseline.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.baseline.load_state_dict({name: state[name] for name in self.baseline.state_dict()})


def _policies(config: Config, student: Denoiser) -> list[GaussianPolicy]:
    window, full = config.policy.window, _policy(config, student)
    if window is None:
        return [full]
    candidates = full.stochastic.nonzero().flatten().tolist()
    places = range(len(candidates) - window + 1)
    return [_policy(config, student, candidates[start : start + window]) for start in places]


def _policy(config: Config, student: Denoiser, stochastic_steps: list[int] | None = None) -> GaussianPolicy:
    return make_policy(
        student, config.policy.kind, config.student.steps, config.policy.eta, stochastic_steps=stochastic_steps
    )
