"""Other weights in the live network: at every ZeRO stage, in both precisions, on one rank and on two, and back."""

import json
from pathlib import Path

import pytest
import torch

from engine import load_config, ranks, zero
from engine.models.lora import add_lora

CASES = [(stage, precision, lora) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16") for lora in (False, True)]


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.to_q = torch.nn.Linear(6, 33), torch.nn.Linear(33, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(self.inside(x).tanh())


def make(stage: int, precision: str, lora: bool):
    """An engine that has taken one step, and a network of the same weights without an engine."""
    torch.manual_seed(0)
    network, plain = Network(), Network()
    plain.load_state_dict(network.state_dict())
    for model in (network, plain):
        if lora:
            add_lora(model, rank=3)
    partition_all = "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    overrides = [f"zero.stage={stage}", f"precision={precision}", "optimizer.lr=1e-2"]
    config = load_config({}, [*overrides, *([partition_all] if stage == 3 else [])])
    engine = zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=ranks.world_size())
    train(engine, precision)
    return engine, plain.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def batch(precision: str) -> torch.Tensor:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(ranks.rank()))
    return x.bfloat16() if precision == "bf16" else x


def train(engine, precision: str) -> None:
    engine.backward((engine(batch(precision)).float() - 1).square().mean())
    zero.step(engine)


def read(engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in zero.full_parameters(engine)}


@torch.no_grad()
def output(network, precision: str) -> torch.Tensor:
    return network(batch(precision)).clone()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check(stage: int, precision: str, lora: bool) -> dict[str, bool]:
    """Swap other weights in and out of one engine, and train it as another that never saw them."""
    engine, plain = make(stage, precision, lora)
    untouched, _ = make(stage, precision, lora)
    before, masters = output(engine, precision), read(engine)
    others = {name: value + 0.5 for name, value in masters.items()}
    trained = zero.write_parameters(engine, others)
    zero.write_parameters(plain, others)
    facts = {
        "names are those of what is trained": set(others)
        == {n for n, p in plain.named_parameters() if p.requires_grad},
        "the network computes with the others": torch.equal(output(engine, precision), output(plain, precision)),
        "which is something else": not torch.equal(output(engine, precision), before),
        "master weights stay": same(read(engine), masters) or (stage, precision) == (0, "fp32"),
        "what is returned is on the CPU": all(value.device.type == "cpu" for value in trained.values()),
    }
    again = zero.write_parameters(engine, trained)
    facts["the others are returned in turn, rounded"] = all(
        torch.equal(again[name], others[name].to(again[name])) for name in others
    )
    facts["put back to the bit"] = torch.equal(output(engine, precision), before) and same(read(engine), masters)
    for run in (engine, untouched):
        train(run, precision)
    facts["training goes on as without"] = same(read(engine), read(untouched)) and torch.equal(
        output(engine, precision), output(untouched, precision)
    )
    return facts


@pytest.mark.parametrize(("stage", "precision", "lora"), CASES)
def test_other_weights_are_computed_with_and_put_back_to_the_bit(stage, precision, lora):
    ranks.start(1)
    facts = check(stage, precision, lora)
    assert [fact for fact, holds in facts.items() if not holds] == []


def test_offloaded_parameters_are_written_too():
    ranks.start(1)
    torch.manual_seed(0)
    network, plain = Network(), Network()
    config = load_config({}, ["zero.stage=3", "zero.offload=parameters", "precision=bf16"])
    engine = zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=1)
    before = output(engine, "bf16")
    trained = zero.write_parameters(engine, dict(plain.named_parameters()))
    assert torch.equal(output(engine, "bf16"), output(plain.bfloat16(), "bf16"))
    zero.write_parameters(engine, trained)
    assert torch.equal(output(engine, "bf16"), before)


def test_a_name_of_nothing_that_is_trained_is_refused():
    with pytest.raises(KeyError, match="elsewhere"):
        zero.write_parameters(Network(), {"elsewhere": torch.zeros(1)})


ON_A_RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_written_weights as tests
from engine import ranks

ranks.start(1)
print(json.dumps([[*case, tests.check(*case)] for case in tests.CASES]))
"""


def test_two_ranks_write_and_put_back_the_same(launch, tmp_path):
    processes = launch.start_ranks([["-c", ON_A_RANK, str(Path(__file__).parent)]] * 2, tmp_path)
    said = [process.communicate(timeout=240) for process in processes]
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err[-3000:]
        results = json.loads(out.strip().splitlines()[-1])
        assert len(results) == len(CASES)
        for *case, facts in results:
            assert [fact for fact, holds in facts.items() if not holds] == [], case
