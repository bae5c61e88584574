"""The objectives of a run: each with its weight and the networks that it has beside teacher and student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from engine import ranks
from engine.config import Config
from engine.learner import Learner
from engine.objectives.catalogue import objective_class
from engine.objectives.contract import Objective, Role
from engine.precision import DTYPES
from engine.roles import Roles, fit_role


@dataclass(frozen=True)
class Part:
    """An objective in a run.

    Attributes:
        objective: what is learned.
        weight: of its loss in the student's.
        learners: role -> its network on an engine of its own.
        networks: role -> a network that nothing steps by a gradient.
    """

    objective: Objective
    weight: float
    learners: Mapping[str, Learner]
    networks: Mapping[str, nn.Module]

    def save(self, folder: Path) -> None:
        """Write what an exact continuation needs into a checkpoint; every rank calls it."""
        kind = self.objective.kind
        for name, learner in self.learners.items():
            save_engine(learner, folder, f"deepspeed_{kind}_{name}")
        if not ranks.is_first():
            return
        files = {kind: self.objective.state_dict()}
        files |= {f"{kind}_{name}": network.state_dict() for name, network in self.networks.items()}
        for name, state in files.items():
            if state:
                save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            FileNotFoundError: a file of it is missing; others, as torch, safetensors and DeepSpeed raise, for files
                that are damaged.
        """
        kind = self.objective.kind
        for name, learner in self.learners.items():
            load_engine(learner, folder, f"deepspeed_{kind}_{name}")
        for name, network in self.networks.items():
            network.load_state_dict(load_file(folder / f"{kind}_{name}.safetensors"))
        if self.objective.state_dict():
            self.objective.load_state_dict(load_file(folder / f"{kind}.safetensors"))


class Parts:
    """Builds the parts of a run, in two steps: networks that start as others do are made before DeepSpeed partitions
    these, and objectives when all engines stand.

    Args:
        config: of the run.
        roles: its networks.
    """

    def __init__(self, config: Config, roles: Roles) -> None:
        self.config = config
        self._student = roles.student
        self._kinds = {kind: objective_class(kind) for kind in config.objective.kinds}
        self._roles = {kind: made.roles(config) for kind, made in self._kinds.items()}
        self._built = {
            kind: {name: role.build(roles) for name, role in own.items()} for kind, own in self._roles.items()
        }

    @property
    def examples(self) -> int:
        """Examples of a rank in one optimizer step of objective.kind."""
        return self._examples(self.config.objective.kind)

    @property
    def micro_batch(self) -> int:
        """Most examples in one forward pass of a rank."""
        return min(self.config.train.micro_batch, max(map(self._examples, self._kinds)))

    @property
    def accumulation(self) -> int:
        """Most micro-batches in one optimizer step of the student."""
        return sum(math.ceil(self._examples(kind) / self.micro_batch) for kind in self._kinds)

    @property
    def passes(self) -> list[str]:
        """What the account counts beside teacher and student."""
        roles = {name: role for own in self._roles.values() for name, role in own.items()}
        trained = [f"{name}_{way}" for name, role in roles.items() if role.lr for way in ("forward", "backward")]
        return trained + [name for name, role in roles.items() if not role.lr]

    def make(
        self, objective: Callable[[type[Objective], Mapping[str, nn.Module], tuple[float, float]], Objective]
    ) -> dict[str, Part]:
        """The parts, by kind, objective.kind first.

        Args:
            objective: makes one of its class, its networks by role, and its band of noise levels.
        """
        settings = self.config.objective
        return {
            kind: self._part(kind, objective, settings.joined.get(kind, 1.0), settings.bands.get(kind, (0.0, 1.0)))
            for kind in self._kinds
        }

    def _part(self, kind: str, objective: Callable, weight: float, band: tuple[float, float]) -> Part:
        learners, networks = {}, {}
        for name, role in self._roles[kind].items():
            network, config = self._built[kind][name], for_role(self.config, role)
            fit_role(network, config, trained=role.lr is not None)
            if role.lr is None:
                networks[name] = network.requires_grad_(False).to(ranks.device(), DTYPES[config.precision])
            else:
                for parameter in network.parameters():
                    if parameter.requires_grad:  # a frozen base under adapters may be rounded or quantised
                        parameter.data = parameter.data.float()
                learners[name] = Learner(
                    config,
                    network,
                    micro_batch=min(self.config.train.micro_batch, self._examples(kind)),
                    accumulation=math.ceil(self._examples(kind) / self.config.train.micro_batch),
                )
        engines = {name: learner.engine for name, learner in learners.items()}
        return Part(objective(self._kinds[kind], {**networks, **engines}, band), weight, learners, networks)

    def _examples(self, kind: str) -> int:
        return self._kinds[kind].examples(self.config, self._student)


def save_engine(learner: Learner, folder: Path, tag: str) -> None:
    """Write weights and optimizer states into folder/tag; every rank calls it."""
    learner.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)


def load_engine(learner: Learner, folder: Path, tag: str) -> None:
    """Go on from what `save_engine` wrote.

    Raises:
        FileNotFoundError: there is nothing that this run can read.
    """
    loaded = None
    if (folder / tag).is_dir():
        loaded, _ = learner.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if loaded is None:
        raise FileNotFoundError(f"it has no DeepSpeed state {tag} that this run can read")


def for_role(config: Config, role: Role) -> Config:
    """The run's configuration with the role's own learning rate, if it has one, and precision."""
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"lr": role.lr or config.optimizer.lr}),
            "precision": role.precision or config.precision,
            "model": config.model.model_copy(update={"channels_last": False}),
        }
    )
