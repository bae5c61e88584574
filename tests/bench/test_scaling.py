"""The cost model: passes and collectives against what the trainer does, and the sums that docs/scaling.md quotes."""

import json
from dataclasses import replace

import pytest

from bench import at_scale, scaling, scaling_ranks
from bench.cost_model import Job, as_job, memory_bytes, messages, passes, rollout_calls, update_calls, wire_bytes
from bench.profile import make_trainer
from engine import load_config

JOB = Job(conditions=8, group_size=4, steps=5, prefix=2, window=1, micro_batch=16)
TINY = ("rollout.conditions=4", "rollout.group_size=4", "rollout.pool=4", "teacher.steps=5", "train.threads=1")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("policy.window=2", "student.steps=4"),
        ("policy.window=null", "train.updates=2", "train.inner_epochs=3", "train.micro_batch=7"),
        ("student.guidance=2", "rollout.batch_size=3", "train.micro_batch=5"),
        ("rollout.group_size=2", "rollout.conditions=3", "student.steps=3"),
    ],
)
def test_predicted_calls_and_passes_are_those_of_the_trainer(tmp_path, overrides):
    trainer = make_trainer(load_config(None, [*TINY, *overrides]), tmp_path)
    trainer.train_iteration()  # the first one checks its ratios, which is counted too
    for place, policy in enumerate(trainer.objective.policies):
        trainer.iteration = len(trainer.objective.policies) + place
        seen = []
        hook = trainer.engine.module.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        row = trainer.train_iteration()
        hook.remove()
        noisy = policy.stochastic
        job = as_job(trainer.config, prefix=int(noisy.int().argmax()), window=int(noisy.sum()))
        assert seen == rollout_calls(job) + update_calls(job)
        assert passes(job) == {role: row[f"passes/{role}"] for role in ("student_forward", "student_backward")}


def test_a_group_shares_its_prefix():
    assert rollout_calls(JOB) == [8, 8, 32, 32, 32]
    assert update_calls(JOB) == [16, 16]
    assert passes(JOB) == {"student_forward": 8 * 2 + 32 * 3 + 32, "student_backward": 32}


@pytest.mark.parametrize(
    ("stage", "micro_batches", "weights"), [(0, 1, 2), (0, 4, 2), (1, 1, 3), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 8)]
)
def test_bytes_on_the_wire_in_units_of_the_weights(stage, micro_batches, weights):
    job = replace(JOB, ranks=4, stage=stage, prefix=0, micro_batch=8 // micro_batches)
    assert len(update_calls(job)) == micro_batches
    sent = [wire_bytes(message, 4) for message in messages(job, 1000) if message.phase != "average"]
    assert sum(sent) == pytest.approx(weights * 4000 * 3 / 4)


def test_one_rank_sends_nothing():
    assert messages(JOB, 1000) == []


def test_a_stage_partitions_what_its_name_says():
    def total(stage, ranks):
        return sum(memory_bytes(1, replace(JOB, ranks=ranks, stage=stage), weight_bytes=2, copies={}).values())

    # the ZeRO paper's mixed precision (arXiv 1910.02054, figure 1, K = 12): 16, 4 + 12/R, 2 + 14/R and 16/R bytes
    assert [total(stage, 4) for stage in range(4)] == pytest.approx([16, 4 + 12 / 4, 2 + 14 / 4, 16 / 4])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of `bench.scaling --sweep ranks`."""
    file = tmp_path_factory.mktemp("scaling") / "scaling.json"
    scaling.main(["--sweep", "ranks", "--json", str(file)])
    return json.loads(file.read_text())["ranks"]


def test_two_ranks_send_what_the_model_says_in_every_stage(two_ranks):
    assert two_ranks["ranks"] == 2
    assert [(row["stage"], row["micro_batches"]) for row in two_ranks["rows"]] == [
        (stage, count) for stage in range(4) for count in (1, 2)
    ]
    for row in two_ranks["rows"]:
        assert row["payloads"]
        for payload in row["payloads"]:
            # stage 1 to 3 pad the weights to whole shares
            assert payload["measured"] == pytest.approx(payload["predicted"], rel=0.01), (row["stage"], payload)
        modelled = {(payload["phase"], payload["name"]) for payload in row["payloads"]}
        rest = [part for part in row["collectives"] if (part["phase"], part["name"]) not in modelled]
        assert sum(part["payload"] for part in rest) < 0.02 * row["parameters"] * 4  # figures, norms, buffers


def test_the_parts_add_up_to_an_iteration(tmp_path, monkeypatch):
    small = ("rollout.conditions=4", "rollout.group_size=2", "student.steps=2")
    monkeypatch.setattr(
        scaling,
        "SWEEPS",
        {"batch": [("small", 8, small)], "resolution": [("16", 16, (*small, "reward.terms={pixel: 1}"))]},
    )
    file = tmp_path / "scaling.json"
    scaling.main(["--sweep", "batch", "resolution", "--json", str(file)])
    digits, larger = json.loads(file.read_text())["rows"]
    for row in (digits, larger):
        assert row["passes"] == 4 * 2 * 2 + 3 * 4 * 2  # one window, at the first of two steps
        assert 0.3 < row["predicted"]["iteration"] / row["measured"]["iteration"] < 2
    assert larger["parts"]["flops"] == pytest.approx(4 * digits["parts"]["flops"], rel=0.1)


def test_ranks_are_timed_on_the_job_that_is_predicted():
    for stage in (0, 3):
        for micro_batches in (1, 2):
            job = scaling_ranks.rank_job(stage, micro_batches, 2)
            assert len(update_calls(job)) == micro_batches
            assert (job.stage, job.ranks, job.samples) == (stage, 2, scaling_ranks.PAIRS // 2)


def test_more_gpus_work_a_smaller_part_of_their_time_and_hold_less_where_a_stage_partitions():
    counted = {"parameters": 1e9, "tensors": 500, "pass": 1e12, "decode": 1e12}
    table = at_scale.rows({"SD1.5, 512 pixels": counted})
    for stage in range(4):
        rows = [row for row in table if row["stage"] == stage]
        assert [row["gpus"] for row in rows] == list(at_scale.GPUS)
        working, memory = ([row[name] for row in rows] for name in ("working", "memory"))
        assert working == sorted(working, reverse=True)
        assert memory == sorted(memory, reverse=True)
        assert (memory[0] == memory[-1]) == (stage == 0)
    # by hand: a group of 8 on each of 64 GPUs, 2 evaluations; s steps of one row and 5 - s of 8, s = 0..3; update 3 x 8
    row = next(row for row in table if row["gpus"] == 64)
    latents = 2 * ((5 + 4 + 3 + 2) / 4 * 8 + (0 + 1 + 2 + 3) / 4 + 8 * 3)
    assert row["network"] == pytest.approx(latents * 1e12 / (989e12 * 0.4))


def test_work_is_counted_as_the_products_of_a_network():
    import torch

    with torch.device("meta"):
        layer = torch.nn.Linear(30, 40)
        assert at_scale.flops(lambda: layer(torch.empty(7, 30))) == 2 * 7 * 30 * 40
