"""What an iteration costs, counted and timed from outside the loops, and what a student has learned."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.iteration.plain import RECIPES, PlainLoop, fp32_copy
from bench.iteration.problems import Problem
from engine import preflight, ranks
from engine.conditions import ConditionPool
from engine.config import Config
from engine.models.denoiser import Denoiser
from engine.models.digits import TEACHER_DIR
from engine.models.loading import fingerprint
from engine.models.pipelines import load_pipeline
from engine.roles import Roles
from engine.sampling import deterministic_policy, sample
from engine.sources import Classes, load_sources
from engine.trainer import Trainer

PHASES = ("teacher", "rollout", "reward", "update")
LOOPS = ("ours", "ours_all_steps", *RECIPES)
"""Ours as it is by default, our engine on the reference's algorithm, then the plain recipes."""


class Loop(Protocol):
    """A training loop: its network, and one iteration, which returns seconds by phase."""

    student: nn.Module

    def iterate(self) -> dict[str, float]: ...


def roles_of(teacher: Denoiser, student: nn.Module) -> Roles:
    """What `engine.roles.load_roles` gives, of a teacher that is in no directory. Its latents are the images."""
    pipeline = dataclasses.replace(load_pipeline(TEACHER_DIR, network=False), denoiser=teacher)
    return Roles(pipeline, teacher, teacher.with_network(student), None, fingerprint(teacher), pipeline.decode)


class Ours:
    """The engine's own trainer, with its teacher cache in a temporary folder."""

    def __init__(self, config: Config, teacher: Denoiser, student: nn.Module) -> None:
        self.student = student
        self.folder = tempfile.TemporaryDirectory()
        roles, folder = roles_of(teacher, student), Path(self.folder.name)
        sources = load_sources(config, roles.pipeline, folder)
        reward = preflight.check(config, roles, ranks.world_size())
        self.trainer = Trainer(config, roles, sources, reward, folder)

    def iterate(self) -> dict[str, float]:
        row = self.trainer.train_iteration()
        return {phase: row[f"time/{phase}"] for phase in PHASES}


def build(name: str, problem: Problem, seed: int, teacher: Denoiser) -> Loop:
    """A loop of LOOPS at its start."""
    config, student = problem.config(seed), fp32_copy(teacher)
    if name == "ours":
        return Ours(config, teacher, student)
    if name == "ours_all_steps":
        config = problem.config(seed, policy={"window": None}, objective={"step_weights": "none"})
        return Ours(config, teacher, student)
    reward = preflight.check(config, roles_of(teacher, student), ranks.world_size())
    return PlainLoop(RECIPES[name], config, teacher, student, reward)


def predicted_passes(name: str, config: Config) -> dict[str, int]:
    """Network evaluations of one latent in all iterations of a run without guidance, from the sizes alone.

    With M conditions of G samples an iteration, T student steps of which S = T - 1 have noise, a window of w of them
    and I iterations: every loop updates on I M G w pairs. A plain loop rolls out I M G T steps. Ours computes the s
    steps before its window once per condition, M s + M G (T - s) with s = 0, 1, ..., S - w in turn, and scores the
    first rollout once more. A target costs K steps: for each sample in the reference's recipe, else once per condition.
    """
    count, conditions, size = config.iterations, config.rollout.conditions, config.rollout.group_size
    samples, steps = conditions * size, config.student.steps
    noisy = steps - 1
    targets = min(config.rollout.pool, count * conditions)
    if name in RECIPES:
        window = RECIPES[name].window or noisy
        targets = targets if RECIPES[name].cached_targets else count * samples
        rolled_out = count * samples * steps
    else:
        window = noisy if name == "ours_all_steps" else config.policy.window
        prefixes = [iteration % (noisy - window + 1) for iteration in range(count)]
        rolled_out = sum(conditions * prefix + samples * (steps - prefix) for prefix in prefixes) + samples * window
    trained = count * samples * window
    return {
        "teacher": targets * config.teacher.steps,
        "student_forward": rolled_out + trained,
        "student_backward": trained,
    }


