"""A run's networks without weights: read from config.json files, put together as the trainer does, on fake tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import CONFIGS, Config
from engine.errors import EngineError
from engine.kernels import patch
from engine.models.denoiser import NEGATIVE, Condition, Denoiser
from engine.models.digits import TEACHER_DIR
from engine.models.loading import LoadingError
from engine.models.lora import ADAPTER, LoraError, add_lora
from engine.models.memory import prepare_network, prepare_vae, select_trainable
from engine.models.pipelines import Pipeline, load_pipeline
from engine.planning.quantized import imitate, weight_bytes
from engine.precision import DTYPES, weights_dtype

ARCHITECTURES = CONFIGS / "architectures"
"""Directories of config.json files of public pipelines and encoders, named as the directories that are downloaded."""

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""Tensors with shapes and lifetimes, and without data; all of the plan's are of this one mode."""


def locate(path: str) -> Path:
    """The directory of config.json files that a path of the configuration means.

    A path that does not exist is looked up by its last part among the shipped architectures.

    Raises:
        EngineError: names the path and the shipped architectures.
    """
    directory = TEACHER_DIR if path == "digits" else Path(path).expanduser()
    if directory.is_dir():
        return directory
    shipped = ARCHITECTURES / directory.name
    if shipped.is_dir() and directory.name:
        return shipped
    names = ", ".join(sorted(entry.name for entry in ARCHITECTURES.iterdir()))
    raise EngineError(
        f"{path} does not exist; give a directory in diffusers format (its config.json files are enough for a plan), "
        f"or a path that ends in one of {names}"
    )


@dataclass(frozen=True)
class Networks:
    """The networks of a run, all on FAKE's CPU.

    Attributes:
        pipeline: of the teacher; its network and autoencoder are those below.
        teacher, student, reference: as in `engine.roles`.
        resident: role -> bytes of its weights, of those networks that DeepSpeed does not hold.
        trainable: elements of each trainable parameter.
        frozen: elements of each frozen parameter that DeepSpeed holds.
        quantized: bytes of the student's frozen weights where they are quantised; None: they are not.
        vae_bytes: of the autoencoder's weights.
    """

    pipeline: Pipeline
    teacher: Denoiser
    student: Denoiser
    reference: Denoiser | None
    resident: Mapping[str, int]
    trainable: tuple[int, ...]
    frozen: tuple[int, ...]
    quantized: int | None
    vae_bytes: int


def build(config: Config, directory: Path) -> Networks:
    """The networks of a run.

    Args:
        directory: of the teacher.

    Raises:
        EngineError: names the key: a directory without what is needed, adapters or an architecture that do not fit.
    """
    pipeline = load(directory, config, "teacher.path")
    teacher, precision = pipeline.denoiser, config.teacher.precision
    quantized = precision in ("int8", "nf4")
    low, base = DTYPES[config.precision], weights_dtype(config)
    stored = stored_bytes(teacher.network, base, precision if quantized else None)
    reference = None
    if config.lora.rank:
        settings = config.lora
        teacher.network.requires_grad_(False)
        try:
            with torch.device("meta"):
                add_lora(teacher.network, rank=settings.rank, alpha=settings.alpha, target=settings.target)
        except LoraError as error:
            raise EngineError(f"lora.target: {error}") from None
        # DeepSpeed casts everything to its own low precision
        materialize(teacher.network, low if config.precision != "fp32" else base, adapters=low)
        student, resident = teacher.with_adapter(ADAPTER), {}
        reference = teacher if config.objective.kl_coef else None
    else:
        student = _student(config, directory, teacher)
        try:
            select_trainable(student.network, config.student.trainable)
        except ValueError as error:
            raise EngineError(f"student.trainable={config.student.trainable}: {error}") from None
        materialize(student.network, low)
        materialize(teacher.network, base).requires_grad_(False)
        resident = {"teacher": stored}
        if config.objective.kl_coef:
            frozen = _student(config, directory, teacher).network.requires_grad_(False)
            reference = student.with_network(materialize(frozen, low))
            resident["reference"] = stored_bytes(frozen, low)
    for role in {id(role.network): role for role in (student, teacher, reference) if role is not None}.values():
        fit(role.network, config, trained=role.network is student.network)
    if quantized:
        imitate(teacher.network, precision)
    return Networks(
        pipeline=pipeline,
        teacher=teacher,
        student=student,
        reference=reference,
        resident=resident,
        trainable=tuple(p.numel() for p in student.network.parameters() if p.requires_grad),
        frozen=tuple(p.numel() for p in student.network.parameters() if not p.requires_grad),
        quantized=stored if quantized and config.lora.rank else None,
        vae_bytes=0 if pipeline.vae is None else stored_bytes(pipeline.vae, DTYPES[config.vae.precision]),
    )


