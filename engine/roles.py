"""Who predicts: teacher, student and reference, and in how many networks.

With LoRA they are one network with its adapters off or on. Without it the student is a network of its own, and so is
the reference where the objective needs one.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import ranks
from engine.collector import Decode
from engine.config import Config
from engine.errors import EngineError
from engine.kernels import patch
from engine.kernels.backend import runs_triton
from engine.models.attention import set_attention
from engine.models.denoiser import Denoiser
from engine.models.digits import TEACHER_DIR
from engine.models.loading import LoadingError, fingerprint
from engine.models.lora import ADAPTER, LoraError, add_lora, load_lora_state
from engine.models.memory import prepare_network, prepare_vae, select_trainable, use_channels_last
from engine.models.pipelines import Pipeline, load_pipeline
from engine.precision import DTYPES, weights_dtype
from engine.rl.rewards.local_model import Models, load_models


@dataclass(frozen=True)
class Roles:
    """The networks of a run, on this rank's device.

    Attributes:
        pipeline: the teacher's directory: encodes prompts, decodes latents, writes students.
        teacher: frozen; draws the target images.
        student: what is trained.
        reference: the frozen initial student, or None where the objective does not ask for it.
        weights: fingerprint of the teacher's weights as they compute.
        decode: latents (B, C, H, W) to images in [0, 1].
        models: loads vision models of local directories.
    """

    pipeline: Pipeline
    teacher: Denoiser
    student: Denoiser
    reference: Denoiser | None
    weights: str
    decode: Decode
    models: Models = load_models


def teacher_directory(config: Config) -> Path:
    """The diffusers directory that teacher.path means."""
    return TEACHER_DIR if config.teacher.path == "digits" else Path(config.teacher.path)


def load(directory: Path, key: str, config: Config, *, dtype: torch.dtype = torch.float32, **how: object) -> Pipeline:
    """A pipeline, or an error that names the configuration key."""
    try:
        return load_pipeline(directory, dtype=dtype, resolution=config.teacher.resolution, **how)
    except LoadingError as error:
        raise EngineError(f"{key}: {error}") from None


def load_teacher(config: Config) -> Pipeline:
    """The teacher's pipeline on the CPU, its network in teacher.precision.

    Raises:
        EngineError: names teacher.path.
    """
    precision = config.teacher.precision
    return load(
        teacher_directory(config),
        "teacher.path",
        config,
        dtype=weights_dtype(config),
        quantization=precision if precision in ("int8", "nf4") else None,
    )


def load_roles(config: Config) -> Roles:
    """Load the networks of a run, on the CPU.

    Raises:
        EngineError: names the key: a directory that cannot be loaded, adapters or an architecture that do not fit.
    """
    pipeline = load_teacher(config)
    teacher = pipeline.denoiser
    teacher.network.requires_grad_(False)
    weights = fingerprint(teacher)
    reference = None
    if config.lora.rank:
        adapt(pipeline, config)
        student = teacher.with_adapter(ADAPTER)
        reference = teacher
    else:
        student = load_student(config)
        try:
            select_trainable(student.network, config.student.trainable)
        except ValueError as error:
            raise EngineError(f"student.trainable={config.student.trainable}: {error}") from None
        if config.objective.kl_coef:
            frozen = copy.deepcopy(student.network).requires_grad_(False).to(DTYPES[config.precision])
            reference = student.with_network(frozen)
    decode = partial(pipeline.decode, batch_size=config.vae.batch_size or config.rollout.batch_size)
    return Roles(pipeline, teacher, student, reference if config.objective.kl_coef else None, weights, decode)


def load_student(config: Config) -> Denoiser:
    """The initial student with all its weights, fp32 on the CPU; for LoRA the network without adapters.

    Raises:
        EngineError: names student.init or student.architecture.
    """
    init = config.student.init
    if init != "teacher":
        return load(Path(init), "student.init", config).denoiser
    student = load(teacher_directory(config), "teacher.path", config).denoiser
    return student.with_network(_rebuilt(student.network, config)) if config.student.architecture else student


def fit(roles: Roles, config: Config) -> list[str]:
    """Prepare the networks for this rank's device as `model` and `vae` say, and move all but the student's there:
    DeepSpeed moves that, cast or in parts.

    Returns:
        Lines for the log.

    Raises:
        EngineError: names the key that a network cannot follow.
    """
    device, lines = ranks.device(), {}
    for role in (roles.student, roles.teacher, roles.reference):
        if role is None or id(role.network) in lines:
            continue
        try:
            dtype = weights_dtype(config) if role is roles.teacher else DTYPES[config.precision]
            operator = set_attention(role.network, _attention(config), device=device, dtype=dtype)
            lines[id(role.network)] = f"attention: {operator}"
            prepare_network(
                role.network,
                gradient_checkpointing=config.model.gradient_checkpointing and role is roles.student,
                compile=config.model.compile,
            )
            if config.model.channels_last and role.network is not roles.student.network:
                use_channels_last(role.network)  # the student's come in that order after DeepSpeed has read them
        except ValueError as error:
            raise EngineError(f"model: {error}") from None
        if role.network is not roles.student.network:
            role.network.to(device)
        fuse_kernels(role.network, config.model.fused_kernels, device)
    if roles.pipeline.vae is not None:
        if config.vae.precision != "fp32":  # as it is loaded
            roles.pipeline.vae.to(DTYPES[config.vae.precision])
        roles.pipeline.vae.to(device)
        prepare_vae(roles.pipeline.vae, slicing=config.vae.slicing, tiling=config.vae.tiling)
    return list(dict.fromkeys(lines.values()))


def fit_role(network: nn.Module, config: Config, *, trained: bool) -> None:
    """Prepare the network of an objective's role as `model` says, for this rank's device; what is no network of
    diffusers, in it or all of it, stays as it is.

    Raises:
        EngineError: names the key that it cannot follow.
    """
    from diffusers import ModelMixin

    device = ranks.device()
    for part in network.modules():
        if not isinstance(part, ModelMixin):
            continue
        try:
            set_attention(part, _attention(config), device=device, dtype=DTYPES[config.precision])
            prepare_network(
                part,
                gradient_checkpointing=config.model.gradient_checkpointing and trained,
                compile=config.model.compile,
            )
        except ValueError as error:
            raise EngineError(f"model: {error}") from None
        fuse_kernels(part, config.model.fused_kernels, device)


def _attention(config: Config) -> str:
    # xformers' choice of an operator cannot be traced
    return "sdpa" if config.model.attention == "auto" and config.model.compile else config.model.attention


def fuse_kernels(network: nn.Module, choice: str, device: torch.device) -> None:
    """Put the fused kernels into a network, as model.fused_kernels says for the device that it will run on.

    Raises:
        EngineError: "on", but the network has nothing that they replace.
    """
    if choice == "off" or (choice == "auto" and not runs_triton(torch.empty(0, device=device))):
        return
    if not patch(network) and choice == "on":
        raise EngineError(
            f"model.fused_kernels=on, but nothing in a {type(network).__name__} can be replaced; use auto or off"
        )


def save_student(config: Config, pipeline: Pipeline, values: Mapping[str, Tensor], directory: Path) -> None:
    """Write a student in diffusers format: a whole pipeline, or for LoRA the adapters.

    Args:
        pipeline: the teacher's; with LoRA, its network has the adapters.
        values: name in the network -> trained value.
        directory: empty or new.
    """
    renoise = config.student.sampler == "renoise"
    if config.lora.rank:
        adapter = pipeline.denoiser.network.peft_config[ADAPTER]
        pipeline.save_lora(directory, adapter_state(values), adapter, renoise=renoise)
        return
    network = load_student(config).network
    network.load_state_dict(dict(values), strict=False)
    pipeline.save_student(directory, network, renoise=renoise)


def adapter_state(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained values by their names in the network -> the adapter's tensors as `models.lora.lora_state` names them."""
    return {name.replace(f".{ADAPTER}.", "."): value for name, value in values.items()}


