"""Denoisers from directories in diffusers format, and back."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .denoiser import Denoiser
from .schedules import DiffusionSchedule, FlowSchedule, Schedule


class LoadingError(ValueError):
    """A directory that is missing, corrupt or of a kind that is not supported."""


def load_denoiser(directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Denoiser:
    """Load a class-conditional UNet and its schedule from a diffusers pipeline directory.

    Args:
        directory: holds `unet/` (a `UNet2DModel` with `num_class_embeds`; its last class is the null class of guidance)
            and `scheduler/` (`FlowMatchEulerDiscreteScheduler`, or one whose configuration `DDIMScheduler` reads).
        dtype: of the weights.

    Raises:
        LoadingError: names the directory and what is missing, corrupt or unsupported.
    """
    from diffusers import UNet2DModel

    directory = Path(directory)
    if not directory.is_dir():
        raise LoadingError(f"{directory} is not a directory; give one in diffusers format, with unet/ and scheduler/")
    class_name = _read_config(directory, "unet/config.json").get("_class_name", "UNet2DModel")
    if class_name != "UNet2DModel":
        raise LoadingError(f"{directory}/unet is a {class_name}; a class-conditional UNet2DModel is supported")
    try:
        network = UNet2DModel.from_pretrained(
            directory, subfolder="unet", torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False
        )
        scheduler = _scheduler(directory)
    except Exception as error:  # diffusers and safetensors raise many kinds for truncated or foreign files
        raise LoadingError(f"{directory} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    classes = (network.config.num_class_embeds or 0) - 1
    if classes < 1:
        raise LoadingError(
            f"{directory}/unet has num_class_embeds={network.config.num_class_embeds}; "
            "at least one class and the null class of guidance are needed"
        )
    size = network.config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return Denoiser(
        network=network.eval(),
        schedule=_schedule(scheduler),
        latent_shape=(network.config.in_channels, height, width),
        classes=classes,
        unconditional=lambda condition: {"class_labels": torch.full_like(condition["class_labels"], classes)},
    )


def save_denoiser(directory: str | Path, network: nn.Module, schedule_of: str | Path) -> None:
    """Write a network and a copy of a teacher's schedule as a directory that stock diffusers loads.

    Args:
        directory: created; must not hold anything.
        network: a diffusers model with its full weights.
        schedule_of: the diffusers directory whose scheduler goes along.
    """
    from diffusers import DDIMScheduler

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise LoadingError(f"{directory} is not empty and is not overwritten; name another folder")
    network.save_pretrained(directory / "unet", safe_serialization=True)
    scheduler = _scheduler(Path(schedule_of))
    scheduler.save_pretrained(directory / "scheduler")
    # diffusers has no pipeline for a flow without text, so such a student is loaded by its two parts.
    if isinstance(scheduler, DDIMScheduler):
        parts = {"unet": ["diffusers", type(network).__name__], "scheduler": ["diffusers", "DDIMScheduler"]}
        index = json.dumps({"_class_name": "DDIMPipeline", **parts}, indent=2)
        (directory / "model_index.json").write_text(index + "\n")


def fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 over weights and configuration of a denoiser's network: equal networks, equal fingerprints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(denoiser.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    config = {key: value for key, value in denoiser.network.config.items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _read_config(directory: Path, part: str) -> dict[str, object]:
    path = directory / part
    if not path.is_file():
        raise LoadingError(
            f"{directory} has no {part}; give a directory in diffusers format, with unet/ and scheduler/"
        )
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadingError(f"{path} is corrupt: {error}") from None
    if not isinstance(config, dict):
        raise LoadingError(f"{path} is corrupt: it holds a {type(config).__name__} instead of a mapping")
    return config


def _scheduler(directory: Path) -> Any:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = _read_config(directory, "scheduler/scheduler_config.json")
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        return FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler")
    cuts = [key for key in ("clip_sample", "thresholding") if config.get(key)]
    if cuts:
        # A cut is not affine, so no Gaussian policy has it; what is exported samples as it was trained.
        warnings.warn(
            f"{directory}/scheduler has {' and '.join(f'{key}=true' for key in cuts)}; the sampler's steps are affine "
            "and cut nothing, so its images differ from those of the stock scheduler",
            stacklevel=3,
        )
    return DDIMScheduler.from_pretrained(directory, subfolder="scheduler", clip_sample=False, thresholding=False)


def _schedule(scheduler: Any) -> Schedule:
    available = scheduler.config.num_train_timesteps

    def set_steps(steps: int) -> None:
        if not 1 <= steps <= available:
            raise LoadingError(f"{steps} steps of a schedule of {available}; give between 1 and {available}")
        scheduler.set_timesteps(steps)

    def timesteps(steps: int) -> torch.Tensor:
        set_steps(steps)
        return scheduler.timesteps.clone()

    def sigmas(steps: int) -> torch.Tensor:
        set_steps(steps)
        return scheduler.sigmas.double()

    if not hasattr(scheduler, "alphas_cumprod"):
        return FlowSchedule(sigmas)
    return DiffusionSchedule(
        alphas_cumprod=scheduler.alphas_cumprod.double(),
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
        prediction_type=scheduler.config.prediction_type,
        timesteps=timesteps,
    )
