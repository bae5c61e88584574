"""The phases of an iteration, and what stands in a GPU's memory at the worst moment of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import zero
from engine.config import Config
from engine.objectives.contract import STUDENT
from engine.planning import networks, objectives, traces
from engine.planning.networks import Networks
from engine.planning.objectives import STEPS, Step, Steps
from engine.planning.rewards import RewardMemory, reward_memory
from engine.planning.roles import RoleNetwork
from engine.planning.sizes import Sizes
from engine.planning.states import FULL, States, Trained, states
from engine.planning.traces import DECODER, network_key, networks_of, pipeline_of
from engine.planning.tracing import Trace
from engine.precision import DTYPES, weights_dtype

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer states"
ACTIVATIONS, ENCODERS, SAMPLES = "activations", "encoders, VAE", "samples"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, ENCODERS, SAMPLES)
"""Activations: all that a computation allocates on the way, the optimizer step's included. Samples: conditions,
trajectories and images."""


@dataclass(frozen=True)
class Phase:
    """The worst moment of a phase on the GPU that needs most.

    Attributes:
        name: of the phase.
        kinds: kind -> bytes.
    """

    name: str
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """What a run needs.

    Attributes:
        phases: in their order.
        host: bytes in the memory of the machine, for each rank: averaged weights, the teacher's latents, what
            objectives keep there, and what is offloaded or paged.
        notes: what the figures leave out, one sentence each.
    """

    phases: tuple[Phase, ...]
    host: int
    notes: tuple[str, ...]

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)


def memory(config: Config, directory: Path, ranks: int) -> Memory:
    """What each phase of a run needs on one GPU of `ranks`.

    Raises:
        EngineError: a directory or a choice that cannot be planned.
    """
    key, own_key = network_key(config), network_key(config, STEPS)
    nets, roles = networks_of(key, directory), objectives.roles_of(own_key, directory)
    sizes = Sizes.of(config, nets, ranks)
    learned = {kind: objectives.steps_of(own_key, directory, kind, ranks) for kind in config.objective.distilling}
    engines = engines_of(config, nets, roles, sizes, ranks)
    rewards = reward_memory(config.reward.terms, sizes.image_shape)
    standing = {
        PARAMETERS: sum(held.parameters for held in engines.values()) + _beside_engines(config, nets, roles, ranks),
        GRADIENTS: sum(held.kept for held in engines.values()),
        OPTIMIZER: sum(held.optimizer for held in engines.values()),
        ENCODERS: nets.vae_bytes + rewards.weights + sum(steps.encoder for steps in learned.values()),
    }
    gathered = {**standing, PARAMETERS: standing[PARAMETERS] + sum(held.gathered for held in engines.values())}
    found = [] if nets.pipeline.family.encode is None else [_encoding(config, nets)]
    passes = [traces.sampling(key, directory, "teacher", sizes.teacher_rows, config.teacher.guidance).peak]
    if sizes.student_rows:
        passes.append(traces.sampling(key, directory, "student", sizes.student_rows, config.student.guidance).peak)
    rollout = max(*passes, *(steps.beginning for steps in learned.values()), 0)
    found.append(Phase("teacher, rollout", {**gathered, ACTIVATIONS: rollout, SAMPLES: sizes.in_rollout}))
    if sizes.part_samples:
        scoring, images = _scoring(network_key(config, DECODER), directory, sizes, rewards)
        overlapped = config.rollout.chunks > 1 and sizes.samples > 0
        found.append(
            Phase(
                "decode, reward",
                {
                    **(gathered if overlapped else standing),
                    ACTIVATIONS: scoring + (rollout if overlapped else 0),
                    SAMPLES: images + (sizes.in_rollout if overlapped else sizes.in_update),
                },
            )
        )
    update = _Update(standing, gathered, engines, learned, sizes)
    for kind, steps in learned.items():
        together = sizes.in_update if sizes.samples and config.objective.turns is None else 0
        found += [
            Phase(f"{kind}: {role}", _worst(update.of_role(f"{kind}: {role}", step, together)))
            for role, step in steps.roles.items()
            if role != STUDENT
        ]
    policy_gradient = traces.update(key, directory, sizes.pairs_at_once) if sizes.samples else None
    kinds = config.objective.kinds
    acting = [kinds] if config.objective.turns is None else [(kind,) for kind in kinds]
    found.append(Phase("update", _worst(m for some in acting for m in update.of_student(some, policy_gradient))))
    found.append(Phase("optimizer step", _worst(update.last(some) for some in acting)))
    host = FULL * sum(nets.trainable) + sum(held.host for held in engines.values())
    host += sum(steps.host for steps in learned.values())
    host += sizes.latent * (config.rollout.pool + (config.evaluation.held_out if config.evaluation.every else 0))
    return Memory(tuple(found), host, rewards.notes)


def engines_of(
    config: Config, nets: Networks, roles: Mapping[str, Mapping[str, RoleNetwork]], sizes: Sizes, ranks: int
) -> dict[str, States]:
    """What each DeepSpeed engine holds: the student's, and of each role that is trained, "KIND: ROLE"."""

    def held(precision: str, trainable: Sequence[int], frozen: Sequence[int], batch: int, accumulation: int) -> States:
        built = zero.deepspeed_config(config, micro_batch=batch, accumulation=accumulation, world_size=ranks)
        return states(
            Trained(
                trainable=trainable,
                frozen=frozen,
                weight_bytes=DTYPES[precision].itemsize,
                master_bytes=2 if config.zero.master_weights == "bf16" and precision != "fp32" else FULL,
                optimizer=config.optimizer.kind,
                zero=built["zero_optimization"],
                ranks=ranks,
                accumulation=accumulation,
            )
        )

    batch = min(sizes.micro_batch, max(sizes.steps.values()))
    frozen = nets.frozen if nets.quantized is None else ()
    accumulation = sum(math.ceil(examples / batch) for examples in sizes.steps.values())
    found = {STUDENT: held(config.precision, nets.trainable, frozen, batch, accumulation)}
    for kind, own in roles.items():
        examples = sizes.steps[kind]
        batch = min(sizes.micro_batch, examples)
        for name, role in own.items():
            if role.trained:
                found[f"{kind}: {name}"] = held(
                    role.precision, role.trainable, role.frozen, batch, math.ceil(examples / batch)
                )
    return found


