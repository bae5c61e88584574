"""The switches for memory and time: what each changes, that results stay, and where it is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import load_config, ranks, zero
from engine.errors import EngineError
from engine.kernels import patch
from engine.models import memory
from engine.models.lora import ADAPTER, add_lora
from engine.models.memory import prepare_network, prepare_vae, select_trainable, use_channels_last

FAMILIES = ["class-unet", "sd", "sdxl", "dit", "pixart-sigma", "sd3", "sd35", "flux"]
UNETS = ["class-unet", "sd", "sdxl"]

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


def run(case: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The prediction of a guidance pair, and the gradients of the latent and of all that is trained."""
    case.denoiser.network.zero_grad()
    x = case.x.clone().requires_grad_()
    pred, _ = case.denoiser.predict(x, case.timestep, case.condition, guidance=2.0)
    pred.square().mean().backward()
    gradients = {name: p.grad for name, p in case.denoiser.network.named_parameters() if p.grad is not None}
    return {"prediction": pred.detach(), "d latent": x.grad, **gradients}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-5 * largest, name


# what is trained


def test_a_pattern_is_found_in_the_names_of_what_is_trained(tiny):
    network = tiny("sd").denoiser.network
    names = [name for name, _ in network.named_parameters()]
    chosen = select_trainable(network, r"attn2\.to_[kv]|conv_out")
    assert chosen == [n for n in names if "attn2.to_k" in n or "attn2.to_v" in n or "conv_out" in n]
    assert [name for name, p in network.named_parameters() if p.requires_grad] == chosen
    assert select_trainable(network, None) == names
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("atn", r"'atn' is found in none of the \d+ names .* UNet2DConditionModel; some of them are conv_in\.weight, "),
        ("[", r"'\[' is not a regular expression"),
    ],
)
def test_a_pattern_of_nothing_is_refused_and_nothing_is_frozen_by_it(tiny, pattern, message):
    network = tiny("sd").denoiser.network
    with pytest.raises(ValueError, match=message):
        select_trainable(network, pattern)
    assert all(p.requires_grad for p in network.parameters())


# gradient checkpointing


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less_for_backward_and_changes_no_gradient(tiny, family):
    kept, results = {}, {}
    for checkpointing in (False, True):
        case = tiny(family)
        prepare_network(case.denoiser.network, gradient_checkpointing=checkpointing)
        weights = {p.untyped_storage().data_ptr() for p in case.denoiser.network.parameters()}
        saved = {}

        def keep(tensor, weights=weights, saved=saved):
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = case.x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            case.denoiser.predict(x, case.timestep, case.condition, guidance=2.0)
        kept[checkpointing] = sum(saved.values())
        results[checkpointing] = run(case)
    assert kept[True] < 0.6 * kept[False]
    assert results[True].keys() == results[False].keys()
    assert all(torch.equal(results[True][name], value) for name, value in results[False].items())


def test_checkpointing_is_refused_where_there_are_no_blocks():
    with pytest.raises(ValueError, match="gradient_checkpointing=true, but a Linear has no blocks"):
        prepare_network(nn.Linear(2, 2), gradient_checkpointing=True)


# channels_last


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", UNETS)
def test_channels_last_reaches_the_convolutions_and_changes_results_by_rounding(tiny, family, fused):
    case = tiny(family)
    network = case.denoiser.network
    expected = run(case)
    use_channels_last(network)
    if fused:
        assert patch(network)
    orders = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and name != "conv_in" and module.in_channels > 1:
            module.register_forward_pre_hook(lambda module, arguments: orders.append(channels_last(arguments[0])))
    assert_close(run(case), expected)
    assert sum(orders) > 0.5 * len(orders)  # of what convolutions read


def channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize("family", ["dit", "pixart-sigma", "sd3", "flux"])
def test_channels_last_is_refused_for_transformers(tiny, family):
    with pytest.raises(
        ValueError, match=r"channels_last=true is for networks of convolutions, which a \w+Model is not"
    ):
        use_channels_last(tiny(family).denoiser.network)


@pytest.mark.parametrize(
    ("stage", "precision", "lora"),
    [(0, "fp32", False), (0, "bf16", False), (0, "bf16", True), (1, "bf16", True), (2, "fp32", True)],
)
def test_the_engine_trains_in_channels_last_as_without(tiny, stage, precision, lora):
    ranks.start(1)
    after, predictions = {}, {}
    for asked in (False, True):
        case = tiny("sd")
        network = case.denoiser.network
        if lora:
            add_lora(network, rank=2, target=r".*(to_q|conv1)")
        overrides = [f"zero.stage={stage}", f"precision={precision}", f"model.channels_last={asked}", "optimizer.eps=1"]
        config = load_config({}, [*overrides, "optimizer.lr=1"])
        engine = zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=1)
        student = case.denoiser.with_network(engine).with_adapter(ADAPTER)
        frozen_order = network.mid_block.resnets[0].conv1
        frozen_order = getattr(frozen_order, "base_layer", frozen_order)
        for _ in range(2):
            pred, _ = student.predict(case.x, case.timestep, case.condition)
            engine.backward(pred.float().square().mean())
            zero.step(engine)
        assert channels_last(frozen_order.weight) == asked
        after[asked] = {name: value.clone() for name, value in zero.full_parameters(engine)}
        predictions[asked] = pred.detach().float()
        assert all(value.is_contiguous() for value in after[asked].values())  # safetensors writes no others
    tolerance = 1e-4 if precision == "fp32" else 0.05
    assert (predictions[True] - predictions[False]).abs().max() <= tolerance * predictions[False].abs().max()
    for name, value in after[False].items():
        assert (after[True][name] - value).norm() <= tolerance * (value.norm() + 1), name


