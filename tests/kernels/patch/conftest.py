"""One tiny model of random weights for each family that is patched, and how two models are compared."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

UNET = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 4, "patch_size": 2}
TEXT, POOLED = 12, 10
TIMES, LABELS = torch.tensor([3, 7]), torch.tensor([1, 2])


def digits(**config):
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8, "num_class_embeds": 11, "in_channels": 1, "out_channels": 1,
    }  # fmt: skip
    return UNet2DModel(**UNET, **blocks | config), {
        "sample": torch.randn(2, 1, 8, 8), "timestep": TIMES, "class_labels": LABELS
    }  # fmt: skip


def sd(**config):
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**UNET, **blocks | config), {
        "sample": torch.randn(2, 4, 8, 8), "timestep": TIMES, "encoder_hidden_states": torch.randn(2, 5, TEXT)
    }  # fmt: skip


def sdxl(**config):
    model, inputs = sd(
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + POOLED, **config,
    )  # fmt: skip
    return model, inputs | {"added_cond_kwargs": {"text_embeds": torch.randn(2, POOLED), "time_ids": torch.rand(2, 6)}}


def dit(**config):
    settings = {"out_channels": 8, "num_layers": 2, "num_embeds_ada_norm": 10} | config
    return DiTTransformer2DModel(**TRANSFORMER, **settings), {
        "hidden_states": torch.randn(2, 4, 4, 4), "timestep": TIMES, "class_labels": LABELS
    }  # fmt: skip


def pixart(**config):
    settings = {
        "out_channels": 8, "num_layers": 2, "cross_attention_dim": 16, "caption_channels": TEXT,
        "use_additional_conditions": False,
    }  # fmt: skip
    return PixArtTransformer2DModel(**TRANSFORMER, **settings | config), {
        "hidden_states": torch.randn(2, 4, 4, 4), "encoder_hidden_states": torch.randn(2, 5, TEXT), "timestep": TIMES,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sd3(**config):
    settings = {
        "out_channels": 4, "num_layers": 2, "joint_attention_dim": TEXT, "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**TRANSFORMER, **settings | config), {
        "hidden_states": torch.randn(2, 4, 4, 4), "encoder_hidden_states": torch.randn(2, 5, TEXT),
        "pooled_projections": torch.randn(2, POOLED), "timestep": TIMES.float(),
    }  # fmt: skip


def flux(**config):
    settings = {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED,
        "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
    return FluxTransformer2DModel(**settings | config), {
        "hidden_states": torch.randn(2, 4, 4), "encoder_hidden_states": torch.randn(2, 5, TEXT),
        "pooled_projections": torch.randn(2, POOLED), "timestep": TIMES / 10, "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def vae(**config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**UNET, **blocks | config), {"sample": torch.randn(2, 3, 8, 8)}


MODELS = {build.__name__: build for build in (digits, sd, sdxl, dit, pixart, sd3, flux, vae)}


def make(name, *, dtype=torch.float32, device="cpu", **config):
    """A stock model and its inputs, the latent first; no weight keeps the value that it commonly starts with."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval().to(device, dtype), _moved(inputs, dtype, device)


def _moved(inputs, dtype, device):
    if isinstance(inputs, dict):
        return {name: _moved(value, dtype, device) for name, value in inputs.items()}
    if inputs is None:
        return None
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def loss_of(model, inputs):
    out = model(**inputs)[0]
    return (out.double() - torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).square().mean()


def run(model, inputs):
    """Output, and the gradients of the latent and of every parameter."""
    latent = next(iter(inputs))
    inputs = inputs | {latent: inputs[latent].detach().clone().requires_grad_()}
    with torch.no_grad():
        output = model(**inputs)[0]
    model.zero_grad()
    loss_of(model, inputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output, "d latent": inputs[latent].grad, **gradients}


def assert_agreement(actual, expected, tolerance):
    """Each tensor agrees, relative to its largest element; a gradient that is 0 but for rounding, such as that of an
    attention key's bias, relative to the largest of all gradients."""
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for name, value in expected.items() if name != "output")
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / max(value.abs().max(), 1e-2 * largest)
        assert error <= tolerance, f"{name}: {error:.1e}"


def errors(results, truth):
    """Euclidean distance from the truth, of the output and of all gradients together."""
    squares = {name: (results[name].cpu().double() - value).square().sum() for name, value in truth.items()}
    return squares.pop("output").sqrt(), sum(squares.values()).sqrt()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def tiny(monkeypatch):
    """`make(name)`: a stock model and its inputs; `run` and the comparisons of its results."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on a GPU: fp32 convolutions in fp32
    return SimpleNamespace(make=make, run=run, loss_of=loss_of, assert_agreement=assert_agreement, errors=errors)
