"""What the reward keeps and allocates on the GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.models.digits import load_reward_encoder
from engine.planning.networks import FAKE, locate, materialize, transformers_model
from engine.planning.traces import size_of
from engine.planning.tracing import trace
from engine.precision import DTYPES
from engine.rl.rewards import RewardError
from engine.rl.rewards.composite import GIVEN_ENCODER
from engine.rl.rewards.local_model import LocalModel
from engine.rl.rewards.preprocessing import Preprocessing
from engine.rl.rewards.settings import ModelSettings, read_terms

NOT_PLANNED = "{name}: what a reward of the user's own takes on the GPU is not planned"


@dataclass(frozen=True)
class RewardMemory:
    """Bytes of a reward.

    Attributes:
        weights: of its models.
        activations: of the largest of them on a batch of its own.
        differences: copies of all images that a term makes at once.
        notes: on terms that are not planned.
    """

    weights: int
    activations: int
    differences: int
    notes: tuple[str, ...]


def reward_memory(terms: Mapping[str, Any], image: tuple[int, int, int]) -> RewardMemory:
    """What the terms of a reward take on images (C, H, W).

    Raises:
        EngineError: names the term.
    """
    try:
        read = read_terms(terms)
        models = _by_model({name: own for name, (_, own) in read.items() if isinstance(own, ModelSettings)})
    except RewardError as error:
        raise EngineError(str(error)) from None
    weights = activations = differences = 0
    notes = []
    for name, (kind, _) in read.items():
        if kind == "pixel":
            differences = 2
        elif ":" in kind:
            notes.append(NOT_PLANNED.format(name=f"reward.terms.{name}"))
    if any(kind in GIVEN_ENCODER for kind, _ in read.values()):
        weights += size_of(load_reward_encoder().parameters())
    for (directory, precision), sharing in models.items():
        batch = min(settings.batch_size for settings in sharing.values())
        reads = frozenset().union(*(settings.reads for settings in sharing.values()))
        size, peak = _model(directory, DTYPES[precision], batch, "prompts" in reads, image)
        weights, activations = weights + size, max(activations, peak)
    return RewardMemory(weights, activations, differences, tuple(notes))


@functools.lru_cache(maxsize=32)
def _model(
    directory: Path, dtype: torch.dtype, batch: int, prompts: bool, image: tuple[int, int, int]
) -> tuple[int, int]:
    """(weights, activations) bytes of a vision model on a batch of images."""
    try:
        network, prepare = _network(directory, prompts=prompts), Preprocessing.of(directory)
    except (RewardError, OSError, ValueError, KeyError) as error:
        raise EngineError(f"{directory} cannot be planned: {error}") from None
    materialize(network, dtype)
    tower = getattr(network, "vision_model", network)
    with FAKE:
        images = torch.empty(batch, *image)
        encode = torch.no_grad()(lambda: tower(pixel_values=prepare(images).to(dtype)))
        found = trace(encode, given=[images], network=network)
    return size_of(network.parameters()), found.peak


def _by_model(terms: Mapping[str, ModelSettings]) -> dict[tuple[Path, str], dict[str, ModelSettings]]:
    """(directory, precision) of a model -> the terms that look through it.

    Raises:
        RewardError: names the term's `path`.
    """
    groups: dict[tuple[Path, str], dict[str, ModelSettings]] = {}
    for name, settings in terms.items():
        try:
            groups.setdefault((locate(settings.path), settings.precision), {})[name] = settings
        except EngineError as error:
            raise RewardError(f"reward.terms.{name}.path: {error}") from None
    return groups


def _network(directory: Path, *, prompts: bool) -> nn.Module:
    """A vision model on the meta device, with its text tower where prompts are read."""
    network = transformers_model(directory, "AutoModel")
    if not prompts and hasattr(network, "text_model"):
        del network.text_model, network.text_projection
    return network


class _Weightless(LocalModel):
    """A local model on fake tensors, of a directory's configurations alone: no weights and no tokenizer.

    Args:
        sharing: settings of the terms that look through it.
    """

    def __init__(self, directory: Path, sharing: Sequence[ModelSettings]) -> None:
        self.reads = frozenset().union(*(settings.reads for settings in sharing))
        self.batch_size = min(settings.batch_size for settings in sharing)
        self.dtype, self.device, self.logit_scale = DTYPES[sharing[0].precision], torch.device("cpu"), 1.0
        self.preprocessing = Preprocessing.of(directory)
        self.network = materialize(_network(directory, prompts=False).requires_grad_(False), self.dtype)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) fp32 of prompts, without their passes, of which nothing is kept."""
        return torch.empty(len(prompts), self.network.config.projection_dim)


def load_models(terms: Mapping[str, ModelSettings], device: torch.device) -> dict[str, LocalModel]:
    """What `engine.rl.rewards.local_model.load_models` does, on fake tensors and without weights.

    Raises:
        RewardError: names the term's `path`.
    """
    models: dict[str, LocalModel] = {}
    for (directory, _), sharing in _by_model(terms).items():
        try:
            models |= dict.fromkeys(sharing, _Weightless(directory, list(sharing.values())))
        except (RewardError, OSError, ValueError, KeyError) as error:
            name = next(iter(sharing))
            raise RewardError(f"reward.terms.{name}.path: {directory} cannot be planned: {error}") from None
    return models
