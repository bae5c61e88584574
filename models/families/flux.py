"""FLUX.1: a flow over packed latents; dev is told the guidance, schnell takes none."""

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .family import Family, shift_of


def _call(network, x, timestep, condition, guidance):
    # The latents stay (B, C, H, W) outside; a token is a patch of 2x2 of them, at a row and a column.
    packed = pixel_unshuffle(x, 2)
    height, width = packed.shape[2:]
    text = condition["encoder_hidden_states"]
    image_ids = torch.zeros(height, width, 3, device=x.device, dtype=x.dtype)
    image_ids[..., 1] = torch.arange(height, device=x.device)[:, None]
    image_ids[..., 2] = torch.arange(width, device=x.device)
    pred = network(
        hidden_states=packed.flatten(2).transpose(1, 2),
        timestep=timestep / 1000,
        guidance=None if guidance is None else torch.full((len(x),), guidance, device=x.device),
        pooled_projections=condition["pooled_projections"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=image_ids.flatten(0, 1),
    ).sample
    return pixel_shuffle(pred.transpose(1, 2).unflatten(2, (height, width)), 2)


def _encode(pipeline, prompts, negative, resolution, tokens):
    device = pipeline.text_encoder.device
    text, pooled, _ = pipeline.encode_prompt(prompts, None, device, max_sequence_length=tokens)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _set_timesteps(scheduler, steps, tokens):
    levels = {"num_inference_steps": steps}
    if not scheduler.get("use_flow_sigmas"):
        levels = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    return {**levels, "mu": shift_of(scheduler, tokens)}


FAMILY = Family(
    name="FLUX.1",
    pipelines=("FluxPipeline",),
    component="transformer",
    network="FluxTransformer2DModel",
    call=_call,
    encode=_encode,
    max_tokens={"tokenizer_2": 512},
    guidance_kind=lambda config: "embedded" if config["guidance_embeds"] else "none",
    latent_shape=lambda config: (config["in_channels"] // 4, 128, 128),
    patch=lambda config: 2,
    set_timesteps=_set_timesteps,
)
