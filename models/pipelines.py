"""Pipelines: all of a directory in diffusers format that distillation uses, whatever its family."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .denoiser import Condition, Denoiser, negative_prompt, null_class
from .families import FAMILIES, Family
from .loading import LoadingError, load_weights, one_line, read_json
from .quantization import KINDS, quantize
from .schedules import FLOW, load_scheduler, renoising, schedule_of
from .text import TextEncoders

if TYPE_CHECKING:
    from peft import LoraConfig

INDEX = "model_index.json"
STOCK_LORA = "pytorch_lora_weights.safetensors"
PEFT_LORA = "adapter_model.safetensors"
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Pipeline:
    """A teacher's directory: its denoiser, and the way from prompts to conditions and from latents to images.

    Attributes:
        directory: in diffusers format.
        family: what it is.
        denoiser: its network and schedule. All schedules start from N(0, 1).
        vae: the autoencoder, frozen, fp32; None: latents are pixels.
        text: the text encoders; None: conditioned on classes.
        class_names: of class models, where the directory has them.
        scheduler: diffusers' scheduler of the deterministic sampler.
        index: the content of model_index.json; empty where a directory has none.
        read_network: reads the network from the directory once more, fp32 and unquantised.
    """

    directory: Path
    family: Family
    denoiser: Denoiser
    vae: nn.Module | None
    text: TextEncoders | None
    class_names: list[str] | None
    scheduler: Any
    index: dict[str, Any]
    read_network: Callable[[], nn.Module]

    def encode(self, prompts: list[str], negative: list[str] | None, device: torch.device | str) -> Condition:
        """The condition of B prompts, tensors (B, ...) on a device, as the stock pipeline encodes them.

        The encoders run in the dtype that the pipeline was loaded in. They are loaded when needed.

        Args:
            negative: B negative prompts; None: all empty. Where the stock pipeline tells an empty negative prompt from
                none (SDXL), an empty one is none.

        Raises:
            LoadingError: encoders or tokenizers that are missing or corrupt; a pipeline that reads no text.
        """
        return self._text().encode(prompts, [""] * len(prompts) if negative is None else negative, device)

    def release_encoders(self) -> None:
        """Free the text encoders."""
        if self.text is not None:
            self.text.release()

    def text_fingerprint(self) -> str:
        """SHA-256 over text encoders, tokenizers, their dtype and the resolution: what encoded prompts depend on."""
        return self._text().fingerprint()

    def decode(self, latents: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Images (B, 3, H', W') fp32 in [0, 1] of latents (B, C, H, W), with gradients where the latents have them.

        Args:
            batch_size: most images that the autoencoder decodes at once; None: all.
        """
        parts = latents.split(batch_size or len(latents))
        return torch.cat([(self._decode(part).float() / 2 + 0.5).clamp(0, 1) for part in parts])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, H, W) fp32 of images (B, 1 or 3, H', W') in [0, 1]: the inverse of `decode`, as far as the
        autoencoder is one; of a distribution of latents, the mode."""
        images = 2 * images.float() - 1
        if self.vae is None:
            return images
        config, weight = self.vae.config, next(self.vae.parameters())
        encoded = self.vae.encode(images.to(weight.device, weight.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        mean, std = self._statistics(latents)
        if mean is not None:
            return ((latents - mean) * config.scaling_factor / std).float()
        return ((latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor).float()

    def save_student(self, directory: str | Path, network: nn.Module, *, renoise: bool = False) -> None:
        """Write a student as a whole directory that stock diffusers loads and samples as we do.

        The other components are hard links to the teacher's files, or copies where the file system has no links.

        Args:
            directory: created; must not hold anything.
            network: a diffusers model with its full weights, in any precision that is not quantised.
            renoise: with the scheduler of multi-step consistency sampling instead of the eta = 0 sampler's.
        """
        directory = _empty(directory)
        component = self.family.component
        for name, entry in self.index.items():
            if isinstance(entry, list) and entry[0] is not None and name not in (component, "scheduler"):
                shutil.copytree(self.directory / name, directory / name, copy_function=_link)
        network.save_pretrained(directory / component, safe_serialization=True)
        scheduler = renoising(self.scheduler) if renoise else self.scheduler
        scheduler.save_pretrained(directory / "scheduler")
        name = type(scheduler).__name__
        if not self.family.has_vae and name == FLOW:
            return  # diffusers has no pipeline for a flow without text, so such a student is loaded by its two parts
        index = {"_class_name": self.family.pipelines[0], **self.index}
        if not self.family.has_vae and renoise:
            index["_class_name"] = "DDPMPipeline"  # DDIMPipeline puts its own scheduler in place of any other
        index |= {component: ["diffusers", type(network).__name__], "scheduler": ["diffusers", name]}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def save_lora(
        self, directory: str | Path, state: Mapping[str, Tensor], config: LoraConfig, *, renoise: bool = False
    ) -> None:
        """Write a LoRA adapter for the stock pipeline's `load_lora_weights`, or for peft where it has none.

        Args:
            directory: created; must not hold anything.
            state: the adapter's tensors, named as `models.lora.lora_state` names them.
            config: that the adapter was made with.
            renoise: say how to set the scheduler of multi-step consistency sampling.
        """
        import diffusers
        from safetensors.torch import save_file

        directory = _empty(directory)
        component = self.family.component
        state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        pipeline = getattr(diffusers, self.family.pipelines[0])
        if hasattr(pipeline, "save_lora_weights"):
            settings = {f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": config.to_dict()}
            pipeline.save_lora_weights(directory, weight_name=STOCK_LORA, **settings)
            how = f"pipeline.load_lora_weights({directory.name!r})"
        else:
            config.save_pretrained(directory)
            named = {f"base_model.model.{name}": value for name, value in state.items()}
            save_file(named, directory / PEFT_LORA, metadata={"format": "pt"})
            how = f"pipeline.{component} = peft.PeftModel.from_pretrained(pipeline.{component}, {directory.name!r})"
        if renoise:
            scheduler = renoising(self.scheduler)
            scheduler.save_pretrained(directory / "scheduler")
            folder = f"{directory.name}/scheduler"
            how += f"\n    pipeline.scheduler = diffusers.{type(scheduler).__name__}.from_pretrained({folder!r})"
        (directory / "README.md").write_text(
            f"A LoRA adapter for a {self.family.name} pipeline. With the teacher loaded by diffusers:\n\n    {how}\n"
        )

    def read_lora(self, directory: str | Path) -> dict[str, Tensor]:
        """The tensors of an adapter that `save_lora` wrote, named as `models.lora.lora_state` names them.

        Raises:
            LoadingError: there is none, or its file is damaged.
        """
        from safetensors.torch import load_file

        prefixes = {STOCK_LORA: f"{self.family.component}.", PEFT_LORA: "base_model.model."}
        for name, prefix in prefixes.items():
            path = Path(directory) / name
            if path.is_file():
                try:
                    return {key.removeprefix(prefix): value for key, value in load_file(path).items()}
                except Exception as error:  # safetensors has kinds of its own for truncated and foreign files
                    raise LoadingError(f"{path} cannot be loaded: {one_line(error)}") from None
        raise LoadingError(f"{directory} holds no LoRA adapter; it needs {' or '.join(prefixes)}")

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents
        config, weight = self.vae.config, next(self.vae.parameters())
        latents = latents.to(weight.device, weight.dtype)
        mean, std = self._statistics(latents)
        if mean is not None:
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.vae.decode(latents, return_dict=False)[0]

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mean and deviation of the autoencoder's own latents, where it has them, as fine-tuned ones of SDXL do."""
        mean, std = (self.vae.config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return None, None
        return tuple(torch.tensor(value).to(latents).view(1, -1, 1, 1) for value in (mean, std))

    def _text(self) -> TextEncoders:
        if self.text is None:
            raise LoadingError(f"{self.directory} is conditioned on classes and encodes no prompts")
        return self.text


def load_pipeline(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    resolution: tuple[int, int] | None = None,
    quantization: str | None = None,
    network: bool = True,
) -> Pipeline:
    """Load a pipeline of any supported family from its directory in diffusers format; its text encoders later.

    Args:
        dtype: of the network (of what it computes in, when it is quantised) and of the text encoders.
        resolution: (H, W) in pixels; None: what the stock pipeline takes.
        quantization: "int8" or "nf4" stores the network's linear layers so, by bitsandbytes.
        network: False leaves the network and the autoencoder on the meta device, with their configurations and without
            weights.

    Raises:
        LoadingError: names the directory, what is wrong with it or the request, and what is possible.
    """
    import diffusers

    if quantization not in (None, *KINDS):
        raise LoadingError(f"quantization={quantization!r} is not one of {', '.join(KINDS)}")
    directory = Path(directory)
    index = _read_index(directory)
    family = _family(directory, index)
    kind = getattr(diffusers, family.network)
    given = _network_config(directory, family)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and not (directory / name).is_dir():
            raise LoadingError(f"{directory} has no {name}/, which its {INDEX} names; give the whole directory")
    flow = family.set_timesteps is not None
    scheduler = load_scheduler(directory, flow=flow, forced=family.scheduler)

    def read(dtype: torch.dtype) -> nn.Module:
        if network:
            return load_weights(kind, directory, family.component, torch_dtype=dtype)
        with torch.device("meta"):
            return kind.from_config(given).to(dtype).eval()

    loaded = read(dtype)
    if network and quantization is not None:
        quantize(loaded, quantization, dtype)
    config = loaded.config
    classes = family.classes(config)
    if classes is not None and classes < 1:
        raise LoadingError(
            f"{directory}/{family.component} has num_class_embeds={config.get('num_class_embeds')}; "
            "at least one class and the null class of guidance are needed"
        )
    vae = _load_vae(directory, family, config, weights=network)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    shape = _latent_shape(directory, family, config, factor, resolution)
    height, width = shape[1:]
    tokens = (height // family.patch(config)) * (width // family.patch(config))

    def flow_arguments(steps: int) -> dict[str, Any]:
        return family.set_timesteps(scheduler.config, steps, tokens)

    denoiser = Denoiser(
        network=loaded,
        schedule=schedule_of(scheduler, flow_arguments if flow else None),
        latent_shape=shape,
        call=family.call,
        unconditional=negative_prompt if classes is None else null_class(classes),
        guidance_kind=family.guidance_kind(config),
        classes=classes,
    )
    text = None
    if family.encode is not None:
        text = TextEncoders(directory, family, index, loaded, (height * factor, width * factor), dtype)
    names = _class_names(index, classes)
    read_fresh = partial(read, torch.float32)
    return Pipeline(directory, family, denoiser, vae, text, names, scheduler, index, read_fresh)


def _read_index(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise LoadingError(f"{directory} is not a directory; give one in diffusers format, with a {INDEX}")
    # A flow without text has no pipeline in diffusers, so its directory has no index.
    if not (directory / INDEX).exists() and (directory / "unet" / "config.json").is_file():
        return {}
    return read_json(directory, INDEX)


def _family(directory: Path, index: dict[str, Any]) -> Family:
    name = index.get("_class_name", FAMILIES[0].pipelines[0])
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    supported = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise LoadingError(f"{directory} is a {name}; supported are {supported}")


def _network_config(directory: Path, family: Family) -> dict[str, Any]:
    config = read_json(directory, f"{family.component}/config.json")
    name = config.get("_class_name", family.network)
    # DiT and PixArt were published as Transformer2DModel, which diffusers reads as the two classes of today.
    if name not in (family.network, "Transformer2DModel" if family.component == "transformer" else None):
        raise LoadingError(f"{directory}/{family.component} is a {name}; a {family.name} needs a {family.network}")
    return config


def _load_vae(directory: Path, family: Family, config: dict[str, Any], *, weights: bool) -> nn.Module | None:
    import diffusers

    if not family.has_vae:
        return None
    name = read_json(directory, "vae/config.json").get("_class_name")
    if name not in AUTOENCODERS:
        raise LoadingError(f"{directory}/vae is a {name}; supported are {', '.join(AUTOENCODERS)}")
    kind = getattr(diffusers, name)
    if weights:
        vae = load_weights(kind, directory, "vae", torch_dtype=torch.float32)
    else:
        with torch.device("meta"):
            vae = kind.from_config(read_json(directory, "vae/config.json")).eval()
    vae.requires_grad_(False)
    channels = family.latent_shape(config)[0]
    if vae.config.latent_channels != channels:
        raise LoadingError(
            f"{directory}/vae decodes {vae.config.latent_channels} channels, and {family.component} gives {channels}; "
            "they are not of one pipeline"
        )
    return vae


def _latent_shape(
    directory: Path, family: Family, config: dict[str, Any], factor: int, resolution: tuple[int, int] | None
) -> tuple[int, int, int]:
    shape = family.latent_shape(config)
    if resolution is None:
        if None in shape:
            raise LoadingError(f"{directory} does not say the size of its images; give a resolution")
        return shape
    height, width = resolution
    unit = factor * family.patch(config)
    if not family.resizable and (height // factor, width // factor) != shape[1:]:
        own = f"{shape[1] * factor}x{shape[2] * factor}"
        raise LoadingError(f"resolution {height}x{width}: a {family.name} draws only its own, {own}")
    if height < unit or width < unit or height % unit or width % unit:
        raise LoadingError(f"resolution {height}x{width}: both sides must be multiples of {unit} for {directory}")
    largest = family.largest(config)
    if largest is not None and max(resolution) > largest * factor:
        raise LoadingError(f"resolution {height}x{width}: the longest side of {directory} is {largest * factor}")
    return shape[0], height // factor, width // factor


def _class_names(index: dict[str, Any], classes: int | None) -> list[str] | None:
    names = index.get("id2label")
    if not classes or not isinstance(names, dict):
        return None
    return [names.get(str(number), str(number)) for number in range(classes)]


def _empty(directory: str | Path) -> Path:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise LoadingError(f"{directory} is not empty and is not overwritten; name another folder")
    return directory


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)
