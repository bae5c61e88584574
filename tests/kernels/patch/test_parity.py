"""Patched models compute what the stock ones do, in every configuration of the modules that are replaced."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from engine.kernels import backend, patch

plain_only = pytest.mark.skipif(backend.INTERPRETED, reason="says nothing about Triton")


def patched(model):
    model = copy.deepcopy(model)
    assert patch(model)
    return model


def test_output_and_every_gradient_are_those_of_the_stock_model(tiny, name, device):
    if backend.INTERPRETED and name in ("sdxl", "vae"):
        pytest.skip("the interpreter is slow, and these have the modules of sd")
    stock, inputs = tiny.make(name, device=device)
    # seen: 5e-6; the stock modules add in another order
    tiny.assert_agreement(tiny.run(patched(stock), inputs), tiny.run(stock, inputs), 5e-5)


@plain_only
def test_nothing_but_rounding_differs_from_the_stock_model(tiny, name):
    stock, inputs = tiny.make(name, dtype=torch.float64)
    tiny.assert_agreement(tiny.run(patched(stock), inputs), tiny.run(stock, inputs), 1e-11)


@plain_only
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_half_precision_is_at_most_twice_as_far_from_the_truth_as_stock(tiny, name, device, autocast):
    truth = tiny.run(*tiny.make(name, dtype=torch.float64))
    stock, inputs = tiny.make(name, dtype=torch.float32 if autocast else torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        ours, theirs = (tiny.errors(tiny.run(model, inputs), truth) for model in (patched(stock), stock))
    assert all(error <= 2 * bound for error, bound in zip(ours, theirs, strict=True))


@plain_only
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_autocast_widens_the_residual_stream_where_it_does_in_stock(tiny, name):
    stock, inputs = tiny.make(name)
    model, streams = patched(stock), {}
    for network in (stock, model):
        seen = streams[network] = []
        for block in network.transformer_blocks:
            block.register_forward_hook(
                lambda block, args, out, seen=seen: seen.append([t.dtype for t in tensors(out)])
            )
        with torch.autocast("cpu", torch.bfloat16):
            network(**inputs)
    assert streams[model] == streams[stock] != []


def tensors(output):
    return [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]


@pytest.mark.parametrize("name", ["digits", pytest.param("sd", marks=plain_only)])
def test_unets_stay_in_channels_last(tiny, name, device):
    stock, inputs = tiny.make(name, device=device)
    expected = tiny.run(stock, inputs)
    model = patched(stock).to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    layouts = []
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            block.norm2.register_forward_hook(
                lambda *call: layouts.append(call[2].is_contiguous(memory_format=torch.channels_last))
            )
    tiny.assert_agreement(tiny.run(model, inputs), expected, 5e-5)
    assert len(layouts) == 2 * 8
    assert all(layouts)


@plain_only
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temb_channels": None},
        {"skip_time_act": True},
        {"time_embedding_norm": "scale_shift"},
        {"time_embedding_norm": "group", "temb_channels": None},
        {"out_channels": 12, "output_scale_factor": 2**0.5},
        {"up": True},
        {"down": True},
        {"up": True, "kernel": "sde_vp"},
        {"down": True, "kernel": "sde_vp"},
        {"non_linearity": "gelu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [2, 64])
def test_resnet_blocks_of_every_kind(config, samples):
    torch.manual_seed(0)
    block = ResnetBlock2D(**{"in_channels": 8, "temb_channels": 6, "groups": 4} | config).double()
    x = torch.randn(samples, 8, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    temb = None if config == {"temb_channels": None} else torch.randn(samples, 6, dtype=torch.float64)
    torch.testing.assert_close(patched(block)(x, temb), block(x, temb), rtol=1e-11, atol=1e-11)


@plain_only
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_feed_forward_in_chunks(tiny, name):
    stock, inputs = tiny.make(name, dtype=torch.float64)
    model, calls = patched(stock), []
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(1, 0)
        block.ff.register_forward_hook(lambda block, args, out: calls.append(out.shape[0]))
    tiny.assert_agreement(tiny.run(model, inputs), tiny.run(stock, inputs), 1e-11)
    assert calls == [1] * 2 * 2 * 2  # chunks, blocks and passes of a run


@plain_only
def test_attention_arguments_reach_the_attention(tiny):
    stock, inputs = tiny.make("dit", dtype=torch.float64)
    model, seen = patched(stock), []

    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, weight=None):
            seen.append(weight)
            return weight * hidden_states

    for network in (stock, model):
        for block in network.transformer_blocks:
            block.attn1.set_processor(Processor())
    inputs["cross_attention_kwargs"] = {"weight": 3.0}
    tiny.assert_agreement(tiny.run(model, inputs), tiny.run(stock, inputs), 1e-11)
    assert seen == [3.0] * 8


def flux_inputs(dtype):
    return {
        "hidden_states": torch.randn(2, 4, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 3, 16, dtype=dtype),
        "temb": torch.randn(2, 16, dtype=dtype),
    }


@plain_only
def test_flux_block_adds_the_branch_of_an_image_prompt():
    torch.manual_seed(0)
    block = FluxTransformerBlock(16, 2, 8).double()

    class Processor:
        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
            return hidden_states, encoder_hidden_states, 2 * hidden_states

    block.attn.set_processor(Processor())
    inputs = flux_inputs(torch.float64)
    torch.testing.assert_close(patched(block)(**inputs), block(**inputs), rtol=1e-11, atol=1e-11)


@plain_only
@pytest.mark.parametrize("kind", [FluxTransformerBlock, FluxSingleTransformerBlock])
def test_flux_blocks_stay_within_the_range_of_float16(kind):
    torch.manual_seed(0)
    block = kind(16, 2, 8).half()
    if kind is FluxTransformerBlock:
        last, gate = block.ff_context.net[2], block.norm1_context.linear.bias[5 * 16 :]
    else:
        last, gate = block.proj_out, block.norm.linear.bias[2 * 16 :]
    with torch.no_grad():
        last.bias.fill_(5e4)
        gate.fill_(8.0)
    inputs = flux_inputs(torch.float16)
    for text, image in (block(**inputs), patched(block)(**inputs)):
        assert (text == 65504).all()
        assert image.isfinite().all()