def test_the_engine_names_the_key_that_a_transformer_cannot_follow(tiny):
    ranks.start(1)
    with pytest.raises(EngineError, match=r"model\.channels_last=true is for networks of convolutions"):
        zero.initialize(
            load_config({}, ["model.channels_last=true"]), tiny("dit").denoiser.network,
            micro_batch=2, accumulation=1, world_size=1,
        )  # fmt: skip


# torch.compile


@pytest.fixture
def compiled():
    """Counts of what torch.compile did, from nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def without_inductor(monkeypatch):
    """Trace and differentiate, but run the operators one by one: the machine's C++ compiler takes a minute."""
    stock = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, *, dynamic, options: stock(self, dynamic=dynamic, backend="aot_eager")
    )


def rows(case: SimpleNamespace, count: int) -> SimpleNamespace:
    """The case's samples over and over, in a batch of another size."""

    def repeated(value: torch.Tensor) -> torch.Tensor:
        return value.repeat(-(-count // 2), *[1] * (value.dim() - 1))[:count].clone()

    condition = {name: repeated(value) for name, value in case.condition.items()}
    timestep = repeated(case.timestep)
    return SimpleNamespace(denoiser=case.denoiser, x=repeated(case.x), timestep=timestep, condition=condition)


@pytest.mark.parametrize("family", ["class-unet", "dit"])
def test_blocks_are_traced_whole_and_once_for_all_batches(tiny, compiled, monkeypatch, family):
    without_inductor(monkeypatch)
    case = tiny(family)
    network = case.denoiser.network
    add_lora(network, rank=2)
    patch(network)
    case.denoiser = case.denoiser.with_adapter(ADAPTER)
    expected = run(case)
    prepare_network(network, compile=True, gradient_checkpointing=True)
    assert_close(run(case), expected)
    blocks = sum(type(module).__name__ in memory.COMPILED for module in network.modules())
    assert 0 < compiled["stats"]["unique_graphs"] <= 2 * blocks
    with torch.no_grad():
        case.denoiser.predict(case.x, case.timestep, case.condition)
        graphs = compiled["stats"]["unique_graphs"]
        for count in (3, 5, 4, 2):
            many = rows(case, count)
            case.denoiser.predict(many.x, many.timestep, many.condition)
    assert compiled["stats"]["unique_graphs"] == graphs
    assert not compiled["graph_break"]


def test_the_ratio_is_one_in_bf16_between_a_compiled_rollout_and_update(tiny, compiled):
    case = tiny("dit", dtype=torch.bfloat16)
    network = case.denoiser.network
    del network.transformer_blocks[1:]  # one is enough to compile
    with torch.no_grad():
        eager, _ = case.denoiser.predict(case.x, case.timestep, case.condition)
    prepare_network(network, compile=True)
    with torch.no_grad():
        rolled, _ = case.denoiser.predict(case.x, case.timestep, case.condition)
    case.x.requires_grad_()
    updated, _ = case.denoiser.predict(case.x, case.timestep, case.condition)
    updated.square().mean().backward()
    assert compiled["stats"]["unique_graphs"] == 2
    # without emulate_precision_casts: 0.02, as other intermediate values are kept for backward, and so rounded
    assert torch.equal(rolled, updated)
    assert (rolled - eager).abs().max() <= 2**-7 * eager.abs().max()  # one unit of bf16


def test_compiling_is_refused_where_there_are_no_blocks():
    with pytest.raises(ValueError, match="compile=true, but a Linear has none of the blocks that are compiled"):
        prepare_network(nn.Linear(2, 2), compile=True)


# the VAE


@pytest.fixture
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def decoded(vae, size: int) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Images of two latents of a size, and the shapes that the decoder saw."""
    shapes = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    with torch.no_grad():
        images = vae.decode(torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))).sample
    hook.remove()
    return images, shapes


def test_slicing_decodes_one_latent_at_a_time_and_changes_nothing(vae):
    whole, _ = decoded(vae, 8)
    prepare_vae(vae, slicing=True)
    images, shapes = decoded(vae, 8)
    assert shapes == [(1, 4, 8, 8)] * 2
    torch.testing.assert_close(images, whole, rtol=1e-4, atol=1e-5)


def test_tiling_decodes_large_latents_in_tiles_and_leaves_small_ones_alone(vae):
    small, large = decoded(vae, 8)[0], decoded(vae, 16)[0]
    prepare_vae(vae, tiling=True)
    images, shapes = decoded(vae, 8)
    assert torch.equal(images, small)
    images, shapes = decoded(vae, 16)
    assert max(shape[-1] for shape in shapes) == 8
    assert images.shape == large.shape
    assert not torch.equal(images, large)
    assert nn.functional.cosine_similarity(images.flatten(), large.flatten(), dim=0) > 0.8


def test_a_vae_that_cannot_is_refused_by_the_key():
    with pytest.raises(ValueError, match=r"vae\.slicing=true, but a Linear has no enable_slicing"):
        prepare_vae(nn.Linear(2, 2), slicing=True)
    prepare_vae(nn.Linear(2, 2))
