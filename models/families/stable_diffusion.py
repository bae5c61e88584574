"""Stable Diffusion 1.x and 2.x: the scheduler says which of the two, by `prediction_type`."""

from .family import Family


def _call(network, x, timestep, condition, guidance):
    return network(x, timestep, encoder_hidden_states=condition["encoder_hidden_states"]).sample


def _encode(pipeline, prompts, negative, resolution, tokens):
    device = pipeline.text_encoder.device
    text, nothing = pipeline.encode_prompt(prompts, device, 1, True, negative_prompt=negative)
    return {"encoder_hidden_states": text, "negative_encoder_hidden_states": nothing}


FAMILY = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipelines=("StableDiffusionPipeline",),
    component="unet",
    network="UNet2DConditionModel",
    call=_call,
    encode=_encode,
    max_tokens={"tokenizer": 77},
    scheduler={"steps_offset": 1},
)