def _beside_engines(config: Config, nets: Networks, roles: Mapping[str, Mapping[str, RoleNetwork]], ranks: int) -> int:
    """Bytes of weights that no engine casts; stage 3 partitions those that lie in an engine's network."""
    every = [role for own in roles.values() for role in own.values()]
    inside = (nets.quantized or 0) + sum(role.apart for role in every if role.trained)
    alone = sum(nets.resident.values()) + sum(role.apart for role in every if not role.trained)
    return inside // (ranks if config.zero.stage == 3 else 1) + alone


@dataclass(frozen=True)
class _Update:
    """The moments of optimizer steps, each kind -> bytes.

    Attributes:
        standing: what is there at all times.
        gathered: the same, while networks compute.
        engines: as `engines_of` gives them.
        learned: kind of a distillation -> its steps.
        sizes: of the run.
    """

    standing: Mapping[str, int]
    gathered: Mapping[str, int]
    engines: Mapping[str, States]
    learned: Mapping[str, Steps]
    sizes: Sizes

    def of_role(self, engine: str, step: Step, samples: int) -> Iterator[Mapping[str, int]]:
        """A role's optimizer step, beside samples of these bytes."""
        yield self._drawing(step, samples)
        samples += step.examples
        yield from self._backward(engine, step.moments, samples)
        yield self._stepping(engine, samples)

    def of_student(self, kinds: Sequence[str], policy_gradient: Trace | None) -> Iterator[Mapping[str, int]]:
        """The student's, up to its optimizer's: the examples of all objectives that act are drawn first, and their
        micro-batches follow one another."""
        samples = self._rollout(kinds)
        for kind in kinds:
            if kind in self.learned:
                step = self.learned[kind].roles[STUDENT]
                yield self._drawing(step, samples)
                samples += step.examples
        for kind in kinds:
            trace = self.learned[kind].roles[STUDENT] if kind in self.learned else policy_gradient
            yield from self._backward(STUDENT, trace.moments, samples)

    def last(self, kinds: Sequence[str]) -> Mapping[str, int]:
        """The step of the student's optimizer."""
        drawn = sum(self.learned[kind].roles[STUDENT].examples for kind in kinds if kind in self.learned)
        return self._stepping(STUDENT, self._rollout(kinds) + drawn)

    def _rollout(self, kinds: Sequence[str]) -> int:
        return self.sizes.in_update if any(kind not in self.learned for kind in kinds) else 0

    def _drawing(self, step: Step, samples: int) -> Mapping[str, int]:
        kinds = {ACTIVATIONS: step.drawing - step.examples, SAMPLES: samples + step.examples}
        return {**self.gathered, **kinds}

    def _backward(self, engine: str, moments: Sequence[tuple[int, int]], samples: int) -> Iterator[Mapping[str, int]]:
        held = self.engines[engine]
        for activations, gradients in [
            *((size, held.backward.at(ready)) for size, ready in moments),
            (0, held.reduced),
        ]:
            kinds = {GRADIENTS: self._others(engine) + gradients, ACTIVATIONS: activations, SAMPLES: samples}
            yield {**self.gathered, **kinds}

    def _stepping(self, engine: str, samples: int) -> Mapping[str, int]:
        held = self.engines[engine]
        own = min(held.step, held.gradients)
        kinds = {GRADIENTS: self._others(engine) + own, ACTIVATIONS: held.step - own, SAMPLES: samples}
        return {**self.standing, **kinds}

    def _others(self, engine: str) -> int:
        """Bytes of gradients that the other engines keep."""
        return self.standing[GRADIENTS] - self.engines[engine].kept


