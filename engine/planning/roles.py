"""The networks that objectives have beside teacher and student, without weights: built by the objectives' own roles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from engine.config import Config
from engine.objectives.catalogue import objective_class
from engine.objectives.contract import Role
from engine.parts import for_role
from engine.planning.networks import Networks, fit, materialize, stored_bytes
from engine.planning.rewards import load_models
from engine.precision import DTYPES, weights_dtype
from engine.roles import Roles


@dataclass(frozen=True)
class RoleNetwork:
    """A role's network on FAKE's CPU.

    Attributes:
        network: fake.
        precision: that it computes in.
        trained: whether it has a DeepSpeed engine.
        frozen: elements of each parameter that the engine holds beside those that it trains.
        apart: bytes of the weights that no engine casts: of all of them where there is no engine, and of those under
            adapters that are quantised or stay in the teacher's precision.
    """

    network: nn.Module
    precision: str
    trained: bool
    frozen: tuple[int, ...]
    apart: int

    @property
    def trainable(self) -> tuple[int, ...]:
        """Elements of each parameter that is trained, in the network's order."""
        return tuple(p.numel() for p in self.network.parameters() if p.requires_grad)


def build_roles(config: Config, nets: Networks) -> Mapping[str, Mapping[str, RoleNetwork]]:
    """The networks of all objectives of a run: kind -> role -> network.

    Args:
        config: of the run; its devices and sizes are those of this rank (`engine.ranks`).

    Raises:
        EngineError: names the key that a network cannot follow.
    """
    decode = partial(nets.pipeline.decode, batch_size=config.vae.batch_size or config.rollout.batch_size)
    roles = Roles(nets.pipeline, nets.teacher, nets.student, None, "", decode, load_models)
    built: dict[str, dict[str, RoleNetwork]] = {}
    for kind in config.objective.kinds:
        own = objective_class(kind).roles(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copies look for one
            built[kind] = {name: _fake(config, nets, role, role.build(roles)) for name, role in own.items()}
    return built


def _fake(config: Config, nets: Networks, role: Role, network: nn.Module) -> RoleNetwork:
    precision, trained = for_role(config, role).precision, role.lr is not None
    low, base = DTYPES[precision], weights_dtype(config)
    if not trained:
        network.requires_grad_(False)
    weights = [p.numel() for p in network.parameters() if not p.requires_grad]
    frozen, apart = tuple(weights) if trained else (), 0
    cast = not trained or precision != "fp32"  # DeepSpeed leaves all types alone in fp32
    if weights and nets.quantized is not None:
        frozen, apart = (), nets.quantized
        if not trained:
            apart += low.itemsize * sum(nets.trainable)
    elif not trained:
        apart = stored_bytes(network, low)
    elif weights and not cast and base != low:
        frozen, apart = (), base.itemsize * sum(weights)
    materialize(network, low if cast or not weights else base, adapters=low)
    fit(network, config, trained=trained)
    return RoleNetwork(network, precision, trained, frozen, apart)