class PassCounter:
    """Counts what a network is really asked, by a hook: latents evaluated, and those of them with a gradient."""

    def __init__(self, network: nn.Module) -> None:
        self.forward = self.backward = 0
        self.hook = network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.forward += len(arguments[0])
        self.backward += len(arguments[0]) if torch.is_grad_enabled() else 0


@dataclasses.dataclass
class Record:
    """All iterations of one loop on one seed.

    Attributes:
        seconds: of each iteration, all of it.
        phases: of each iteration, seconds by phase.
        passes: network evaluations of one latent by role.
        reward: of the trained student on held-out conditions, or None.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)
    passes: dict[str, int] = dataclasses.field(default_factory=dict)
    reward: float | None = None


def train(
    problem: Problem, names: Sequence[str], seed: int, teacher: Denoiser, judge: Callable[[nn.Module], float] | None
) -> dict[str, Record]:
    """All iterations of the named loops in turn, the first of each, the second of each, ..., so that whatever else the
    machine does meets them alike."""
    loops = {name: build(name, problem, seed, teacher) for name in names}
    records = {name: Record(passes={"teacher": 0}) for name in names}
    students = {name: PassCounter(loop.student) for name, loop in loops.items()}
    teachers = PassCounter(teacher.network)
    for _ in range(problem.config(seed).iterations):
        for name, loop in loops.items():
            record, before = records[name], teachers.forward
            ranks.synchronize()
            started = time.perf_counter()
            record.phases.append(loop.iterate())
            ranks.synchronize()
            record.seconds.append(time.perf_counter() - started)
            record.passes["teacher"] += teachers.forward - before
    teachers.hook.remove()
    for name, record in records.items():
        record.passes |= {"student_forward": students[name].forward, "student_backward": students[name].backward}
        record.reward = judge(loops[name].student) if judge else None
    return records


def peak_bytes(problem: Problem, name: str, teacher: Denoiser) -> int:
    """Most bytes of tensors alive at once in a loop's first two iterations: networks, optimizer, activations and all.

    On a GPU the allocator's own figure. On a CPU the sum over the profiler's record of every allocation, which counts
    the same; a process's resident memory would count the imports, and what the allocator keeps.
    """

    def work() -> None:
        loop = build(name, problem, 0, teacher)
        for _ in range(2):
            loop.iterate()

    gc.collect()
    network = sum(tensor.nbytes for tensor in teacher.network.state_dict().values())
    if ranks.device().type == "cpu":
        return network + _cpu_peak(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return network + torch.cuda.max_memory_allocated() - before


def _cpu_peak(work: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


class Judge:
    """The eta = 0 reward on held-out conditions, for every loop's student alike."""

    def __init__(self, config: Config, teacher: Denoiser) -> None:
        self.config, self.teacher, self.device = config, teacher, ranks.device()
        roles = roles_of(teacher, teacher.network)
        self.reward, self.decode = preflight.check(config, roles, ranks.world_size()), roles.decode
        settings = config.evaluation
        self.pool = ConditionPool(
            "held_out", settings.seed, settings.held_out, Classes(teacher.classes), teacher.latent_shape
        )
        self.indices = torch.arange(self.pool.size)
        self.targets = self._draw(teacher.network, config.teacher.steps)

    def __call__(self, network: nn.Module) -> float:
        """Mean reward of a network at the student's number of steps."""
        images = self._draw(network, self.config.student.steps)
        condition = {name: value.to(self.device) for name, value in self.pool.condition(self.indices).items()}
        with torch.no_grad():
            return self.reward(images, self.targets, condition)[0].mean().item()

    def _draw(self, network: nn.Module, steps: int) -> Tensor:
        denoiser = self.teacher.with_network(network)
        policy = deterministic_policy(denoiser, steps)
        batch = self.config.rollout.batch_size
        latents, _ = sample(
            denoiser, policy, self.pool, self.indices, guidance=1.0, device=self.device, batch_size=batch
        )
        return self.decode(latents)
