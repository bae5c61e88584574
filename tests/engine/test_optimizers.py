"""Every optimizer on every ZeRO stage: what it keeps, in which precision, and that it takes the right step."""

import math
from types import SimpleNamespace

import pytest
import torch

from engine import load_config, ranks, zero

STAGES = [0, 1, 2, 3]
SIGN_STEPS = ("lion", "lion8bit")
LR = 1e-3


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64))


def build(*overrides: str) -> SimpleNamespace:
    """A DeepSpeed engine around two layers of 4,096 weights; of fewer, bitsandbytes would keep the states in fp32."""
    ranks.start(1)
    network = layers()
    config = load_config({}, [f"optimizer.lr={LR}", "optimizer.max_grad_norm=1e9", *overrides])
    engine = zero.initialize(config, network, micro_batch=4, accumulation=1, world_size=1)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(network[0].weight.dtype)
    return SimpleNamespace(engine=engine, config=config, x=x)


def weights(run: SimpleNamespace) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in zero.full_parameters(run.engine)]).double()


def train(run: SimpleNamespace, *, steps: int) -> None:
    for _ in range(steps):
        run.engine.backward((run.engine(run.x).float() - 1).square().mean())
        zero.step(run.engine)


def optimizer_of(run: SimpleNamespace) -> torch.optim.Optimizer:
    return getattr(run.engine.optimizer, "optimizer", run.engine.optimizer)


def moments(run: SimpleNamespace) -> list[torch.Tensor]:
    """The states that are as large as the weights that they belong to."""
    states = (value for state in optimizer_of(run).state.values() for value in state.values())
    return [value for value in states if isinstance(value, torch.Tensor) and value.numel() >= 4096]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "name", "states", "dtype"),
    [
        ("adamw", "AdamW", 2, torch.float32),
        ("adamw8bit", "AdamW8bit", 2, torch.uint8),
        ("lion", "Lion", 1, torch.float32),
        ("lion8bit", "Lion8bit", 1, torch.uint8),
    ],
)
def test_each_optimizer_keeps_its_states_and_takes_the_step_of_its_formula(stage, precision, kind, name, states, dtype):
    run = build(f"zero.stage={stage}", f"precision={precision}", f"optimizer.kind={kind}", "optimizer.weight_decay=0")
    before = weights(run)
    train(run, steps=1)
    moved = weights(run) - before
    assert type(optimizer_of(run)).__name__ == name
    network = layers().double()
    (network(run.x.double()) - 1).square().mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    # Adam's first step is lr g / (|g| + eps) and Lion's lr sign(g): one and the same where g is not tiny
    large = gradient.abs() > 1e-2 * gradient.abs().max()
    assert large.double().mean() > 0.8
    assert torch.allclose(moved[large], -LR * gradient[large].sign(), rtol=0.02)
    train(run, steps=1)
    weight_sized = sum(state.numel() for state in moments(run)) / sum(2 * [64 * 64])
    assert states <= weight_sized <= 1.05 * states  # of the two layers, and a little for biases and padding
    assert {state.dtype for state in moments(run)} == {dtype}


@pytest.mark.parametrize("kind", SIGN_STEPS)
def test_lion_is_its_formula_over_several_steps(kind):
    run = build(f"optimizer.kind={kind}", "optimizer.betas=[0.9, 0.99]", "optimizer.weight_decay=0.1")
    network = layers().double()
    mean = {parameter: torch.zeros_like(parameter) for parameter in network.parameters()}
    for _ in range(3):  # Chen et al. 2023, algorithm 2
        network.zero_grad()
        (network(run.x.double()) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter, m in mean.items():
                direction = (0.9 * m + 0.1 * parameter.grad).sign()
                parameter -= LR * (direction + 0.1 * parameter)
                m.mul_(0.99).add_(0.01 * parameter.grad)
    train(run, steps=3)
    expected = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    # a sign that rounding (of 8 bits: of the mean) turns moves one weight by 2 lr
    turned = ((weights(run) - expected).abs() > LR).double().mean()
    assert turned <= (0.05 if kind == "lion8bit" else 0.001)


@pytest.mark.parametrize("kind", ["paged_adamw8bit", "paged_lion8bit"])
def test_paged_optimizers_are_those_that_page_their_states(kind):
    # on a CPU there is nothing to page; that the states move is bitsandbytes', and needs a GPU to be seen
    run = build(f"optimizer.kind={kind}")
    assert optimizer_of(run).is_paged
    assert optimizer_of(run).args.optim_bits == 8
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        train(run, steps=1)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion8bit"])
def test_bf16_master_weights_are_the_only_weights_that_the_optimizer_keeps(stage, kind):
    run = build(f"zero.stage={stage}", "precision=bf16", "zero.master_weights=bf16", f"optimizer.kind={kind}")
    before = weights(run)
    train(run, steps=2)
    after = weights(run)
    assert (after - before).abs().max() > 0
    assert torch.equal(after, after.bfloat16().double())  # nothing below bf16 is kept anywhere
    assert {state.dtype for state in moments(run)} == {torch.bfloat16 if kind == "adamw" else torch.uint8}


def test_bf16_master_weights_lose_steps_that_fp32_ones_keep():
    moved = {}
    for master in ("fp32", "bf16"):
        run = build("zero.stage=1", "precision=bf16", f"zero.master_weights={master}", "optimizer.lr=1e-6")
        before = weights(run)
        train(run, steps=1)
        moved[master] = (weights(run) != before).double().mean()
    assert moved["fp32"] > 0.95
    assert moved["bf16"] < 0.1


@pytest.mark.parametrize("kind", ["adamw8bit", "lion"])
def test_offloaded_states_take_the_same_step(kind):
    moved = []
    for offload in ("none", "optimizer"):
        run = build("zero.stage=2", f"zero.offload={offload}", f"optimizer.kind={kind}")
        before = weights(run)
        train(run, steps=2)
        moved.append(weights(run) - before)
    assert torch.allclose(*moved, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_requires_gradients_is_given_to_the_optimizer_and_read(stage, precision):
    ranks.start(1)
    network = layers()
    network[0].requires_grad_(False)
    frozen = network[0].weight.detach().clone()
    config = load_config({}, [f"zero.stage={stage}", f"precision={precision}"])
    engine = zero.initialize(config, network, micro_batch=4, accumulation=1, world_size=1)
    run = SimpleNamespace(engine=engine, x=torch.randn(4, 64).to(network[0].weight.dtype))
    train(run, steps=1)
    assert [name for name, _ in zero.full_parameters(engine)] == ["2.weight", "2.bias"]
    assert all(value.dtype == torch.float32 for _, value in zero.full_parameters(engine))
    sizes = math.fsum(state.numel() for state in moments(run))
    assert sizes < 2 * 1.1 * 64 * 64
    assert torch.equal(network[0].weight.float(), frozen.to(network[0].weight.dtype).float())
