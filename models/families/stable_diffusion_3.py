"""Stable Diffusion 3 and 3.5: a flow, with two CLIP encoders and T5, which a directory may leave out."""

from .family import Family, patch_size, shift_of


def _call(network, x, timestep, condition, guidance):
    return network(
        hidden_states=x,
        timestep=timestep,
        encoder_hidden_states=condition["encoder_hidden_states"],
        pooled_projections=condition["pooled_projections"],
    ).sample


def _encode(pipeline, prompts, negative, resolution, tokens):
    text, nothing, pooled, pooled_nothing = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline.text_encoder.device,
        negative_prompt=negative,
        max_sequence_length=tokens,
    )
    return {
        "encoder_hidden_states": text,
        "negative_encoder_hidden_states": nothing,
        "pooled_projections": pooled,
        "negative_pooled_projections": pooled_nothing,
    }


def _set_timesteps(scheduler, steps, tokens):
    shift = {"mu": shift_of(scheduler, tokens)} if scheduler.get("use_dynamic_shifting") else {}
    return {"num_inference_steps": steps, **shift}


FAMILY = Family(
    name="Stable Diffusion 3 and 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    component="transformer",
    network="SD3Transformer2DModel",
    call=_call,
    encode=_encode,
    max_tokens={"tokenizer_3": 256, "tokenizer": 77},
    patch=patch_size,
    largest=lambda config: config["pos_embed_max_size"] * config["patch_size"],
    set_timesteps=_set_timesteps,
)
