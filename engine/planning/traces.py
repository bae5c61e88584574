"""The networks of a run and the traces of what they compute, each made once for all plans that differ in other keys."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config, load_config
from engine.kernels import policy_sample
from engine.models.denoiser import Denoiser
from engine.models.pipelines import Pipeline
from engine.planning import networks
from engine.planning.networks import FAKE, Networks
from engine.planning.tracing import Trace, trace
from engine.precision import weights_dtype
from engine.rl import GaussianPolicy
from engine.rl.losses import pair_loss
from engine.rl.rollout import Trajectory, coefficients, predict_step
from engine.sampling import make_policy, student_policy

DECODER = ("teacher.resolution", "vae.precision", "vae.slicing", "vae.tiling")
NETWORKS = (
    *DECODER, "precision", "teacher.precision", "student", "cloning.iterations", "lora", "objective", "policy",
    "model.gradient_checkpointing", "model.fused_kernels",
)  # fmt: skip
"""Keys that decide the autoencoder, and the networks and their traces; sizes come besides."""


def network_key(config: Config, keys: tuple[str, ...] = NETWORKS) -> str:
    kept: dict[str, Any] = {}
    for key in keys:
        value, part = config.as_dict(), kept
        *sections, name = key.split(".")
        for section in sections:
            value, part = value[section], part.setdefault(section, {})
        part[name] = value[name]
    return json.dumps(kept, sort_keys=True)


def policy_of(config: Config, denoiser: Denoiser) -> GaussianPolicy:
    """What the student draws by in training: the policy that it learns by, or its own sampler."""
    if not config.objective.rewarded:
        return student_policy(config, denoiser)
    return make_policy(denoiser, config.policy.kind, config.student.steps, config.policy.eta)


def condition_of(config: Config, nets: Networks, rows: int) -> dict[str, Tensor]:
    """Fake conditions, tensors (rows, ...)."""
    with FAKE:
        return dict(networks.condition(nets.pipeline, rows, weights_dtype(config)))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@functools.lru_cache(maxsize=8)
def networks_of(key: str, directory: Path) -> Networks:
    return networks.build(load_config(json.loads(key)), directory)


@functools.lru_cache(maxsize=8)
def pipeline_of(key: str, directory: Path) -> Pipeline:
    return networks.load(directory, load_config(json.loads(key)), "teacher.path")


@functools.lru_cache(maxsize=64)
def sampling(key: str, directory: Path, role: str, rows: int, guidance: float) -> Trace:
    """One step of a rollout, without gradients."""
    config, nets = load_config(json.loads(key)), networks_of(key, directory)
    denoiser: Denoiser = getattr(nets, role)
    policy = policy_of(config, denoiser)
    condition = condition_of(config, nets, rows)
    with FAKE:
        x = torch.empty(rows, *denoiser.latent_shape)
        step = torch.zeros(rows, dtype=torch.int64)

        @torch.no_grad()
        def computation() -> object:
            pred, uncond = predict_step(denoiser, policy, x, step, condition, guidance)
            noise = {"noise": x, "pred_uncond": uncond, "guidance": guidance}
            return policy_sample(x, pred, *coefficients(policy, step), **noise)

        return trace(computation, given=[x, step, *condition.values()], network=denoiser.network)


@functools.lru_cache(maxsize=64)
def update(key: str, directory: Path, rows: int) -> Trace:
    """One micro-batch of the update: the student's pass, the reference's, the loss and its backward pass."""
    config, nets = load_config(json.loads(key)), networks_of(key, directory)
    policy = policy_of(config, nets.student)
    condition = condition_of(config, nets, rows)
    objective = config.objective
    with FAKE:
        latents = torch.empty(rows, *nets.student.latent_shape)
        each, index = torch.empty(rows), torch.zeros(rows, dtype=torch.int64)
        trajectory = Trajectory(latents, latents, each, index, index, latents, 0)

        def computation() -> None:
            loss = pair_loss(
                nets.student,
                policy,
                trajectory,
                index,
                condition,
                each,
                guidance=config.student.guidance,
                clip_range=objective.clip_range,
                reference=nets.reference,
                kl_coef=objective.kl_coef,
                kl_kind=objective.kl_kind,
                kl_alpha=objective.kl_alpha,
            ).loss
            loss.backward()

        given = [latents, each, index, *condition.values()]
        return trace(computation, given=given, network=nets.student.network)


@functools.lru_cache(maxsize=64)
def decoding(key: str, directory: Path, rows: int) -> int:
    """Peak bytes of decoding so many latents at once."""
    pipeline = pipeline_of(key, directory)
    with FAKE:
        latents = torch.empty(rows, *pipeline.denoiser.latent_shape)
        return _decoded(pipeline, latents, rows)


@functools.lru_cache(maxsize=64)
def gathering(key: str, directory: Path, rows: int, batch: int, shape: tuple[int, int, int]) -> int:
    """Peak bytes of turning what the autoencoder gives, batch by batch, into so many images."""
    pipeline = pipeline_of(key, directory)
    with FAKE:
        if pipeline.vae is not None:
            pipeline = replace(pipeline, vae=_Images(pipeline.vae, shape))
        latents = torch.empty(rows, *pipeline.denoiser.latent_shape)
        return _decoded(pipeline, latents, batch)


def _decoded(pipeline: Pipeline, latents: Tensor, batch: int) -> int:
    decode = torch.no_grad()(pipeline.decode)
    return trace(lambda: decode(latents, batch_size=batch), given=[latents], network=pipeline.vae).peak


class _Images(nn.Module):
    """An autoencoder that allocates nothing but its images."""

    def __init__(self, vae: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config, self.shape = vae.config, shape
        self.weight = next(vae.parameters())

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.empty(len(latents), *self.shape, dtype=self.weight.dtype),)


@functools.lru_cache(maxsize=64)
def text_encoder(directory: Path, kind: str, dtype: torch.dtype, rows: int, tokens: int) -> tuple[int, int]:
    """(weights, activations) bytes of a text encoder."""
    encoder = networks.materialize(networks.transformers_model(directory, kind), dtype)
    length = min(tokens, getattr(encoder.config, "max_position_embeddings", tokens))
    with FAKE:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        encode = torch.no_grad()(encoder)
        found = trace(lambda: encode(ids), given=[ids], network=encoder)
    return size_of([*encoder.parameters(), *encoder.buffers()]), found.peak