def _worst(moments: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    return max(moments, key=lambda kinds: sum(kinds.values()))


# ---------------------------------------------------------------------- reward and prompts


def _scoring(key: str, directory: Path, sizes: Sizes, rewards: RewardMemory) -> tuple[int, int]:
    """(activations, images) bytes of decoding and scoring one part, at its worst moment."""
    vae = pipeline_of(key, directory).vae
    element = FULL if vae is None else next(vae.parameters()).element_size()
    moments, before = [], 0
    for rows in (sizes.part_samples, sizes.part_conditions):
        batch = min(sizes.decode_rows, rows)
        ready = (rows - batch) * sizes.image // FULL * element  # decoded, while the last batch is
        moments.append((traces.decoding(key, directory, batch), before + ready))
        moments.append((traces.gathering(key, directory, rows, batch, sizes.image_shape), before))
        before += rows * sizes.image
    moments.append((rewards.activations + rewards.differences * sizes.part_samples * sizes.image, before))
    return max(moments, key=sum)


def _encoding(config: Config, nets: Networks) -> Phase:
    """Text encoders alone: the networks are moved to the GPU after the prompts are encoded."""
    dtype, rows = weights_dtype(config), config.prompts.batch_size
    tokens = next(iter(nets.pipeline.family.max_tokens.values()))
    weights, activations = 0, 0
    for directory, kind in networks.text_encoders(nets.pipeline):
        size, peak = traces.text_encoder(directory, kind, dtype, rows, tokens)
        weights, activations = weights + size, max(activations, peak)
    return Phase("encode prompts", {ENCODERS: weights, ACTIVATIONS: activations})
