"""The trainer: ReDiF as it reads on paper (arXiv 2512.22802, algorithm 1).

Conditions -> teacher targets -> rollout -> reward -> advantage -> clipped loss over shuffled (sample, step) pairs.
Every random number is addressed by (seed, iteration, condition, step), never streamed, so that ranks, batch sizes and
resumption change nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import checkpoint, ranks, zero
from engine.account import Account
from engine.averaging import AveragedWeights
from engine.collector import Batch, Collector, Samples
from engine.conditions import ConditionPool, Source, seed_of
from engine.config import Config
from engine.errors import EngineError
from engine.models.denoiser import Denoiser
from engine.rl import GaussianPolicy
from engine.rl.advantages import RunningBaseline, grpo_advantage
from engine.rl.losses import pair_loss, step_weights
from engine.rl.rewards import CompositeReward, RewardError
from engine.rl.rollout import default_ratio_tolerance, first_pass_error
from engine.roles import Roles
from engine.sampling import deterministic_policy, make_policy, sample
from engine.teacher_cache import TeacherCache

_ADVICE = "nothing was updated with it. Lower optimizer.lr, or look at the last rows of metrics.jsonl"


class Trainer:
    """Trains one student.

    Args:
        config: of the run.
        roles: the networks on this rank's device; the student's is trained, in place.
        sources: what the conditions of each split ask for.
        reward: scores images against the teacher's.
        cache_folder: of the teacher's target latents.
    """

    def __init__(
        self, config: Config, roles: Roles, sources: Mapping[str, Source], reward: CompositeReward, cache_folder: Path
    ) -> None:
        self.config = config
        self.device = ranks.device()
        self.reward = reward
        student, settings = roles.student, config.evaluation
        self.pool = ConditionPool(
            "train", config.seed, config.rollout.pool, sources["train"], roles.teacher.latent_shape
        )
        self.held_out = ConditionPool(
            "held_out", settings.seed, settings.held_out, sources["held_out"], roles.teacher.latent_shape
        )
        self.policies = self._policies(student)
        self.step_weights = step_weights(self._policy(student), config.objective.step_weights)
        self.ratio_tolerance = config.train.ratio_tolerance or default_ratio_tolerance(
            self._policy(student), config.precision
        )
        self.reference = roles.reference
        self.engine = zero.initialize(
            config,
            student.network,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            world_size=ranks.world_size(),
        )
        self.student = student.with_network(self.engine)
        self.averaged = AveragedWeights(self.engine, config.ema.decay)
        self.baseline = RunningBaseline(config.rollout.pool, decay=config.objective.baseline_decay)
        self.iteration = 0
        self.worst_ratio_error = 0.0
        self.forget_best()
        self.account = Account()
        targets = TeacherCache(
            cache_folder,
            roles.teacher,
            roles.weights,
            steps=config.teacher.steps,
            guidance=config.teacher.guidance,
            batch_size=config.rollout.batch_size,
        )
        self.collector = Collector(config, self.student, self.pool, targets, reward, roles.decode, self.account)

    def start_from_here(self) -> None:
        """Take the student as it is for the initial one: of the average, and of the reference if it has weights of its
        own."""
        self.averaged = AveragedWeights(self.engine, self.config.ema.decay)
        if self._cloned_reference is not None:
            self._cloned_reference.load_state_dict(self.averaged.values, strict=False)

    # ------------------------------------------------------------------ the algorithm

    def train_iteration(self) -> dict[str, float]:
        """One iteration; returns its metrics."""
        with self.account.settled() as costs:
            policy = self.policies[self.iteration % len(self.policies)]
            try:
                samples = self.collector.collect(self.iteration, policy)
            except RewardError as error:
                raise EngineError(f"iteration {self.iteration + 1}: {error}; {_ADVICE}") from None
            rewards, metrics = self.rewards(samples)
            advantage = self.advantages(rewards, samples.batch)
            if self.iteration == 0:
                self.check_first_pass(samples)
            with self.account.timed("update"):
                metrics |= self.update(samples, advantage)
            self.averaged.follow()
            self.iteration += 1
        return {"iteration": self.iteration, **metrics, **costs}

    def rewards(self, samples: Samples) -> tuple[Tensor, dict[str, float]]:
        """Rewards (samples of all ranks,) fp32 on this rank's device, and statistics of their unstandardised sum."""
        terms, size = samples.terms, self.config.rollout.group_size
        if self.reward.standardizer is not None:
            self.reward.standardizer.update(terms)
        total = self.reward.weighted(terms)
        metrics = {"reward/mean": total.mean().item(), "reward/std": total.std(unbiased=False).item()}
        metrics["reward/within_group_std"] = total.view(-1, size).std(1, unbiased=False).mean().item()
        for name, values in terms.items():
            metrics[f"reward/{name}"] = values.mean().item()
            metrics[f"reward/{name}_std"] = values.std(unbiased=False).item()
        return self.reward.total(terms).float().to(self.device), metrics

    def advantages(self, rewards: Tensor, batch: Batch) -> Tensor:
        """Advantages of this rank's samples (N,) from the rewards of all ranks."""
        config, size = self.config, self.config.rollout.group_size
        scaling = {"scale": config.advantage.scale, "clip": config.advantage.clip}
        if config.objective.kind == "ppo":
            indices = self.pool.draw(config.rollout.conditions, iteration=self.iteration).repeat_interleave(size)
            advantage = self.baseline.advantage(rewards, indices, **scaling)
        else:
            advantage = grpo_advantage(rewards, size, **scaling)
        return advantage.view(-1, size)[batch.slots].flatten()

    def check_first_pass(self, samples: Samples) -> None:
        """Score the first rollout again, all of it, before anything is trained on a ratio that is not 1."""
        error = first_pass_error(
            self.student,
            samples.policy,
            samples.trajectory,
            samples.batch.condition,
            guidance=self.config.student.guidance,
            batch_size=self.micro_batch,
        )
        self.account.passes["student_forward"] += len(samples.trajectory.step) * self.student.passes(self._guidance)
        self._refuse_ratio(error)

    def update(self, samples: Samples, advantage: Tensor) -> dict[str, float]:
        """Inner epochs over the shuffled pairs; every minibatch holds as many pairs of each group."""
        config = self.config
        lr = zero.learning_rate(config, self.iteration)
        zero.set_learning_rate(self.engine, lr)
        figures, norms, first_error = [], [], None
        for epoch in range(config.train.inner_epochs):
            for minibatch in self.minibatches(samples, epoch):
                parts, errors = [], []
                for pairs in minibatch.split(self.micro_batch):
                    result = pair_loss(
                        self.student,
                        samples.policy,
                        samples.trajectory,
                        pairs,
                        samples.batch.condition,
                        advantage,
                        guidance=self._guidance,
                        clip_range=config.objective.clip_range,
                        reference=self.reference,
                        kl_coef=config.objective.kl_coef,
                        kl_kind=config.objective.kl_kind,
                        kl_alpha=config.objective.kl_alpha,
                        weights=self.step_weights,
                    )
                    share = len(pairs) / len(minibatch)
                    parts.append(torch.stack([result.loss.detach(), result.clip_fraction, result.kl.mean()]) * share)
                    errors.append((result.ratio - 1).abs().max())
                    self._count_update(len(pairs))
                    # DeepSpeed divides by the accumulation steps; the last micro-batch may be smaller than the others.
                    self.engine.backward(result.loss * share * self.accumulation)
                    if len(parts) == self.accumulation:
                        # Once an optimizer step, and before it: reading a figure makes the host wait for the GPU.
                        *figure, error = torch.stack([*torch.stack(parts).sum(0), torch.stack(errors).max()]).tolist()
                        if first_error is None:
                            first_error = error
                            self._refuse_ratio(error)
                        self._refuse_non_finite_loss(figure[0])
                        figures.append(figure)
                    norm = zero.step(self.engine)
                norms.append(norm)
        steps = config.train.inner_epochs * config.train.updates
        names = ("loss/loss", "loss/clip_fraction", "loss/kl")
        metrics = {name: sum(column) / steps for name, column in zip(names, zip(*figures, strict=True), strict=True)}
        metrics["grad_norm"] = float(sum(norms)) / len(norms)
        # in fp16 an overflow is the loss scale's business; DeepSpeed reports -1 for a norm that is not finite
        if config.precision != "fp16" and not 0 <= metrics["grad_norm"] < math.inf:
            raise EngineError(
                f"iteration {self.iteration + 1}: the gradient is not finite under a finite loss, and the weights are "
                "lost to it; go on from the last checkpoint (resume=auto) with a lower optimizer.lr"
            )
        metrics["advantage/std"] = ranks.gather(advantage).std(unbiased=False).item()
        metrics = self._mean(metrics)
        first_error = self._max(first_error)
        self.worst_ratio_error = max(self.worst_ratio_error, first_error)
        return {**metrics, "ratio/first_pass_error": first_error, "lr": lr}

    def minibatches(self, samples: Samples, epoch: int) -> Iterator[Tensor]:
        """Pair indices (pairs of a rank / updates,) of each optimizer step of an inner epoch.

        Each group's pairs are shuffled by a generator of their own and dealt out evenly, so a minibatch is the same set
        of pairs on one rank and on many.
        """
        slots, pairs = samples.batch.slots, len(samples.trajectory.step)
        groups, size = len(slots), self.config.rollout.group_size
        stochastic_steps = pairs // (groups * size)
        pairs = torch.arange(pairs).view(stochastic_steps, groups, size)
        by_group = pairs.transpose(0, 1).reshape(groups, -1)
        order = [
            torch.randperm(by_group.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in (seed_of("shuffle", self.config.seed, self.iteration, epoch, int(slot)) for slot in slots)
        ]
        shuffled = by_group.gather(1, torch.stack(order)).to(self.device)
        for minibatch in shuffled.chunk(self.config.train.updates, dim=1):
            yield minibatch.flatten()

    # ------------------------------------------------------------------ held-out reward and checkpoints

    @torch.no_grad()
    def evaluate_held_out(self) -> dict[str, float]:
        """The averaged student's eta = 0 reward on held-out conditions."""
        config, pool = self.config, self.held_out
        mine = torch.arange(pool.size)[ranks.share(pool.size)]
        policy = deterministic_policy(self.student, config.student.steps)
        parts = []
        with self.account.settled(), self.averaged.installed():
            for indices in mine.split(config.rollout.batch_size or len(mine)):
                targets = self.collector.teacher_latents(pool, indices, role="evaluation")
                final, passes = sample(self.student, policy, pool, indices, guidance=self._guidance, device=self.device)
                self.account.passes["evaluation"] += passes
                try:
                    parts.append(self.collector.score(final, targets, pool, indices))
                except RewardError as error:
                    raise EngineError(
                        f"iteration {self.iteration}, on held-out conditions: {error}; {_ADVICE}"
                    ) from None
        terms = {name: ranks.gather(torch.cat([part[name] for part in parts])) for name in parts[0]}
        return {"reward/held_out_eta0": self.reward.weighted(terms).mean().item()}

    def forget_best(self) -> None:
        """No iteration is the best one so far."""
        self.best: dict[str, float] = {"iteration": 0, "reward": -math.inf}

    def save(self, folder: Path, teacher_fingerprint: str) -> None:
        """Write everything that an exact continuation needs; every rank calls it."""
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        if ranks.is_first():
            save_file(self.averaged.values, folder / "ema.safetensors")
            save_file(self.baseline.state_dict(), folder / "baseline.safetensors")
            if self._cloned_reference is not None:
                values = {name: value.contiguous() for name, value in self._cloned_reference.state_dict().items()}
                save_file(values, folder / "reference.safetensors")
            state = {
                "iteration": self.iteration,
                "config": self.config.as_dict(),
                "teacher": teacher_fingerprint,
                "world_size": ranks.world_size(),
                "best": self.best,
                "reward": None if self.reward.standardizer is None else self.reward.standardizer.state_dict(),
                "worst_ratio_error": self.worst_ratio_error,
                "passes": dict(self.account.passes),
                "seconds": dict(self.account.seconds),
            }
            (folder / "trainer.json").write_text(json.dumps(state, indent=2))

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that `engine.checkpoint.check_compatible` accepted."""
        state = checkpoint.read_state(folder)
        if not (folder / "deepspeed").is_dir():
            raise EngineError(f"checkpoint {folder} has no DeepSpeed state; resume from another")
        try:
            loaded, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
            self.averaged.load(load_file(folder / "ema.safetensors"))
            self.baseline.load_state_dict(load_file(folder / "baseline.safetensors"))
            if self._cloned_reference is not None:
                self._cloned_reference.load_state_dict(load_file(folder / "reference.safetensors"))
            if self.reward.standardizer is not None:
                self.reward.standardizer.load_state_dict(state["reward"])
        except Exception as error:  # torch, safetensors and DeepSpeed raise many kinds for cut or foreign files
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise EngineError(f"checkpoint {folder} cannot be read: {reason}; resume from another") from None
        if loaded is None:
            raise EngineError(f"checkpoint {folder} has no DeepSpeed state that this run can read; resume from another")
        self.iteration = state["iteration"]
        self.best = state["best"]
        self.worst_ratio_error = state["worst_ratio_error"]
        self.account.restore(state["passes"], state["seconds"])

    # ------------------------------------------------------------------ sizes, rates and checks

    @property
    def micro_batch(self) -> int:
        """Pairs in one forward pass of a rank."""
        return min(self.config.train.micro_batch, self._minibatch_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return math.ceil(self._minibatch_size / self.micro_batch)

    @property
    def _cloned_reference(self) -> nn.Module | None:
        """The reference's own network in a run that clones, whose initial student is in no directory."""
        own = self.reference is not None and self.reference.network is not self.engine.module
        return self.reference.network if own and self.config.cloning.iterations else None

    @property
    def _minibatch_size(self) -> int:
        stochastic = int(self.policies[0].stochastic.sum())
        samples = self.config.rollout.conditions // ranks.world_size() * self.config.rollout.group_size
        return samples * stochastic // self.config.train.updates

    @property
    def _guidance(self) -> float:
        return self.config.student.guidance

    def _policies(self, student: Denoiser) -> list[GaussianPolicy]:
        config, full = self.config, self._policy(student)
        candidates = full.stochastic.nonzero().flatten().tolist()
        if config.policy.window is None:
            return [full]
        starts = range(len(candidates) - config.policy.window + 1)
        return [self._policy(student, candidates[start : start + config.policy.window]) for start in starts]

    def _policy(self, student: Denoiser, stochastic_steps: list[int] | None = None) -> GaussianPolicy:
        config = self.config
        return make_policy(
            student, config.policy.kind, config.student.steps, config.policy.eta, stochastic_steps=stochastic_steps
        )

    def _refuse_ratio(self, error: float) -> None:
        tolerance = self.ratio_tolerance
        if not error <= tolerance:
            raise EngineError(
                f"iteration {self.iteration + 1}: |ratio - 1| before the first update is {error:.3g}, beyond "
                f"train.ratio_tolerance={tolerance:g}; rollout and update do not agree, so no gradient would be right. "
                "Raise the tolerance only if the network itself is that inexact (low precision, batch-dependent layers)"
            )

    def _refuse_non_finite_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise EngineError(f"iteration {self.iteration + 1}: the loss is {loss}; {_ADVICE}")

    def _count_update(self, pairs: int) -> None:
        evaluations = pairs * self.student.passes(self._guidance)
        self.account.passes["student_forward"] += evaluations
        self.account.passes["student_backward"] += evaluations
        if self.reference is not None:
            self.account.passes["reference"] += evaluations

    def _max(self, value: float) -> float:
        return ranks.gather(torch.tensor([value], dtype=torch.float64)).max().item()

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        table = ranks.gather(torch.tensor([list(metrics.values())], dtype=torch.float64))
        return dict(zip(metrics, table.mean(0).tolist(), strict=True))