def load_exported(config: Config, directory: Path) -> Denoiser:
    """The student that `save_student` wrote, fp32 on the CPU.

    Raises:
        EngineError: a directory that cannot be loaded.
    """
    if not config.lora.rank:
        with warnings.catch_warnings():
            if config.student.sampler == "renoise":  # its scheduler is no deterministic one, and we do not sample by it
                warnings.filterwarnings("ignore", message=f"{re.escape(str(directory))}/scheduler: ")
            return load(directory, "student", config).denoiser
    pipeline = load(teacher_directory(config), "teacher.path", config)
    adapt(pipeline, config)
    try:
        load_lora_state(pipeline.denoiser.network, pipeline.read_lora(directory))
    except (LoadingError, LoraError) as error:
        raise EngineError(f"student: {directory}: {error}") from None
    return pipeline.denoiser.with_adapter(ADAPTER)


def adapt(pipeline: Pipeline, config: Config) -> None:
    """Put the adapters of `lora` into a pipeline's network.

    Raises:
        EngineError: lora.target fits no layer.
    """
    settings = config.lora
    try:
        add_lora(
            pipeline.denoiser.network,
            rank=settings.rank,
            alpha=settings.alpha,
            target=settings.target,
            seed=config.seed,
        )
    except LoraError as error:
        raise EngineError(f"lora.target: {error}") from None


INTERFACE = {
    "in_channels",
    "out_channels",
    "sample_size",
    "cross_attention_dim",
    "joint_attention_dim",
    "caption_channels",
    "pooled_projection_dim",
    "num_class_embeds",
    "num_embeds_ada_norm",
    "projection_class_embeddings_input_dim",
}
"""Entries of a network's configuration that latents and conditions depend on, so that a student must share them."""


def _rebuilt(network: nn.Module, config: Config) -> nn.Module:
    changes = config.student.architecture
    for key in changes:
        if key not in network.config or key in INTERFACE:
            allowed = sorted(set(network.config) - INTERFACE - {k for k in network.config if k.startswith("_")})
            reason = "must be the teacher's" if key in INTERFACE else f"is no entry of a {type(network).__name__}"
            raise EngineError(f"student.architecture.{key} {reason}; allowed are {', '.join(allowed)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            smaller = type(network).from_config({**network.config, **changes})
        except Exception as error:  # each model class checks its sizes in its own way
            raise EngineError(f"student.architecture={changes}: {' '.join(str(error).split())[:300]}") from None
    shapes = {name: value.shape for name, value in smaller.state_dict().items()}
    same = {name: value for name, value in network.state_dict().items() if shapes.get(name) == value.shape}
    smaller.load_state_dict(same, strict=False)
    return smaller.eval()
