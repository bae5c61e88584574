"""Where an iteration goes: host reads, network passes and phases, and that the instruments see what they should."""

import json
import time

import pytest
import torch

from bench import profile
from bench.watch import Clock, Phases, Watch
from engine import load_config

SMALL = ("rollout.conditions=4", "rollout.group_size=4", "rollout.pool=128", "teacher.steps=6", "train.threads=1")


@pytest.fixture
def measured(tmp_path):
    """`measured("key=value", ...)`: the figures of a small job."""

    def measure(*overrides):
        config = load_config(None, [*SMALL, *overrides])
        return profile.measure(profile.make_trainer(config, tmp_path / "cache"))

    return measure


def test_a_rollout_reads_nothing_and_an_update_once_an_optimizer_step_and_twice_at_its_end(measured):
    whole = measured("train.micro_batch=16", "train.updates=2", "rollout.batch_size=null")
    parts = measured("train.micro_batch=2", "train.updates=2", "rollout.batch_size=4")
    update = ("student forward", "loss", "student backward", "optimizer step", "update")
    for result in (whole, parts):
        assert result["phases"]["rollout"]["reads"] == 0
        assert sum(result["phases"][phase]["reads"] for phase in update) == 2 + 2
    # the second took four times the micro-batches, or it would show nothing
    operators = [result["phases"]["student forward"]["operators"] for result in (whole, parts)]
    assert operators[1] == 4 * operators[0]


@pytest.mark.parametrize("stage", [0, 2])
def test_what_deepspeed_reads_is_listed_apart_and_does_not_grow_with_micro_batches(measured, stage):
    found = []
    for micro_batch in (16, 4):
        result = measured(f"zero.stage={stage}", f"train.micro_batch={micro_batch}")
        places = [row["place"] for row in result["places"] if row["place"].startswith("deepspeed/")]
        assert bool(places) == (stage > 0)  # without ZeRO, the norm is ours and stays on the device
        found.append(sum(row["deepspeed_reads"] for row in result["phases"].values()))
    assert found[0] == found[1]


def test_passes_by_phase_are_those_that_the_trainer_accounts_for(measured):
    result = measured("objective.kl_coef=0.1", "student.guidance=2", "train.inner_epochs=2")
    passes = {phase: row["passes"] for phase, row in result["phases"].items()}
    role = result["passes"]
    assert passes["teacher"] == role["teacher"] > 0
    assert passes["rollout"] + passes["student forward"] == role["student_forward"]
    assert passes["student backward"] == passes["student forward"] == role["student_backward"]
    assert passes["reference forward"] == role["reference"] > 0


def test_every_phase_takes_time_and_their_sum_is_the_iteration(measured):
    result = measured()
    seconds = {phase: row["seconds"] for phase, row in result["phases"].items()}
    assert seconds.pop("reference forward") == 0  # without a penalty there is no reference
    assert min(seconds.values()) > 0
    assert 0.2 < sum(seconds.values()) / result["seconds"] < 5  # two measurements on a machine that is not idle


def test_the_command_prints_and_writes_every_phase(tmp_path, capsys):
    file = tmp_path / "profile.json"
    profile.main([*SMALL, "--json", str(file)])
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert set(written["phases"]) == set(profile.PHASES)
    for phase in profile.PHASES:
        assert f"\n{phase} " in printed
    assert written["machine"]["threads"] == 1
    assert written["config"]["rollout"]["conditions"] == 4


def test_parts_that_overlap_are_refused_by_the_command(capsys):
    with pytest.raises(SystemExit):
        profile.main([*SMALL, "rollout.chunks=2"])
    assert "rollout.chunks=2: parts overlap" in capsys.readouterr().err


def test_a_clock_gives_each_phase_its_own_time_without_those_inside_it():
    clock = Clock(lambda: None)
    phases = Phases(clock)
    with phases.inside("outer"):
        time.sleep(0.02)
        with phases.inside("inner"):
            time.sleep(0.08)
            phases.rename("renamed")
            time.sleep(0.04)
    assert 0.02 <= clock.seconds["outer"] < clock.seconds["renamed"] + clock.seconds["inner"]
    assert clock.seconds["inner"] >= 0.08
    assert clock.seconds["renamed"] >= 0.04
    assert phases.current == "other"


@pytest.fixture
def watched():
    """`watched(function)`: the host reads that a function of one tensor on the device makes."""

    def count(function):
        weight = torch.arange(6.0)
        watch = Watch(Phases(), [weight])
        with watch.on():
            function(weight * 1)
        return sum(watch.reads.values())

    return count


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 2],
        lambda x: torch.arange(3, device=x.device).tolist(),
        lambda x: torch.ones(3).to(x.device).sum().item(),
    ],
)
def test_every_way_to_read_a_tensor_on_the_device_is_seen_once(watched, read):
    assert watched(read) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: torch.tensor([1.0, 2.0]).tolist(),
        lambda x: [int(i) for i in torch.arange(3)],
        lambda x: x[torch.tensor([0, 2])].softmax(0),
        lambda x: torch.ones(3).to(x.device) + x[:3],
        lambda x: (table := torch.ones(3), table.to(x.device), table[0].item()),
    ],
)
def test_what_stays_on_one_side_is_no_host_read(watched, harmless):
    assert watched(harmless) == 0


def test_bytes_and_operators_belong_to_the_phase_that_ran_them():
    phases = Phases()
    watch = Watch(phases, [])
    x = torch.ones(1000)
    with watch.on(), phases.inside("sum"):
        y = x + x[:1]
        with phases.inside("in place"):
            torch._foreach_add_([y, x], 1.0)
        y.view(10, 100)
    assert watch.operators == {"sum": 1, "in place": 1}
    assert watch.bytes_by_phase == {"sum": 4 * (1000 + 1 + 1000), "in place": 4 * 2 * 2000}
