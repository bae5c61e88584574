"""What is trained: a network that is teacher and initial student, and the configuration that every loop reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config, load_config
from engine.models.denoiser import Denoiser, null_class
from engine.models.digits import TEACHER_DIR
from engine.models.pipelines import load_pipeline

COMMON = {
    "teacher": {"steps": 50},
    "student": {"steps": 5},
    "rollout": {"group_size": 8},
    # The trained student itself is judged: the other recipes' averages differ, and none is part of the algorithm.
    "ema": {"decay": 0.0},
    "train": {"threads": 1},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and its sizes.

    Attributes:
        network: builds the teacher, fp32, from fixed weights.
        latent_shape: (C, H, W).
        classes: number of conditions that differ in more than their noise.
        settings: configuration beside COMMON; `rollout.pool` conditions are visited `iterations * conditions / pool`
            times each.
        seeds: number of training seeds.
        judged: whether the reward after training means anything; with random weights it does not.
    """

    network: Callable[[], nn.Module]
    latent_shape: tuple[int, int, int]
    classes: int
    settings: dict[str, Any]
    seeds: int = 1
    judged: bool = False

    def config(self, seed: int, **overrides: Any) -> Config:
        """The configuration of one seed; `overrides` are whole sections."""
        sections = {**COMMON, **self.settings, **overrides}
        merged = {
            key: {**COMMON.get(key, {}), **self.settings.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in sections.items()
        }
        return load_config({**merged, "seed": seed})

    def teacher(self, device: torch.device, precision: str) -> Denoiser:
        """The frozen teacher on a device, in bf16 where the run is."""
        with device:  # random weights of billions of parameters are drawn where they are needed
            network = self.network().eval().requires_grad_(False).to(device)
        # All problems read the digits' schedule (DDIM, linear, epsilon): the cost of a step does not depend on it.
        return dataclasses.replace(
            load_pipeline(TEACHER_DIR, network=False).denoiser,
            network=network.to(torch.bfloat16) if precision == "bf16" else network,
            latent_shape=self.latent_shape,
            classes=self.classes,
            unconditional=null_class(self.classes),
        )


class TextConditioned(nn.Module):
    """A text-conditional UNet with one random prompt embedding per class, called like a class-conditional network."""

    def __init__(self, unet: nn.Module, prompts: int) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self.register_buffer("text", torch.randn(prompts, 77, unet.config.cross_attention_dim))
        pooled = None
        if unet.config.addition_embed_type == "text_time":
            times = 6 * unet.config.addition_time_embed_dim
            pooled = torch.randn(prompts, unet.config.projection_class_embeddings_input_dim - times)
        self.register_buffer("pooled", pooled)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        text, added = self.text[class_labels].to(x), None  # DeepSpeed leaves buffers in fp32
        if self.pooled is not None:
            added = {"text_embeds": self.pooled[class_labels].to(x), "time_ids": x.new_zeros(len(x), 6)}
        return self.unet(x, timestep, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def _digits_unet() -> nn.Module:
    return load_pipeline(TEACHER_DIR).denoiser.network


def dit(**config: Any) -> nn.Module:
    """A class-conditional DiT of random weights that predicts noise only."""
    from diffusers import DiTTransformer2DModel

    return _seeded(lambda: DiTTransformer2DModel(out_channels=config["in_channels"], **config))


def text_unet(prompts: int, **config: Any) -> nn.Module:
    """A Stable-Diffusion UNet of random weights and random prompt embeddings."""
    from diffusers import UNet2DConditionModel

    return _seeded(lambda: TextConditioned(UNet2DConditionModel(**config), prompts))


def _cpu_settings(iterations: int, pool: int) -> dict[str, Any]:
    return {
        "iterations": iterations,
        # As many samples in a pass for ours as for the plain recipes, which train on one step of a rollout at a time.
        "rollout": {"conditions": 16, "pool": pool},
        "train": {"micro_batch": 128},
        "reward": {"terms": {"pixel": 1.0}},
        # A tenth of the default's, for a tenth of its samples. Chosen on seeds 10 and 11; at no rate from 2e-6 to 5e-5,
        # nor with eta 1, did the reference's recipe or the Flow-GRPO-style loop gain on the initial student.
        "optimizer": {"lr": 2e-5},
    }


def _gpu_settings(conditions: int, batch: int) -> dict[str, Any]:
    return {
        "precision": "bf16",
        "iterations": 8,
        "rollout": {"conditions": conditions, "pool": 4 * conditions, "batch_size": batch},
        # Rounding in bf16 is multiplied by |b| / std, and random weights are no reason to stop a measurement.
        "train": {"threads": None, "micro_batch": batch, "ratio_tolerance": 1.0},
        "reward": {"terms": {"pixel": 1.0}},
        "optimizer": {"lr": 1e-6},  # costs what any other does, and cannot diverge in a few iterations
    }


_SDXL = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SMALL_DIT = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "num_layers": 4, "sample_size": 8}

PROBLEMS = {
    "cpu": {
        "digits_unet": Problem(
            _digits_unet,
            (1, 8, 8),
            10,
            _cpu_settings(iterations=16, pool=80),
            seeds=3,
            judged=True,
        ),
        "small_dit": Problem(
            lambda: dit(**_SMALL_DIT, num_embeds_ada_norm=10),
            (1, 8, 8),
            10,
            _cpu_settings(iterations=8, pool=64),
        ),
    },
    "cuda": {
        "sd15": Problem(
            lambda: text_unet(10, sample_size=64, cross_attention_dim=768), (4, 64, 64), 10, _gpu_settings(4, 16)
        ),
        "sdxl": Problem(lambda: text_unet(10, **_SDXL), (4, 64, 64), 10, _gpu_settings(2, 4)),
        "dit_xl": Problem(lambda: dit(in_channels=4), (4, 32, 32), 1000, _gpu_settings(4, 32)),
    },
}
"""Device -> name -> problem. The GPU sizes have random weights: SDXL at 64x64 latents, DiT-XL/2 at 32x32."""
