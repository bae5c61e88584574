"""The phases of an iteration, and what stands in a GPU's memory at the worst moment of each."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import zero
from engine.config import Config, load_config
from engine.kernels import policy_sample
from engine.models.denoiser import Denoiser
from engine.models.pipelines import Pipeline
from engine.planning import networks
from engine.planning.networks import FAKE, Networks
from engine.planning.rewards import RewardMemory, reward_memory
from engine.planning.states import FULL, Trained, states
from engine.planning.tracing import Trace, trace
from engine.precision import DTYPES, weights_dtype
from engine.rl import GaussianPolicy
from engine.rl.losses import pair_loss
from engine.rl.rollout import Trajectory, coefficients, predict_step
from engine.sampling import make_policy

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
        host: bytes in the memory of the machine, for each rank: averaged weights, and what is offloaded or paged.
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
    key = _network_key(config)
    nets = _networks(key, directory)
    sizes = Sizes.of(config, nets, ranks)
    held = states(
        Trained(
            trainable=nets.trainable,
            frozen=() if nets.quantized is not None else nets.frozen,
            weight_bytes=DTYPES[config.precision].itemsize,
            master_bytes=2 if config.zero.master_weights == "bf16" and config.precision != "fp32" else FULL,
            optimizer=config.optimizer.kind,
            zero=zero.deepspeed_config(
                config, micro_batch=sizes.micro_batch, accumulation=sizes.accumulation, world_size=ranks
            )["zero_optimization"],
            ranks=ranks,
            accumulation=sizes.accumulation,
        )
    )
    quantized = 0 if nets.quantized is None else nets.quantized // (ranks if config.zero.stage == 3 else 1)
    rewards = reward_memory(config.reward.terms, sizes.image_shape)
    standing = {
        PARAMETERS: held.parameters + quantized + sum(nets.resident.values()),
        GRADIENTS: held.kept,
        OPTIMIZER: held.optimizer,
        ENCODERS: nets.vae_bytes + rewards.weights,
    }
    gathered = {**standing, PARAMETERS: standing[PARAMETERS] + held.gathered}
    found = [] if nets.pipeline.family.encode is None else [_encoding(config, nets)]
    rollout = max(
        _sampling(key, directory, "student", sizes.student_rows, config.student.guidance).peak,
        _sampling(key, directory, "teacher", sizes.teacher_rows, config.teacher.guidance).peak,
    )
    found.append(Phase("teacher, rollout", {**gathered, ACTIVATIONS: rollout, SAMPLES: sizes.in_rollout}))
    scoring, images = _scoring(_network_key(config, DECODER), directory, sizes, rewards)
    overlapped = config.rollout.chunks > 1
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
    update = _update(key, directory, sizes.micro_batch)
    moments = [(size, held.backward.at(ready)) for size, ready in update.moments]
    activations, gradients = max([*moments, (0, held.reduced)], key=sum)
    kinds = {GRADIENTS: gradients, ACTIVATIONS: activations, SAMPLES: sizes.in_update}
    found.append(Phase("update", {**gathered, **kinds}))
    own = min(held.step, held.gradients)
    kinds = {GRADIENTS: own, ACTIVATIONS: held.step - own, SAMPLES: sizes.in_update}
    found.append(Phase("optimizer step", {**standing, **kinds}))
    host = FULL * sum(nets.trainable) + held.host
    return Memory(tuple(found), host, rewards.notes)


# ---------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows and bytes of one rank's iteration.

    Attributes:
        conditions, samples: of a rank.
        part_conditions, part_samples: of the largest part that is rolled out and scored at once (rollout.chunks).
        stochastic: steps that are trained on.
        micro_batch, accumulation: of the update.
        student_rows, teacher_rows, decode_rows: latents in one pass.
        latent, row, image: bytes of a latent, of its condition and of its image.
        image_shape: (C, H, W).
    """

    conditions: int
    samples: int
    part_conditions: int
    part_samples: int
    stochastic: int
    micro_batch: int
    accumulation: int
    student_rows: int
    teacher_rows: int
    decode_rows: int
    latent: int
    row: int
    image: int
    image_shape: tuple[int, int, int]

    @classmethod
    def of(cls, config: Config, nets: Networks, ranks: int) -> Sizes:
        """The sizes of a configuration on so many ranks."""
        size, most = config.rollout.group_size, config.rollout.batch_size
        conditions = math.ceil(config.rollout.conditions / ranks)
        part = math.ceil(conditions / min(config.rollout.chunks, conditions))
        stochastic = config.policy.window or int(_policy(config, nets.student).stochastic.sum())
        minibatch = max(1, conditions * size * stochastic // config.train.updates)
        micro_batch = min(config.train.micro_batch, minibatch)
        channels, height, width = nets.pipeline.denoiser.latent_shape
        vae = nets.pipeline.vae
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (channels if vae is None else 3, height * factor, width * factor)
        return cls(
            conditions=conditions,
            samples=conditions * size,
            part_conditions=part,
            part_samples=part * size,
            stochastic=stochastic,
            micro_batch=micro_batch,
            accumulation=math.ceil(minibatch / micro_batch),
            student_rows=min(most or part * size, part * size),
            teacher_rows=min(most or conditions, conditions),
            decode_rows=min(config.vae.batch_size or most or part * size, part * size),
            latent=FULL * channels * height * width,
            row=_bytes(_condition(config, nets, 1).values()),
            image=FULL * math.prod(shape),
            image_shape=shape,
        )

    @property
    def in_update(self) -> int:
        """Bytes of a rank's conditions, teacher latents and trajectories: x and x_next of each pair, and the ends."""
        return self.conditions * (self.row + self.latent) + self.samples * self.latent * (2 * self.stochastic + 1)

    @property
    def in_rollout(self) -> int:
        """Bytes of the same while the last part is rolled out: its conditions, latents and noise come on top."""
        return self.in_update + self.part_samples * (self.row + 3 * self.latent)


def _policy(config: Config, denoiser: Denoiser) -> GaussianPolicy:
    return make_policy(denoiser, config.policy.kind, config.student.steps, config.policy.eta)


def _condition(config: Config, nets: Networks, rows: int) -> dict[str, Tensor]:
    with FAKE:
        return dict(networks.condition(nets.pipeline, rows, weights_dtype(config)))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---------------------------------------------------------------------- networks and traces, each made once


DECODER = ("teacher.resolution", "vae.precision", "vae.slicing", "vae.tiling")
NETWORKS = (
    *DECODER, "precision", "teacher.precision", "student", "cloning.iterations", "lora", "objective", "policy",
    "model.gradient_checkpointing", "model.fused_kernels",
)  # fmt: skip
"""Keys that decide the autoencoder, and the networks and their traces; sizes come besides."""


def _network_key(config: Config, keys: tuple[str, ...] = NETWORKS) -> str:
    kept: dict[str, Any] = {}
    for key in keys:
        value, part = config.as_dict(), kept
        *sections, name = key.split(".")
        for section in sections:
            value, part = value[section], part.setdefault(section, {})
        part[name] = value[name]
    return json.dumps(kept, sort_keys=True)


@functools.lru_cache(maxsize=8)
def _networks(key: str, directory: Path) -> Networks:
    return networks.build(load_config(json.loads(key)), directory)


@functools.lru_cache(maxsize=8)
def _pipeline(key: str, directory: Path) -> Pipeline:
    return networks.load(directory, load_config(json.loads(key)), "teacher.path")


@functools.lru_cache(maxsize=64)
def _sampling(key: str, directory: Path, role: str, rows: int, guidance: float) -> Trace:
    """One step of a rollout, without gradients."""
    config, nets = load_config(json.loads(key)), _networks(key, directory)
    denoiser: Denoiser = getattr(nets, role)
    policy = _policy(config, denoiser)
    condition = _condition(config, nets, rows)
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
def _update(key: str, directory: Path, rows: int) -> Trace:
    """One micro-batch of the update: the student's pass, the reference's, the loss and its backward pass."""
    config, nets = load_config(json.loads(key)), _networks(key, directory)
    policy = _policy(config, nets.student)
    condition = _condition(config, nets, rows)
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
def _decoding(key: str, directory: Path, rows: int) -> int:
    """Peak bytes of decoding so many latents at once."""
    pipeline = _pipeline(key, directory)
    with FAKE:
        latents = torch.empty(rows, *pipeline.denoiser.latent_shape)
        return _decoded(pipeline, latents, rows)


@functools.lru_cache(maxsize=64)
def _gathering(key: str, directory: Path, rows: int, batch: int, shape: tuple[int, int, int]) -> int:
    """Peak bytes of turning what the autoencoder gives, batch by batch, into so many images."""
    pipeline = _pipeline(key, directory)
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


def _scoring(key: str, directory: Path, sizes: Sizes, rewards: RewardMemory) -> tuple[int, int]:
    """(activations, images) bytes of decoding and scoring one part, at its worst moment."""
    vae = _pipeline(key, directory).vae
    element = FULL if vae is None else next(vae.parameters()).element_size()
    moments, before = [], 0
    for rows in (sizes.part_samples, sizes.part_conditions):
        batch = min(sizes.decode_rows, rows)
        ready = (rows - batch) * sizes.image // FULL * element  # decoded, while the last batch is
        moments.append((_decoding(key, directory, batch), before + ready))
        moments.append((_gathering(key, directory, rows, batch, sizes.image_shape), before))
        before += rows * sizes.image
    moments.append((rewards.activations + rewards.differences * sizes.part_samples * sizes.image, before))
    return max(moments, key=sum)


def _encoding(config: Config, nets: Networks) -> Phase:
    """Text encoders alone: the networks are moved to the GPU after the prompts are encoded."""
    dtype, rows = weights_dtype(config), config.prompts.batch_size
    tokens = next(iter(nets.pipeline.family.max_tokens.values()))
    weights, activations = 0, 0
    for directory, kind in networks.text_encoders(nets.pipeline):
        size, peak = _encoder(directory, kind, dtype, rows, tokens)
        weights, activations = weights + size, max(activations, peak)
    return Phase("encode prompts", {ENCODERS: weights, ACTIVATIONS: activations})


@functools.lru_cache(maxsize=64)
def _encoder(directory: Path, kind: str, dtype: torch.dtype, rows: int, tokens: int) -> tuple[int, int]:
    """(weights, activations) bytes of a text encoder."""
    encoder = networks.materialize(networks.transformers_model(directory, kind), dtype)
    length = min(tokens, getattr(encoder.config, "max_position_embeddings", tokens))
    with FAKE:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        encode = torch.no_grad()(encoder)
        found = trace(lambda: encode(ids), given=[ids], network=encoder)
    return _bytes([*encoder.parameters(), *encoder.buffers()]), found.peak
