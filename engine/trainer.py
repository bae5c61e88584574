"""The trainer: it steps the optimizers of the student and of the objectives' roles, averages, judges and saves.

What is learned from is the objectives' matter (`engine.objectives`). Every random number is addressed by its place in
the run, never streamed, so that ranks, batch sizes and resumption change nothing.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import checkpoint, ranks, zero
from engine.account import Account
from engine.averaging import AveragedWeights
from engine.collector import Collector
from engine.conditions import ConditionPool, Source
from engine.config import Config
from engine.errors import ADVICE, EngineError
from engine.learner import Learner
from engine.objectives.contract import STUDENT, Context, Examples, Objective
from engine.objectives.policy_gradient import PolicyGradient
from engine.parts import Part, Parts, load_engine, save_engine
from engine.rl.rewards import CompositeReward, RewardError
from engine.roles import Roles
from engine.sampling import sample, student_policy
from engine.teacher_cache import TeacherCache


class Trainer:
    """Trains one student.

    Args:
        config: of the run.
        roles: the networks on this rank's device; the student's is trained, in place.
        sources: what the conditions of each split ask for.
        reward: scores images against the teacher's.
        cache_folder: of the teacher's target latents.

    Attributes:
        parts: kind -> objective with its networks, objective.kind first.
        examples: of a rank in one optimizer step of objective.kind.
        engine: the student's DeepSpeed engine.
        student: the denoiser around it.
        averaged: the running mean of its weights.
        iteration: iterations done.
    """

    def __init__(
        self, config: Config, roles: Roles, sources: Mapping[str, Source], reward: CompositeReward, cache_folder: Path
    ) -> None:
        self.config = config
        self.device = ranks.device()
        self.reward = reward
        self.reference = roles.reference
        shape, settings = roles.teacher.latent_shape, config.evaluation
        self.pool = ConditionPool("train", config.seed, config.rollout.pool, sources["train"], shape)
        self.held_out = ConditionPool("held_out", settings.seed, settings.held_out, sources["held_out"], shape)
        parts = Parts(config, roles)  # before the student is DeepSpeed's, which may partition it
        self.examples = parts.examples
        self.learner = Learner(
            config, roles.student.network, micro_batch=parts.micro_batch, accumulation=parts.accumulation
        )
        self.engine = self.learner.engine
        self.student = roles.student.with_network(self.engine)
        self.averaged = AveragedWeights(self.engine, config.ema.decay)
        self.account = Account(parts.passes)
        targets = TeacherCache(
            cache_folder,
            roles.teacher,
            roles.weights,
            steps=config.teacher.steps,
            guidance=config.teacher.guidance,
            batch_size=config.rollout.batch_size,
        )
        self.collector = Collector(config, self.student, self.pool, targets, reward, roles.decode, self.account)
        self.parts = parts.make(
            lambda kind, networks, band: kind(
                Context(
                    config=config,
                    pipeline=roles.pipeline,
                    teacher=roles.teacher,
                    student=self.student,
                    reference=self.reference,
                    networks=networks,
                    pool=self.pool,
                    targets=targets,
                    reward=reward,
                    decode=roles.decode,
                    collector=self.collector,
                    account=self.account,
                    device=self.device,
                    band=band,
                    models=roles.models,
                )
            )
        )
        for part in self.parts.values():
            part.objective.start()
        self.iteration = 0
        self.forget_best()

    # ------------------------------------------------------------------ the algorithm

    def start_from_here(self) -> None:
        """Take the student as it is for the initial one: of the average, of the reference if it has weights of its own,
        and of the objectives."""
        self.averaged = AveragedWeights(self.engine, self.config.ema.decay)
        if self._cloned_reference is not None:
            self._cloned_reference.load_state_dict(self.averaged.values, strict=False)
        for part in self.parts.values():
            part.objective.start()

    def train_iteration(self) -> dict[str, float]:
        """One iteration; returns its metrics."""
        with self.account.settled() as costs:
            parts = self.acting(self.iteration)
            metrics: dict[str, float] = {}
            for part in parts:
                metrics |= part.objective.begin(self.iteration)
            with self.account.timed("update"):
                metrics |= self.update(parts)
            for part in parts:
                metrics |= part.objective.end()
            self.averaged.follow()
            self.iteration += 1
        return {"iteration": self.iteration, **metrics, **costs}

    def acting(self, iteration: int) -> list[Part]:
        """Who acts in an iteration, counted from 0: all, or the one whose turn it is."""
        turns = self.config.objective.turns
        if turns is None:
            return list(self.parts.values())
        order = [kind for kind in self.parts for _ in range(turns[kind])]
        return [self.parts[order[iteration % len(order)]]]

    def update(self, parts: Sequence[Part]) -> dict[str, float]:
        """The optimizer steps of an iteration; returns their mean figures."""
        share = zero.learning_rate_share(self.config, self.iteration)
        for learner in self._learners():
            learner.set_learning_rate(share)
        rows: dict[str, list[float]] = defaultdict(list)
        for step in range(self.steps):
            number = self.iteration * self.steps + step
            for part in parts:
                order = part.objective.before_student()
                for place, role in enumerate(order):
                    turn = number * order.count(role) + order[:place].count(role)
                    _append(rows, self._step(part.learners[role], role, [part], turn))
            _append(rows, self._step(self.learner, STUDENT, parts, number))
        return self._mean({name: sum(values) / len(values) for name, values in rows.items()}) | {
            "lr": self.config.optimizer.lr * share
        }

    def _step(self, learner: Learner, role: str, parts: Sequence[Part], number: int) -> dict[str, float]:
        """One optimizer step of a role; returns its figures."""
        sums: dict[str, list[Tensor]] = defaultdict(list)
        largest: dict[str, list[Tensor]] = defaultdict(list)
        figures: dict[str, float] = {}

        def propagated(part: Part, examples: Examples, share: float) -> Tensor:
            result = part.objective.loss(role, examples)
            weight = part.weight if role == STUDENT else 1.0
            names = {f"loss/{part.objective.kind}": result.loss} if role == STUDENT and len(parts) > 1 else {}
            for name, value in {**names, **result.figures}.items():
                sums[name].append(value.detach() * share)
            for name, value in result.worst.items():
                largest[name].append(value)
            sums[total].append(result.loss.detach() * (weight * share))
            return result.loss * (weight * share)

        def look() -> None:
            # Once an optimizer step, and before it: reading a figure makes the host wait for the GPU.
            names = [*sums, *largest]
            values = [torch.stack(v).sum() for v in sums.values()] + [torch.stack(v).max() for v in largest.values()]
            figures.update(zip(names, torch.stack([value.float() for value in values]).tolist(), strict=True))
            if not math.isfinite(figures[total]):
                raise EngineError(f"iteration {self.iteration + 1}: the loss{of} is {figures[total]}; {ADVICE}")
            if role == STUDENT:
                for part in parts:
                    part.objective.check(figures)

        of = "" if role == STUDENT else f" of the {role}"
        total = f"loss/{'loss' if role == STUDENT else role}"
        losses = []
        for part in parts:
            with torch.no_grad():
                examples = part.objective.draw(role, number)
            for some in examples.split(self.config.train.micro_batch):
                losses.append(partial(propagated, part, some, len(some) / len(examples)))
        with self._frozen_but(learner):
            norm = float(learner.step(losses, look))
        # in fp16 an overflow is the loss scale's business; DeepSpeed reports -1 for a norm that is not finite
        if learner.config.precision != "fp16" and not 0 <= norm < math.inf:
            raise EngineError(
                f"iteration {self.iteration + 1}: the gradient is not finite under a finite loss, and the weights are "
                "lost to it; go on from the last checkpoint (resume=auto) with a lower optimizer.lr"
            )
        for part in parts:
            part.objective.stepped(role, number)
        for name in largest:
            del figures[name]
        return figures | {"grad_norm" if role == STUDENT else f"grad_norm/{role}": norm}

    # ------------------------------------------------------------------ held-out reward and checkpoints

    @torch.no_grad()
    def evaluate_held_out(self) -> dict[str, float]:
        """The averaged student's eta = 0 reward on held-out conditions, and its terms where there are several."""
        config, pool = self.config, self.held_out
        mine = torch.arange(pool.size)[ranks.share(pool.size)]
        policy = student_policy(config, self.student)
        parts = []
        with self.account.settled(), self.averaged.installed():
            for indices in mine.split(config.rollout.batch_size or len(mine)):
                targets = self.collector.teacher_latents(pool, indices, role="evaluation")
                final, passes = sample(
                    self.student, policy, pool, indices, guidance=config.student.guidance, device=self.device
                )
                self.account.passes["evaluation"] += passes
                try:
                    parts.append(self.collector.score(final, targets, pool, indices))
                except RewardError as error:
                    raise EngineError(
                        f"iteration {self.iteration}, on held-out conditions: {error}; {ADVICE}"
                    ) from None
        terms = {name: ranks.gather(torch.cat([part[name] for part in parts])) for name in parts[0]}
        name = "reward/held_out_eta0"
        each = {f"{name}/{term}": values.mean().item() for term, values in terms.items()} if len(terms) > 1 else {}
        return {name: self.reward.weighted(terms).mean().item(), **each}

    def forget_best(self) -> None:
        """No iteration is the best one so far."""
        self.best: dict[str, float] = {"iteration": 0, "reward": -math.inf}

    def save(self, folder: Path, teacher_fingerprint: str) -> None:
        """Write everything that an exact continuation needs; every rank calls it."""
        save_engine(self.learner, folder, "deepspeed")
        for part in self.parts.values():
            part.save(folder)
        if ranks.is_first():
            save_file(self.averaged.values, folder / "ema.safetensors")
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
                "passes": dict(self.account.passes),
                "seconds": dict(self.account.seconds),
            }
            (folder / "trainer.json").write_text(json.dumps(state, indent=2))

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that `engine.checkpoint.check_compatible` accepted."""
        state = checkpoint.read_state(folder)
        try:
            load_engine(self.learner, folder, "deepspeed")
            for part in self.parts.values():
                part.load(folder)
            self.averaged.load(load_file(folder / "ema.safetensors"))
            if self._cloned_reference is not None:
                self._cloned_reference.load_state_dict(load_file(folder / "reference.safetensors"))
            if self.reward.standardizer is not None:
                self.reward.standardizer.load_state_dict(state["reward"])
        except Exception as error:  # torch, safetensors and DeepSpeed raise many kinds for cut or foreign files
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise EngineError(f"checkpoint {folder} cannot be read: {reason}; resume from another") from None
        self.iteration = state["iteration"]
        self.best = state["best"]
        self.account.restore(state["passes"], state["seconds"])

    # ------------------------------------------------------------------ what the algorithm reads

    @property
    def objective(self) -> Objective:
        """That of objective.kind."""
        return self.parts[self.config.objective.kind].objective

    @property
    def steps(self) -> int:
        """Optimizer steps of the student in an iteration."""
        return self.config.train.inner_epochs * self.config.train.updates

    @property
    def worst_ratio_error(self) -> float | None:
        """Largest |ratio - 1| before the first update of an iteration so far; None without a policy gradient."""
        objectives = [part.objective for part in self.parts.values()]
        return next((o.worst_ratio_error for o in objectives if isinstance(o, PolicyGradient)), None)

    @property
    def _cloned_reference(self) -> nn.Module | None:
        """The reference's own network in a run that clones, whose initial student is in no directory."""
        own = self.reference is not None and self.reference.network is not self.engine.module
        return self.reference.network if own and self.config.cloning.iterations else None

    def _learners(self) -> Iterator[Learner]:
        yield self.learner
        for part in self.parts.values():
            yield from part.learners.values()

    @contextmanager
    def _frozen_but(self, trained: Learner) -> Iterator[None]:
        with ExitStack() as stack:
            for learner in self._learners():
                if learner is not trained:
                    stack.enter_context(learner.frozen())
            yield

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        table = ranks.gather(torch.tensor([list(metrics.values())], dtype=torch.float64))
        return dict(zip(metrics, table.mean(0).tolist(), strict=True))


def _append(rows: dict[str, list[float]], figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        rows[name].append(value)
