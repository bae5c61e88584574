"""LoRA: which layers get adapters, what they compute, who sees them when, and what is saved."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import load_config, ranks, zero
from engine.models.lora import ADAPTER, LoraError, activate, add_lora, load_lora_state, lora_state, merged
from engine.models.quantization import quantize

FAMILIES = ["class-unet", "sd", "sdxl", "dit", "pixart-sigma", "sd3", "sd35", "flux"]

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


def awaken(network: nn.Module, name: str = ADAPTER) -> None:
    """Give an adapter's B, which is 0 at first, something to add."""
    generator = torch.Generator().manual_seed(1)
    for key, value in network.named_parameters():
        if f"lora_B.{name}" in key:
            value.data = 0.3 * torch.randn(value.shape, generator=generator).to(value)


def attention_projections(network: nn.Module) -> set[str]:
    """The linear layers inside of what diffusers calls an attention, found without their names."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    kinds = (Attention, AttentionModuleMixin)
    inside = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    return {
        f"{name}.{child}"
        for name in inside
        for child, layer in network.get_submodule(name).named_modules()
        if isinstance(layer, nn.Linear)
    }


@torch.no_grad()
def predict(case: SimpleNamespace, adapter: str | None) -> torch.Tensor:
    return case.denoiser.with_adapter(adapter).predict(case.x, case.timestep, case.condition, guidance=2.0)[0]


# which layers, and what they compute


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_projections_of_every_family_are_adapted_and_nothing_else_is_trained(tiny, family):
    case = tiny(family)
    network = case.denoiser.network
    expected, before = attention_projections(network), predict(case, None)
    assert set(add_lora(network, rank=2)) == expected
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{layer}.lora_{m}.{ADAPTER}.weight" for layer in expected for m in "AB"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(predict(case, ADAPTER), before)  # B is 0
    awaken(network)
    assert (predict(case, ADAPTER) - before).abs().max() > 1e-3
    assert torch.equal(predict(case, None), before)


def test_an_adapter_adds_its_low_rank_product_times_alpha_over_rank():
    network = nn.ModuleDict({"to_q": nn.Linear(6, 5), "conv": nn.Conv2d(3, 4, 3, padding=1)})
    add_lora(network, rank=2, alpha=7.0, target="to_q|conv")
    awaken(network)
    x = torch.randn(3, 6)
    state = {name: value.double() for name, value in network.to_q.state_dict().items()}
    weight = state["base_layer.weight"] + 3.5 * state["lora_B.student.weight"] @ state["lora_A.student.weight"]
    expected = x.double() @ weight.T + state["base_layer.bias"]
    assert torch.allclose(network.to_q(x).double(), expected, atol=1e-5)
    image = torch.randn(2, 3, 5, 5)
    conv = {name: value.double() for name, value in network.conv.state_dict().items()}
    down = nn.functional.conv2d(image.double(), conv["lora_A.student.weight"], padding=1)
    expected = nn.functional.conv2d(image.double(), conv["base_layer.weight"], conv["base_layer.bias"], padding=1)
    expected += 3.5 * nn.functional.conv2d(down, conv["lora_B.student.weight"])
    assert torch.allclose(network.conv(image).double(), expected, atol=1e-5)


def test_a_pattern_is_the_whole_name_of_a_layer_and_skips_what_is_none(tiny):
    network = tiny("dit").denoiser.network
    assert add_lora(network, rank=2, target=r"transformer_blocks\.1\.ff.*") == [
        "transformer_blocks.1.ff.net.0.proj",
        "transformer_blocks.1.ff.net.2",
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_q", r"'to_q' is the whole name of none of the \d+ layers .* DiTTransformer2DModel; some of them are \w+"),
        ("(", r"'\(' is not a regular expression"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_with_names_that_would_do(tiny, target, message):
    with pytest.raises(LoraError, match=message):
        add_lora(tiny("dit").denoiser.network, rank=2, target=target)


def test_the_embedded_digits_teacher_has_no_attention_and_says_so():
    from engine.models.digits import TEACHER_DIR
    from engine.models.pipelines import load_pipeline

    network = load_pipeline(TEACHER_DIR).denoiser.network
    with pytest.raises(LoraError, match=r"some of them are .*conv"):
        add_lora(network, rank=2)
    assert add_lora(network, rank=2, target=r".*\.conv[12]")


def test_a_seed_fixes_the_adapters_and_leaves_the_global_generator_alone(tiny):
    state = torch.get_rng_state()
    starts = []
    for seed in (5, 5, 6):
        network = tiny("dit").denoiser.network
        add_lora(network, rank=2, seed=seed)
        starts.append(torch.cat([value.flatten() for value in lora_state(network).values()]))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


# who sees them


def test_a_block_puts_back_what_was_active_and_a_call_alone_stays():
    network = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
    for seed, name in enumerate(("one", "two")):
        add_lora(network, rank=2, name=name, seed=seed)
        awaken(network, name)
    x = torch.ones(1, 4)

    def seen(adapter):
        activate(network, adapter)
        return network.to_q(x)

    alone = {adapter: seen(adapter) for adapter in (None, "one", "two")}
    assert torch.equal(alone[None], network.to_q.base_layer(x))
    assert not torch.equal(alone["one"], alone["two"])
    for before in alone:
        activate(network, before)
        for inside in alone:
            with activate(network, inside):
                assert torch.equal(network.to_q(x), alone[inside])
            assert torch.equal(network.to_q(x), alone[before])
        with pytest.raises(RuntimeError, match="inside"), activate(network, None):
            raise RuntimeError("inside")
        assert torch.equal(network.to_q(x), alone[before])


def test_switching_changes_no_parameter_and_not_whether_it_is_trained(tiny):
    network = tiny("sd").denoiser.network
    add_lora(network, rank=2)
    before = [(name, p.requires_grad) for name, p in network.named_parameters()]
    for adapter in (None, ADAPTER, None):
        activate(network, adapter)
        assert [(name, p.requires_grad) for name, p in network.named_parameters()] == before


def test_an_unknown_adapter_is_refused_and_a_network_without_adapters_left_alone(tiny):
    network = tiny("dit").denoiser.network
    names = list(network.state_dict())
    with activate(network, ADAPTER):  # not refused: full fine-tuning has no adapters
        pass
    assert list(network.state_dict()) == names
    add_lora(network, rank=2)
    with pytest.raises(LoraError, match="no adapter 'other'; this network has student"):
        activate(network, "other")


def test_a_copy_of_a_network_switches_its_own_adapters(tiny):
    case = tiny("dit")
    add_lora(case.denoiser.network, rank=2)
    awaken(case.denoiser.network)
    on = predict(case, ADAPTER)
    twin = copy.deepcopy(case.denoiser.network)
    off = predict(SimpleNamespace(**{**vars(case), "denoiser": case.denoiser.with_network(twin)}), None)
    assert not torch.equal(off, on)
    with activate(case.denoiser.network, ADAPTER):
        activate(twin, None)
        assert torch.equal(predict(case, ADAPTER), on)
        assert not case.denoiser.network.transformer_blocks[0].attn1.to_q.disable_adapters


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_reference_between_forward_and_backward_leaves_gradients_as_they_were(tiny, family):
    gradients = []
    for checkpointing, reference in ((False, False), (True, False), (True, True)):
        case = tiny(family)
        network = case.denoiser.network
        add_lora(network, rank=2)
        awaken(network)
        if checkpointing:
            network.enable_gradient_checkpointing()
        student = case.denoiser.with_adapter(ADAPTER)
        pred, _ = student.predict(case.x, case.timestep, case.condition)
        if reference:
            predict(case, None)
        pred.square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    plain, *others = gradients
    assert all(value is not None for value in plain.values())
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in plain.items())


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_around_the_network_switches_it(tiny, stage):
    ranks.start(1)
    case = tiny("dit")
    network = case.denoiser.network
    add_lora(network, rank=2)
    awaken(network)
    off, on = predict(case, None), predict(case, ADAPTER)
    config = load_config({}, [f"zero.stage={stage}"])
    engine = zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=1)
    case.denoiser = case.denoiser.with_network(engine)
    assert torch.equal(predict(case, None), off)
    assert torch.equal(predict(case, ADAPTER), on)


# what is saved


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_an_adapter_goes_into_another_network_by_its_state(tiny, family):
    case, other = tiny(family), tiny(family)
    for seed, one in enumerate((case, other)):
        add_lora(one.denoiser.network, rank=2, seed=seed)
    awaken(case.denoiser.network)
    state = lora_state(case.denoiser.network)
    assert not any(ADAPTER in name for name in state)
    load_lora_state(other.denoiser.network, state)
    assert torch.equal(predict(other, ADAPTER), predict(case, ADAPTER))


def test_a_state_of_another_rank_or_of_other_layers_is_refused(tiny):
    network = tiny("dit").denoiser.network
    add_lora(network, rank=2)
    state = lora_state(network)
    first = next(iter(state))
    for wrong in (
        {name: torch.cat([value, value]) for name, value in state.items()},
        {name: value for name, value in state.items() if name != first},
        state | {"elsewhere.lora_A.weight": torch.ones(2, 2)},
    ):
        with pytest.raises(LoraError, match="do not fit the adapter 'student'"):
            load_lora_state(network, wrong)


@pytest.mark.parametrize("family", ["class-unet", "sd", "sd35", "flux"])
def test_a_merged_copy_computes_what_the_adapter_does_and_is_a_stock_model(tiny, family):
    case = tiny(family)
    network = case.denoiser.network
    names, off = list(network.state_dict()), predict(case, None)
    add_lora(network, rank=2, target=r".*(to_q|to_out\.0|conv1|proj_out)")
    awaken(network)
    on = predict(case, ADAPTER)
    plain = merged(network)
    assert list(plain.state_dict()) == names
    assert not any("lora" in type(module).__module__ for module in plain.modules())
    alone = SimpleNamespace(**{**vars(case), "denoiser": case.denoiser.with_network(plain)})
    assert (on - off).abs().max() > 1e-2
    torch.testing.assert_close(predict(alone, None), on, rtol=1e-4, atol=1e-4)
    assert torch.equal(predict(case, None), off)  # the network itself keeps its weights
    assert torch.equal(predict(case, ADAPTER), on)


# on quantised layers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "stages"), [("int8", (0, 1, 2)), ("nf4", (0, 1, 2, 3))])
def test_adapters_train_on_quantised_layers_at_every_stage_that_is_allowed(tiny, kind, stages, precision):
    ranks.start(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    moved = {}
    for stage in stages:
        case = tiny("dit", dtype=dtype)
        network = case.denoiser.network
        quantize(network, kind, dtype)
        add_lora(network, rank=2)
        network.enable_gradient_checkpointing()
        off = predict(case, None)
        partition_all = "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
        overrides = [f"zero.stage={stage}", f"precision={precision}", "optimizer.lr=1e-2"]
        config = load_config({}, overrides + [partition_all] * (stage == 3))
        engine = zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=1)
        case.denoiser = case.denoiser.with_network(engine)
        student = case.denoiser.with_adapter(ADAPTER)
        before = {name: value.clone() for name, value in zero.full_parameters(engine)}
        for _ in range(2):
            rolled = predict(case, ADAPTER)
            pred, _ = student.predict(case.x, case.timestep, case.condition, guidance=2.0)
            assert torch.equal(pred, rolled)  # the ratio is 1
            predict(case, None)
            engine.backward((pred.float() - 1).square().mean())
            zero.step(engine)
        after = dict(zero.full_parameters(engine))
        moved[stage] = torch.cat([(after[name] - before[name]).flatten() for name in after])
        assert all("lora" in name for name in after)
        assert torch.equal(predict(case, None), off)  # the teacher stays
        assert not torch.equal(predict(case, ADAPTER), off)
    largest = moved[0].abs().max()
    assert largest > 1e-3
    for stage in stages[1:]:
        assert nn.functional.cosine_similarity(moved[stage], moved[0], dim=0) > (
            0.9999 if precision == "fp32" else 0.99
        )


def test_quantised_layers_are_not_merged_into(tiny):
    network = tiny("dit").denoiser.network
    quantize(network, "nf4", torch.float32)
    add_lora(network, rank=2)
    with pytest.raises(LoraError, match=r"transformer_blocks\.0\.attn1\.to_q is quantised"):
        merged(network)
