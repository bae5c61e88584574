"""From a configuration to a trainer: networks, conditions, reward, and all checks before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine import checkpoint, preflight, ranks
from engine.config import Config
from engine.evaluation_checks import check_evaluation
from engine.roles import Roles, fit, load_roles
from engine.sources import Source, encode_prompts, load_sources
from engine.trainer import Trainer


@dataclass(frozen=True)
class Built:
    """A trainer, and what it was made of.

    Attributes:
        trainer: ready for its next iteration.
        roles: its networks, on this rank's device.
        sources: what the conditions of each split ask for.
    """

    trainer: Trainer
    roles: Roles
    sources: Mapping[str, Source]


def build(config: Config, folder: Path, *, origin: Path | None = None, say: Callable[[str], None] = print) -> Built:
    """The trainer of a run, restored from a checkpoint if there is one.

    Args:
        config: that `preflight.check_machine` accepted.
        folder: of the run, for the caches that no key puts elsewhere; nothing else is written.
        origin: the checkpoint to go on from.
        say: is told what the networks run on.

    Raises:
        EngineError: for what cannot work.
    """
    roles = load_roles(config)
    sources = load_sources(config, roles.pipeline, folder)
    reward = preflight.check(config, roles, ranks.world_size())
    check_evaluation(config, roles.pipeline)
    if origin is not None:
        state = checkpoint.read_state(origin)
        checkpoint.check_compatible(state, config, teacher=roles.weights, world_size=ranks.world_size(), origin=origin)
    encode_prompts(config, sources, roles.pipeline)  # before the networks are on the device: the encoders may be larger
    for line in fit(roles, config):
        say(line)
    cache = Path(config.teacher.cache) if config.teacher.cache else folder / "teacher_cache"
    trainer = Trainer(config, roles, sources, reward, cache)
    if origin is not None:
        trainer.restore(origin)
    return Built(trainer, roles, sources)
