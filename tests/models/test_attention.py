"""Attention: which operator is chosen where, and that xformers is given what PyTorch is given."""

from types import SimpleNamespace

import pytest
import torch
import xformers.ops

from engine.models import attention
from engine.models.attention import set_attention
from engine.models.lora import ADAPTER, add_lora

FAMILIES = ["class-unet", "sd", "sdxl", "dit", "pixart-sigma", "sd3", "sd35", "flux"]
CPU = {"device": "cpu", "dtype": torch.float32}

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


@pytest.fixture
def stand_in(monkeypatch):
    """The formula of xformers' documentation, in float64, for its operators, which need a GPU. Lists the calls."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert attn_bias is None
        assert p == 0
        assert query.dim() in (3, 4)  # (B, M, K) is one head, (B, M, H, K) many
        q, k, v = (x.double() if x.dim() == 4 else x.double()[:, :, None] for x in (query, key, value))
        scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * (scale or q.shape[-1] ** -0.5)
        calls.append(tuple(query.shape))
        return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), v).to(query.dtype).view_as(query)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", memory_efficient_attention)
    monkeypatch.setattr(attention, "_operator", lambda device, dtype, head_size: "stand-inF")
    return calls


def predictions_and_gradients(case: SimpleNamespace) -> list[torch.Tensor]:
    x = case.x.clone().requires_grad_()
    pred, uncond = case.denoiser.with_adapter(ADAPTER).predict(x, case.timestep, case.condition, guidance=2.0)
    pred.square().mean().backward()
    gradients = [p.grad for p in case.denoiser.network.parameters() if p.requires_grad]
    return [pred.detach(), *([] if uncond is None else [uncond.detach()]), x.grad, *gradients]


@pytest.mark.parametrize("family", FAMILIES)
def test_xformers_computes_what_pytorch_does_in_every_family(tiny, stand_in, family):
    results = []
    for choice in ("sdpa", "xformers"):
        case = tiny(family)
        add_lora(case.denoiser.network, rank=2)
        said = set_attention(case.denoiser.network, choice, **CPU)
        results.append(predictions_and_gradients(case))
        assert bool(stand_in) == (choice == "xformers")
    layers = attention._attention_layers(case.denoiser.network)
    assert said == f"xformers memory_efficient_attention (stand-inF in {len(layers)} of {len(layers)} layers)"
    masked = len(layers) // 2 if family == "pixart-sigma" else 0  # its attention to prompts
    assert len(stand_in) == len(layers) - masked
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_choice_can_be_taken_back_and_other_networks_are_left_alone(tiny, stand_in, family):
    case, other = tiny(family), tiny(family)
    before = predictions_and_gradients(case)
    set_attention(case.denoiser.network, "xformers", **CPU)
    assert torch.equal(predictions_and_gradients(other)[0], before[0])
    assert stand_in == []
    set_attention(case.denoiser.network, "sdpa", **CPU)
    assert torch.equal(predictions_and_gradients(case)[0], before[0])
    assert stand_in == []


def two_layers():
    from diffusers.models.attention_processor import Attention

    return torch.nn.ModuleList([Attention(16, heads=2, dim_head=8), Attention(16, heads=2, dim_head=5)])


def test_layers_without_an_operator_stay_with_pytorch_and_the_log_says_how_many(stand_in, monkeypatch):
    def operator(device, dtype, head_size):
        if head_size % 8:
            raise attention._NoOperator(f"head size {head_size} is no multiple of 8")
        return "evenF"

    monkeypatch.setattr(attention, "_operator", operator)
    layers, x = two_layers(), torch.randn(1, 4, 16)
    before = [layer(x) for layer in layers]
    assert set_attention(layers, "auto", device="cuda", dtype=torch.bfloat16) == (
        f"xformers memory_efficient_attention (evenF in 1 of 2 layers); elsewhere {attention.SDPA}: "
        "head size 5 is no multiple of 8"
    )
    for layer, expected in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x), expected)
    assert stand_in == [(2, 4, 8)]


def test_auto_without_any_operator_runs_pytorch_and_gives_the_reason(monkeypatch):
    def operator(device, dtype, head_size):
        raise attention._NoOperator("the card is too old")

    monkeypatch.setattr(attention, "_operator", operator)
    said = set_attention(two_layers(), "auto", device="cuda", dtype=torch.bfloat16)
    assert said == f"{attention.SDPA}; not xformers: the card is too old"


def test_xformers_is_refused_where_it_has_no_operator_with_its_own_reason(tiny):
    network = tiny("sd").denoiser.network
    with pytest.raises(ValueError, match=r"attention=xformers: head size \d+ in torch.float32 on cpu: .*device=cpu"):
        set_attention(network, "xformers", **CPU)


@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_on_a_cpu_pytorch_computes_attention(choice):
    assert set_attention(two_layers(), choice, **CPU) == attention.SDPA


def test_a_network_without_attention_is_said_to_have_none():
    network = torch.nn.Linear(2, 2)
    assert set_attention(network, "auto", **CPU) == "none in this network"
    with pytest.raises(ValueError, match="a Linear has no attention"):
        set_attention(network, "xformers", **CPU)


def test_normalised_queries_that_the_xformers_processor_would_not_normalise_stay_with_pytorch(stand_in):
    from diffusers.models.attention_processor import Attention

    layer = Attention(16, heads=2, dim_head=8, qk_norm="layer_norm")
    with pytest.raises(ValueError, match="no xformers processor for AttnProcessor2_0 as configured"):
        set_attention(layer, "xformers", **CPU)
    assert stand_in == []
    layer(torch.randn(1, 4, 16))
    assert stand_in == []
