"""Stable Diffusion XL: two text encoders, and the network is told the size of the image."""

import torch

from .family import Family


def _call(network, x, timestep, condition, guidance):
    added = {"text_embeds": condition["text_embeds"], "time_ids": condition["time_ids"]}
    hidden = condition["encoder_hidden_states"]
    return network(x, timestep, encoder_hidden_states=hidden, added_cond_kwargs=added).sample


def _encode(pipeline, prompts, negative, resolution, tokens):
    device = pipeline.text_encoder_2.device
    text, nothing, pooled, pooled_nothing = pipeline.encode_prompt(prompts, None, device, negative_prompt=negative)
    if pipeline.config.force_zeros_for_empty_prompt:  # what the stock pipeline does when no negative prompt is given
        empty = [row for row, prompt in enumerate(negative) if not prompt]
        nothing[empty] = 0
        pooled_nothing[empty] = 0
    size = [*resolution, 0, 0, *resolution]  # the original size, no cropping, the target size
    return {
        "encoder_hidden_states": text,
        "negative_encoder_hidden_states": nothing,
        "text_embeds": pooled,
        "negative_text_embeds": pooled_nothing,
        "time_ids": torch.tensor([size] * len(prompts), device=device, dtype=text.dtype),
    }


FAMILY = Family(
    name="Stable Diffusion XL",
    pipelines=("StableDiffusionXLPipeline",),
    component="unet",
    network="UNet2DConditionModel",
    call=_call,
    encode=_encode,
    max_tokens={"tokenizer_2": 77},
)
