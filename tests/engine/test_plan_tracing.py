"""Traced peaks of memory, held against those of PyTorch's allocator on real tensors."""

import gc
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from engine.models.lora import ADAPTER, activate, add_lora
from engine.models.quantization import quantize
from engine.planning.networks import FAKE, materialize, stored_bytes
from engine.planning.quantized import imitate
from engine.planning.tracing import trace

TOLERANCE = 0.1


def unet():
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128), cross_attention_dim=64, attention_head_dim=8, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return network, lambda network, dtype: network(
        torch.empty(2, 4, 32, 32, dtype=dtype), torch.ones(2), torch.empty(2, 77, 64, dtype=dtype)
    )


def sd3():
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=32, num_layers=4, num_attention_heads=4, attention_head_dim=32, caption_projection_dim=128,
        joint_attention_dim=64, pooled_projection_dim=32, pos_embed_max_size=32, qk_norm="rms_norm", out_channels=16,
    )  # fmt: skip
    return network, lambda network, dtype: network(
        torch.empty(2, 16, 32, 32, dtype=dtype),
        torch.empty(2, 77, 64, dtype=dtype),
        torch.empty(2, 32, dtype=dtype),
        torch.ones(2),
    )


def flux():
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, num_attention_heads=4, attention_head_dim=32,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    return network, lambda network, dtype: network(
        torch.empty(2, 256, 16, dtype=dtype), torch.empty(2, 77, 64, dtype=dtype), torch.empty(2, 32, dtype=dtype),
        torch.ones(2), torch.zeros(256, 3), torch.zeros(77, 3), torch.ones(2),
    )  # fmt: skip


def step(network, call, dtype, *, backward=True):
    with torch.set_grad_enabled(backward):
        out = call(network, dtype).sample
        if backward:
            out.float().square().mean().backward()


def take_over(parameter):
    parameter.grad = None


def measured(computation, network, folder):
    """Most bytes that the CPU allocator had given out at once, beyond those before, in a second run."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take_over)
    computation()
    gc.collect()  # what other tests left would be freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        computation()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    size = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        size += event["args"]["Bytes"]
        most = max(most, size)
    return most


def prepared(make, dtype, *, checkpointing, rank, fake):
    with torch.device("meta" if fake else "cpu"):
        network, call = make()
        if rank:
            add_lora(network, rank=rank)
    if fake:
        materialize(network, dtype)
    else:
        network.to(dtype)
    if rank:
        activate(network, ADAPTER)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network, call


@pytest.mark.parametrize("make", [unet, sd3, flux])
@pytest.mark.parametrize(
    ("dtype", "checkpointing", "rank", "backward"),
    [
        (torch.float32, False, 0, True),
        (torch.float32, True, 0, True),
        (torch.bfloat16, False, 0, True),
        (torch.bfloat16, True, 0, True),
        (torch.float32, False, 4, True),
        (torch.bfloat16, False, 0, False),
    ],
    ids=["fp32", "fp32 checkpointed", "bf16", "bf16 checkpointed", "lora", "no gradients"],
)
def test_activations_are_within_a_tenth_of_the_allocators_peak(make, dtype, checkpointing, rank, backward, tmp_path):
    how = {"checkpointing": checkpointing, "rank": rank}
    network, call = prepared(make, dtype, fake=False, **how)
    peak = measured(partial(step, network, call, dtype, backward=backward), network, tmp_path)
    network, call = prepared(make, dtype, fake=True, **how)
    with FAKE:
        traced = trace(partial(step, network, call, dtype, backward=backward), network=network)
    assert traced.peak == pytest.approx(peak, rel=TOLERANCE)
    assert traced.left == 0


def test_gradient_checkpointing_and_adapters_are_seen_to_save_activations():
    peaks = {}
    for checkpointing, rank in ((False, 0), (True, 0), (False, 4)):
        network, call = prepared(unet, torch.float32, checkpointing=checkpointing, rank=rank, fake=True)
        with FAKE:
            peaks[checkpointing, rank] = trace(partial(step, network, call, torch.float32), network=network).peak
    assert peaks[True, 0] < 0.5 * peaks[False, 0]
    assert peaks[False, 4] < peaks[False, 0]


def test_attention_keeps_no_matrix_of_queries_times_keys():
    with FAKE:
        query = torch.empty(1, 2, 2048, 32, requires_grad=True)

        def computation():
            F.scaled_dot_product_attention(query, query, query).sum().backward()

        peak = trace(computation, given=[query]).peak
    assert peak < 2048 * 2048 * 4


def test_a_gradient_leaves_the_trace_when_it_is_ready_and_its_elements_are_counted():
    with FAKE:
        network = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
        traced = trace(lambda: network(torch.empty(1, 1000)).sum().backward(), network=network)
    ready = [elements for _, elements in traced.moments]
    assert max(ready) >= 1_000_000
    assert traced.peak < 2 * 4_000_000  # never both gradients at once


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_counted_to_the_byte(kind):
    network = nn.Sequential(nn.Linear(100, 70), nn.LayerNorm(70), nn.Linear(70, 515, bias=False)).to(torch.bfloat16)
    planned = stored_bytes(network, torch.bfloat16, kind)
    quantize(network, kind, torch.bfloat16)
    storages = {}
    for parameter in network.parameters():
        held = [parameter, getattr(parameter, "SCB", None)]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        for tensor in held:
            if tensor is not None:
                storages[id(tensor)] = tensor.numel() * tensor.element_size()
    assert planned == sum(storages.values())


@pytest.mark.parametrize(("kind", "keeps"), [("int8", True), ("nf4", False)])
def test_a_quantised_layer_keeps_its_input_only_in_8_bits(kind, keeps):
    with FAKE:
        layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
        imitate(layer, kind)
        given = torch.empty(1000, 64, requires_grad=True)

        def computation():
            return layer(given * 1)

        left = trace(computation, given=[given, *layer.parameters()]).left
    size = 1000 * 64 * 4
    assert left == (2 if keeps else 1) * size
