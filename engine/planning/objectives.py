"""What the steps of a distillation allocate: the objectives' own `draw` and `loss`, run on fake networks."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine import ranks
from engine.account import Account
from engine.conditions import ConditionPool
from engine.config import Config, load_config
from engine.errors import EngineError
from engine.models.denoiser import Condition
from engine.models.digits import load_reward_encoder
from engine.objectives.catalogue import objective_class
from engine.objectives.contract import STUDENT, Context, Examples, Objective
from engine.objectives.progressive import stages_of
from engine.planning import rewards
from engine.planning.networks import FAKE, Networks, condition, materialize
from engine.planning.roles import RoleNetwork, build_roles
from engine.planning.states import FULL
from engine.planning.traces import NETWORKS, network_key, networks_of, size_of
from engine.planning.tracing import Repeated, Undecided, trace
from engine.precision import weights_dtype
from engine.preflight import is_digits, reward_of
from engine.rl.rewards import CompositeReward
from engine.rl.rewards.composite import BLACK_BOXES
from engine.rl.rewards.settings import read_terms

STEPS = (
    *NETWORKS, "teacher", "rollout", "reward.terms", "vae", "train", "iterations", "seed",
)  # fmt: skip
"""Keys that decide the networks of the roles, and what is traced of the objectives."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of a role.

    Attributes:
        drawing: most bytes at once while its examples are drawn.
        examples: bytes of these, which stand until it is over.
        moments: as `tracing.Trace.moments`, of one micro-batch forwards and backwards.
    """

    drawing: int
    examples: int
    moments: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Steps:
    """Of one objective.

    Attributes:
        beginning: most bytes at once before the first step of an iteration.
        roles: role -> its step, the student's last.
        encoder: bytes of the weights of an encoder that it has beside its roles.
        host: bytes that it keeps in the memory of the machine.
    """

    beginning: int
    roles: Mapping[str, Step]
    encoder: int
    host: int


@functools.lru_cache(maxsize=8)
def roles_of(key: str, directory: Path) -> Mapping[str, Mapping[str, RoleNetwork]]:
    """The networks of all roles: kind -> role -> network.

    Args:
        key: of STEPS.
        directory: of the teacher.
    """
    config = load_config(json.loads(key))
    with ranks.imagined(1):
        return build_roles(config, networks_of(network_key(config), directory))


@functools.lru_cache(maxsize=32)
def steps_of(key: str, directory: Path, kind: str, count: int) -> Steps:
    """What the steps of a distillation take on one of `count` ranks.

    Raises:
        EngineError: names the key that the objective cannot follow, or whose memory is not known.
    """
    config = load_config(json.loads(key))
    nets, roles = networks_of(network_key(config), directory), roles_of(key, directory)[kind]
    reading, config = _reading(config, nets, kind), _simplified(config, kind)
    with ranks.imagined(count):
        reward = _reward(config, nets) if kind == "draft" else None
        objective, encoders = _objective(config, nets, roles, kind, reward)
        networks = [nets.student.network, nets.teacher.network, nets.pipeline.vae, *encoders]
        networks += [role.network for role in roles.values()] + ([] if reward is None else reward.networks)
        standing = [value for of in networks if of is not None for value in (*of.parameters(), *of.buffers())]
        with FAKE, Undecided():
            begun = trace(lambda: objective.begin(0), given=standing)
            steps = {
                role: _step(objective, role, standing, {STUDENT: nets.student.network, **_trained(roles)}, reading)
                for role in dict.fromkeys((*objective.before_student(), STUDENT))
            }
    return Steps(
        beginning=begun.peak,
        roles=steps,
        encoder=sum(size_of([*of.parameters(), *of.buffers()]) for of in encoders),
        host=_on_host(config, nets, kind),
    )


def _on_host(config: Config, nets: Networks, kind: str) -> int:
    if kind == "progressive" and config.objective.progressive.states == "trajectory":  # of the stage of most steps
        return FULL * config.rollout.pool * math.prod(nets.teacher.latent_shape) * (stages_of(config)[0] + 1)
    if kind == "consistency" and config.objective.consistency.decay:  # its own average of the student
        return FULL * sum(nets.trainable)
    return 0


def _step(
    objective: Objective, role: str, standing: Sequence[Tensor], trained: Mapping[str, nn.Module], reading: int
) -> Step:
    """The step of a role.

    Args:
        standing: tensors that are there before.
        trained: role -> network, of all that are trained.
        reading: most bytes at once while an image is read, which comes on top of the examples.
    """
    config = objective.context.config
    number = config.iterations * config.train.inner_epochs * config.train.updates - 1  # the last, when warm-up is over
    drawn: list[Examples] = []

    @torch.no_grad()
    def draw() -> list[Examples]:
        drawn.append(objective.draw(role, number))
        return drawn

    drawing = trace(draw, given=standing)
    (examples,) = drawn
    some = next(examples.split(config.train.micro_batch))
    given = [*standing, *examples.values.values(), *examples.condition.values()]
    with _frozen(network for name, network in trained.items() if name != role):
        learning = trace(lambda: objective.loss(role, some).loss.backward(), given=given, network=trained[role])
    return Step(max(drawing.peak, drawing.left + reading), drawing.left, learning.moments)


def _trained(roles: Mapping[str, RoleNetwork]) -> dict[str, nn.Module]:
    return {name: role.network for name, role in roles.items() if role.trained}


@contextmanager
def _frozen(networks: Iterator[nn.Module]) -> Iterator[None]:
    """As `Learner.frozen`: inside, gradients flow through networks and leave none in them."""
    weights = [value for network in networks for value in network.parameters() if value.requires_grad]
    for value in weights:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in weights:
            value.requires_grad_(True)


# ---------------------------------------------------------------------- what an objective works with


def _objective(
    config: Config, nets: Networks, roles: Mapping[str, RoleNetwork], kind: str, reward: CompositeReward | None
) -> tuple[Objective, list[nn.Module]]:
    """The objective, and the encoders that it loaded."""
    encoders: list[nn.Module] = []

    def load_models(*arguments: Any) -> dict[str, Any]:
        models = rewards.load_models(*arguments)
        encoders.extend(model.network for model in models.values())
        return models

    made = objective_class(kind)
    shape, batch = nets.teacher.latent_shape, config.rollout.batch_size or config.train.micro_batch
    context = Context(
        config=config,
        pipeline=nets.pipeline,
        teacher=replace(nets.teacher, call=Repeated(nets.teacher.call)),
        student=replace(nets.student, call=Repeated(nets.student.call)),
        reference=None,
        networks={name: role.network for name, role in roles.items()},
        # no larger than what is drawn of it at once
        pool=_Pool("train", 0, min(config.rollout.pool, batch * ranks.world_size()), _Source(config, nets), shape),
        targets=None,
        reward=reward,
        decode=partial(nets.pipeline.decode, batch_size=config.vae.batch_size or config.rollout.batch_size),
        collector=SimpleNamespace(teacher_latents=lambda pool, indices: torch.empty(len(indices), *shape)),
        account=Account(),
        device=ranks.device(),
        band=config.objective.bands.get(kind, (0.0, 1.0)),
        models=load_models,
    )
    objective = made(context)
    if kind == "flash_dmd" and is_digits(nets.teacher) and config.objective.flash_dmd.encoder.path is None:
        encoders.append(load_reward_encoder())
    return objective, encoders


def _reward(config: Config, nets: Networks) -> CompositeReward:
    """The reward whose gradient is learned from, on fake tensors, without black boxes that count for nothing."""
    terms = {}
    for name, (kind, settings) in read_terms(config.reward.terms).items():
        if ":" in kind:
            raise EngineError(
                f"objective draft cannot be planned with reward.terms.{name}: what a function of yours keeps for its "
                "gradient is not known"
            )
        if settings.weight or kind not in BLACK_BOXES:
            terms[name] = config.reward.terms[name]
    own = config.model_copy(update={"reward": config.reward.model_copy(update={"terms": terms})})
    reward = reward_of(own, nets.teacher, rewards.load_models)
    for network in reward.networks:
        materialize(network, next(network.parameters()).dtype)
    return reward


def _simplified(config: Config, kind: str) -> Config:
    """The configuration of a run that takes as much memory and less time, and reads no data."""
    if kind == "progressive":
        # However many steps the teacher takes from one of the student's timesteps to the next, nothing stays of them.
        steps = max(stages_of(config))
        return config.model_copy(update={"teacher": config.teacher.model_copy(update={"steps": steps})})
    if kind in ("dmd2", "flash_dmd"):  # latents of real images are as large as the teacher's
        own = getattr(config.objective, kind).model_copy(update={"real_images": None})
        return config.model_copy(update={"objective": config.objective.model_copy(update={kind: own})})
    return config


def _reading(config: Config, nets: Networks, kind: str) -> int:
    """Most bytes at once while a file of real images is brought to a latent."""
    pipeline, source = nets.pipeline, getattr(getattr(config.objective, kind), "real_images", None)
    if source in (None, "digits") or pipeline.vae is None:
        return 0
    with FAKE:
        blank = torch.empty(1, *nets.teacher.latent_shape)
        read = torch.no_grad()(lambda: pipeline.encode_images(pipeline.decode(blank)))
        return trace(read, given=[blank], network=pipeline.vae).peak


class _Pool(ConditionPool):
    """Conditions without content."""

    def draw(self, count: int, *, iteration: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)


@dataclass(frozen=True)
class _Source:
    """What conditions ask for, as shapes."""

    config: Config
    nets: Networks

    def __len__(self) -> int:
        return 1

    def condition(self, rows: Tensor) -> Condition:
        return condition(self.nets.pipeline, len(rows), weights_dtype(self.config))

    def asked(self, rows: Tensor) -> dict[str, Any]:
        if self.nets.teacher.classes is None:
            return {"prompt": [""] * len(rows)}
        return {"class_labels": rows}
