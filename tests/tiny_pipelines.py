"""Tiny pipelines of random weights, one of each model family, written by stock diffusers in the real format.

Every one has latents 8x8 and images 16x16 (`RESOLUTION`; FLUX and nothing else must be asked for it, its stock default
is 128x128 latents), networks below 300k parameters, and its own tokenizers, whose vocabularies are made here.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

RESOLUTION = (16, 16)
WORDS = ("a", "the", "red", "blue", "cat", "dog", "house", "tree", "on", "of", "in", "two", "photo", "green")
CLIP_WIDTHS = {"sdxl": (16, 24), "sd3": (16, 24), "sd35": (16, 24)}  # of the two text encoders; elsewhere one of 32
T5_WIDTH = 40


def build(family: str, directory: Path, *, seed: int = 0, **settings) -> Path:
    """Write a tiny pipeline of a family of `FAMILIES`, with its settings, to a new directory, and return it.

    A seed gives the same weights each time. They are larger than those of a fresh network, and none is zero, so that
    prompts, timesteps and every layer show in the images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[family](**settings)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                _wake(component)
    pipeline.save_pretrained(directory)
    for config in directory.glob("tokenizer*/tokenizer_config.json"):
        if json.loads(config.read_text())["tokenizer_class"] == "CLIPTokenizer":
            _write_clip_vocabulary(config.parent)
    return directory


def draw(
    pipeline,
    latents: torch.Tensor,
    *,
    steps: int,
    guidance: float,
    prompts: list[str] | None = None,
    negative: list[str] | None = None,
    class_labels: list[int] | None = None,
    resolution: tuple[int, int] = RESOLUTION,
) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of a stock pipeline, from latents (B, C, h, w), with its own sampling loop."""
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    pipeline.set_progress_bar_config(disable=True)
    kind = type(pipeline).__name__
    if kind == "DiTPipeline":  # draws its own latents, so its random numbers are replaced
        with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=latents):
            return pipeline(class_labels, **arguments).images
    arguments |= {"prompt": prompts, "height": resolution[0], "width": resolution[1]}
    if kind == "FluxPipeline":
        return pipeline(latents=pipeline._pack_latents(latents, *latents.shape), **arguments).images
    if kind.startswith("PixArt"):
        arguments["use_resolution_binning"] = False
        negative = "" if negative is None else negative
    return pipeline(latents=latents, negative_prompt=negative, **arguments).images


def _wake(module: nn.Module) -> None:
    """Add noise to all vectors, which stock initialisation leaves at 0 and 1, and enlarge what is tiny."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.std() < 0.05 and "decoder" not in name:
                parameter.normal_(std=0.1)


# ---------------------------------------------------------------------- the families


def _sd(prediction_type: str = "epsilon"):
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

    settings = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction_type,
    }  # fmt: skip
    if prediction_type == "epsilon":  # as SD 1.x ships; SD 2.1 ships DDIM
        scheduler = PNDMScheduler(skip_prk_steps=True, **settings)
        scheduler.register_to_config(clip_sample=False)
    else:
        scheduler = DDIMScheduler(clip_sample=False, **settings)
    return StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=32, use_linear_projection=prediction_type != "epsilon"),
        vae=_vae(),
        text_encoder=_clip(32),
        tokenizer=_clip_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    first, second = CLIP_WIDTHS["sdxl"]
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionXLPipeline(
        unet=_unet(
            cross_attention_dim=first + second,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + second,
            transformer_layers_per_block=(1, 2),
        ),
        vae=_vae(force_upcast=True),
        text_encoder=_clip(first),
        text_encoder_2=_clip(second, projected=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(pad_token="!"),
        scheduler=scheduler,
        add_watermarker=False,
    )


def _dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer, _vae(), DDIMScheduler(clip_sample=False))
    pipeline.register_to_config(id2label={number: f"class {number}, number {number}" for number in range(1000)})
    return pipeline


def _pixart_alpha(sample_size: int = 8):  # 128, as the 1024-pixel weights have it, is told the size of the image
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    return PixArtAlphaPipeline(scheduler=DPMSolverMultistepScheduler(), **_pixart(sample_size))


def _pixart_sigma():
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(scheduler=DPMSolverMultistepScheduler(), **_pixart(8))


def _pixart(sample_size: int) -> dict:
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        sample_size=sample_size, cross_attention_dim=24, caption_channels=T5_WIDTH, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return {
        "transformer": transformer, "vae": _vae(), "text_encoder": _t5(), "tokenizer": _t5_tokenizer(),
    }  # fmt: skip


def _sd3(**settings):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second = CLIP_WIDTHS["sd3"]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=T5_WIDTH, caption_projection_dim=32, pos_embed_max_size=8,
        pooled_projection_dim=first + second, **settings,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=_clip(first, projected=True),
        text_encoder_2=_clip(second, projected=True),
        text_encoder_3=_t5(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(pad_token="!"),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux(guidance_embeds: bool):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=32, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True) if guidance_embeds else None
    return FluxPipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=_clip(32),
        text_encoder_2=_t5(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
    )


FAMILIES = {
    "sd": _sd,
    "sd2": partial(_sd, "v_prediction"),
    "sdxl": _sdxl,
    "dit": _dit,
    "pixart-alpha": _pixart_alpha,
    "pixart-sigma": _pixart_sigma,
    "sd3": _sd3,
    "sd35": partial(_sd3, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": partial(_flux, guidance_embeds=True),
    "flux-schnell": partial(_flux, guidance_embeds=False),
}


# ---------------------------------------------------------------------- their components


def _unet(**settings) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 24), norm_num_groups=8,
        layers_per_block=1, attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **settings,
    )  # fmt: skip


def _vae(*, latent_channels: int = 4, use_quant_conv: bool = True, **settings) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=latent_channels,
        use_quant_conv=use_quant_conv, use_post_quant_conv=use_quant_conv, sample_size=16, **settings,
    )  # fmt: skip


def _clip(width: int, *, projected: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(_clip_vocabulary())
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, projection_dim=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=1,
        initializer_factor=3.0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_t5_vocabulary()), d_model=T5_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


# ---------------------------------------------------------------------- their tokenizers


def _clip_vocabulary() -> dict[str, int]:
    """Letters, letters that end a word, the pairs of `_clip_merges`, and the special tokens last, as in CLIP's own."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [pair.replace(" ", "") for pair in _clip_merges()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _clip_merges() -> list[str]:
    return ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>", "r e", "re d</w>", "o n</w>"]


def _clip_tokenizer(pad_token: str = "<|endoftext|>"):
    from transformers import CLIPTokenizer

    merges = [tuple(pair.split()) for pair in _clip_merges()]
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=merges, pad_token=pad_token, model_max_length=77)


def _write_clip_vocabulary(folder: Path) -> None:
    """The two files that CLIP tokenizers are published in, instead of the one that is written now."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(_clip_vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_clip_merges()]) + "\n")


def _t5_vocabulary() -> list[tuple[str, float]]:
    """Unigram pieces with their log-probabilities: the special tokens, whole words, and every letter."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.1 * rank) for rank, word in enumerate(WORDS)]
    return pieces + [(letter, -8.0) for letter in letters]


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=512)