def load(directory: Path, config: Config, key: str) -> Pipeline:
    """A pipeline whose network is on the meta device and whose autoencoder is fake.

    Raises:
        EngineError: names the key of the directory.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # what it says of a cast does not hold without weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the scheduler, which the run itself gives
            pipeline = load_pipeline(directory, resolution=config.teacher.resolution, network=False)
    except LoadingError as error:
        raise EngineError(f"{key}: {error}") from None
    if pipeline.vae is not None:
        materialize(pipeline.vae, DTYPES[config.vae.precision])
        prepare_vae(pipeline.vae, slicing=config.vae.slicing, tiling=config.vae.tiling)
    return pipeline


def _student(config: Config, directory: Path, teacher: Denoiser) -> Denoiser:
    """The student before training, on the meta device."""
    if config.student.init != "teacher":
        return load(locate(config.student.init), config, "student.init").denoiser
    settings = {**teacher.network.config, **config.student.architecture}
    try:
        with torch.device("meta"):
            return teacher.with_network(type(teacher.network).from_config(settings).eval())
    except Exception as error:  # each model class checks its sizes in its own way
        raise EngineError(f"student.architecture={config.student.architecture}: {error}") from None


def fit(network: nn.Module, config: Config, *, trained: bool) -> None:
    """Prepare what is a network of diffusers, in a module or all of it, as `engine.roles` does on a GPU.

    Raises:
        EngineError: names the key that it cannot follow.
    """
    from diffusers import ModelMixin

    for part in network.modules():
        if not isinstance(part, ModelMixin):
            continue
        try:
            prepare_network(part, gradient_checkpointing=config.model.gradient_checkpointing and trained)
        except ValueError as error:
            raise EngineError(f"model: {error}") from None
        if config.model.fused_kernels != "off":  # "auto" is on a GPU, which the plan is for
            patch(part)


def materialize(network: nn.Module, dtype: torch.dtype, *, adapters: torch.dtype | None = None) -> nn.Module:
    """Give a network on the meta device fake tensors on the CPU, floating ones of `dtype`, in place.

    Args:
        adapters: of what requires gradients; None: as all others.
    """
    with FAKE:
        for module in network.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    target = dtype if adapters is None or not value.requires_grad else adapters
                    fake = torch.empty(value.shape, dtype=target if value.is_floating_point() else value.dtype)
                    module._parameters[key] = nn.Parameter(fake, requires_grad=value.requires_grad)
            for key, value in module._buffers.items():
                if value is not None:
                    fake = dtype if value.is_floating_point() else value.dtype
                    module._buffers[key] = torch.empty(value.shape, dtype=fake)
    return network


def stored_bytes(network: nn.Module, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of a network's weights and buffers, floating ones in a dtype, and linear layers' weights quantised."""
    layers = {id(m.weight) for m in network.modules() if type(m) is nn.Linear} if quantization else set()
    total = 0
    for value in [*network.parameters(), *network.buffers()]:
        if id(value) in layers:
            total += weight_bytes(quantization, value)
        else:
            total += value.numel() * (dtype.itemsize if value.is_floating_point() else value.element_size())
    return total


# ---------------------------------------------------------------------- conditions


def _text(config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (tokens, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        times = 6 * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (config["projection_class_embeddings_input_dim"] - times,), "time_ids": (6,)}
    return shapes


def _pixart(config: Mapping[str, Any], tokens: int) -> dict[str, tuple[int, ...]]:
    shapes = {"encoder_hidden_states": (tokens, config["caption_channels"]), "encoder_attention_mask": (tokens,)}
    if config["sample_size"] == 128:
        shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
    return shapes


CLIP_TOKENS = 77
CONDITIONS: dict[str, Callable[[Mapping[str, Any], int], dict[str, tuple[int, ...]]]] = {
    "UNet2DConditionModel": _text,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": lambda config, tokens: {
        "encoder_hidden_states": (CLIP_TOKENS + tokens, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    },
    "FluxTransformer2DModel": lambda config, tokens: {
        "encoder_hidden_states": (tokens, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    },
}
"""diffusers' class of a network that reads text -> shapes of a condition's row: from its config and the most tokens."""


def condition(pipeline: Pipeline, rows: int, dtype: torch.dtype) -> Condition:
    """Fake conditions as they come from the prompt cache or from classes, tensors (rows, ...)."""
    family, network = pipeline.family, pipeline.denoiser.network
    if pipeline.denoiser.classes is not None:
        return {"class_labels": torch.zeros(rows, dtype=torch.int64)}
    tokens = next(iter(family.max_tokens.values()))
    shapes = CONDITIONS[family.network](network.config, tokens)
    result: dict[str, Tensor] = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in shapes.items()}
    if pipeline.denoiser.guidance_kind == "classifier_free":
        shared = ("time_ids", "resolution", "aspect_ratio")
        result |= {NEGATIVE + name: torch.empty_like(value) for name, value in result.items() if name not in shared}
    return result


# ---------------------------------------------------------------------- encoders


def transformers_model(directory: Path, kind: str) -> nn.Module:
    """A transformers model on the meta device, of a directory's config.json.

    Args:
        kind: name of its class; "AutoModel" is what config.json says.
    """
    import transformers

    settings = json.loads((directory / "config.json").read_text())
    config = transformers.AutoConfig.for_model(**{"model_type": settings.pop("model_type"), **settings})
    with torch.device("meta"):
        make = getattr(transformers, kind)
        return (make.from_config(config) if kind == "AutoModel" else make(config)).eval()


def text_encoders(pipeline: Pipeline) -> list[tuple[Path, str]]:
    """(directory, transformers' class) of each text encoder."""
    return [
        (pipeline.directory / name, entry[1])
        for name, entry in pipeline.index.items()
        if name.startswith("text_encoder") and isinstance(entry, list) and entry[0] is not None
    ]
