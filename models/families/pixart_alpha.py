"""PixArt-alpha: T5 and its mask, learned variance, and for the largest images the network is told their size."""

import torch

from .family import Family, patch_size


def call(network, x, timestep, condition, guidance):
    """One evaluation; PixArt-Sigma's is the same, without the sizes."""
    pred = network(
        x,
        encoder_hidden_states=condition["encoder_hidden_states"],
        encoder_attention_mask=condition["encoder_attention_mask"],
        timestep=timestep,
        added_cond_kwargs={key: condition.get(key) for key in ("resolution", "aspect_ratio")},
    ).sample
    return pred[:, : x.shape[1]]


def encode_text(pipeline, prompts, negative, resolution, tokens):
    """The prompts; all of the condition for PixArt-Sigma."""
    text, mask, nothing, nothing_mask = pipeline.encode_prompt(
        prompts,
        negative_prompt=negative,
        device=pipeline.text_encoder.device,
        clean_caption=True,
        max_sequence_length=tokens,
    )
    return {
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "negative_encoder_hidden_states": nothing,
        "negative_encoder_attention_mask": nothing_mask,
    }


def _encode(pipeline, prompts, negative, resolution, tokens):
    condition = encode_text(pipeline, prompts, negative, resolution, tokens)
    if pipeline.transformer.config.sample_size != 128:
        return condition
    height, width = resolution
    sizes = torch.tensor([[height, width, height / width]] * len(prompts)).to(condition["encoder_hidden_states"])
    return {**condition, "resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}


FAMILY = Family(
    name="PixArt-alpha",
    pipelines=("PixArtAlphaPipeline",),
    component="transformer",
    network="PixArtTransformer2DModel",
    call=call,
    encode=_encode,
    max_tokens={"tokenizer": 120},
    patch=patch_size,
)
