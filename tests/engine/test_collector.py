"""What an iteration learns from: whose noise a rollout has, what its rewards compare, and what parts of it change."""

import threading

import pytest
import torch

from engine import zero
from engine.errors import EngineError
from engine.rl.rollout import coefficients, predict_step

PARTS = 3
UNEVEN = ("rollout.conditions=7", "rollout.pool=9", "rollout.group_size=4", "train.micro_batch=28", "train.updates=2")
"""Seven conditions in three parts: 3, 2 and 2."""


def flat(trainer):
    return torch.cat([value.flatten() for _, value in zero.full_parameters(trainer.engine)])


def mixture(images, targets, asked):
    """Differs between samples, and shows where image, target and class are not of one sample."""
    shown = targets.flatten(1).mean(1).repeat_interleave(len(images) // len(targets))
    return images.flatten(1).mean(1) + shown + asked["class_labels"]


def test_a_sample_is_scored_with_the_target_and_the_class_of_its_own_condition(start):
    trainer = start(*UNEVEN, reward=mixture)
    collector, samples = trainer.collector, trainer.collector.collect(0, trainer.objective.policies[0])
    batch = samples.batch
    assert batch.indices.tolist() == collector.pool.draw(7, iteration=0).tolist()
    latents = collector.targets.targets(collector.pool, batch.indices, collector.device)
    images, targets = ((x.double() / 2 + 0.5).clamp(0, 1).mean((1, 2, 3)) for x in (samples.trajectory.final, latents))
    own = torch.arange(28) // 4
    expected = images + targets[own] + batch.indices[own] % 10
    assert list(samples.terms) == ["mixture"]
    torch.testing.assert_close(samples.terms["mixture"], expected, rtol=1e-6, atol=0)


# noise


@pytest.mark.parametrize("pairing", ["noise", "prompt"])
def test_pairing_decides_whether_a_group_starts_from_the_noise_of_the_teacher(start, pairing):
    trainer = start(f"rollout.pairing={pairing}")
    batch = trainer.collector.draw_conditions(0)
    trajectory = trainer.collector.roll_out(batch, trainer.objective.policies[0])
    initial = trajectory.latents[trajectory.step == 0].view(4, 4, -1)  # conditions x samples of a group
    teachers = trainer.pool.initial_noise(batch.indices).view(4, 1, -1)
    if pairing == "noise":
        assert torch.equal(initial, teachers.expand_as(initial))
    else:
        rows = torch.cat([initial.flatten(0, 1), teachers.flatten(0, 1)])
        assert len(rows.unique(dim=0)) == 4 * 4 + 4


def test_noise_differs_between_samples_steps_and_iterations(start):
    trainer = start()
    policy, rows = trainer.objective.policies[0], []
    for iteration in range(2):
        batch = trainer.collector.draw_conditions(iteration)
        drawn = trainer.collector.roll_out(batch, policy)
        labels = batch.condition["class_labels"].repeat_interleave(4)[drawn.sample]
        with torch.no_grad():
            pred, _ = predict_step(trainer.student, policy, drawn.latents, drawn.step, {"class_labels": labels}, 1.0)
        a, b, std = (value.view(-1, 1, 1, 1) for value in coefficients(policy, drawn.step))
        rows.append(((drawn.next_latents - a * drawn.latents - b * pred) / std).flatten(1))
    noise = torch.cat(rows)
    assert len(noise) == 2 * 2 * 16
    assert 0.9 < noise.std() < 1.1
    # 64 numbers a row: between independent rows the correlation is 1/8 or so, between the same noise it is 1
    assert (torch.corrcoef(noise) - torch.eye(len(noise))).abs().max() < 0.8


# parts


@pytest.mark.parametrize("pairing", ["noise", "prompt"])
def test_parts_draw_the_same_samples_and_rewards_in_the_same_order(start, pairing):
    drawn = {}
    for chunks in (1, PARTS):
        trainer = start(*UNEVEN, f"rollout.chunks={chunks}", f"rollout.pairing={pairing}", reward=mixture)
        drawn[chunks] = trainer.collector.collect(0, trainer.objective.policies[0])
        assert trainer.account.passes["student_forward"] == drawn[chunks].trajectory.passes
    whole, parts = drawn[1].trajectory, drawn[PARTS].trajectory
    assert parts.passes == whole.passes
    for name in ("sample", "step"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    for name in ("latents", "next_latents", "final", "log_prob"):
        # batches of other sizes round differently, which a random network's late steps multiply; other noise gives 1
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-4)
    rewards = [samples.terms["mixture"] for samples in drawn.values()]
    torch.testing.assert_close(*rewards, rtol=0, atol=1e-4)
    assert rewards[0].unique().numel() == 28


def test_parts_change_no_metric_and_no_update(start):
    rows, weights = {}, {}
    for chunks in (1, PARTS, 7):
        trainer = start(*UNEVEN, f"rollout.chunks={chunks}", "objective.kl_coef=0.1")
        initial = flat(trainer)
        rows[chunks] = [trainer.train_iteration() for _ in range(3)]
        weights[chunks] = flat(trainer)
    for chunks in (PARTS, 7):
        for row, expected in zip(rows[chunks], rows[1], strict=True):
            assert set(row) == set(expected)
            for name in expected:
                if name.startswith("time/"):
                    continue
                # the ratio error is rounding and nothing else
                loose = 1e-3 if name == "ratio/first_pass_error" else 1e-5
                assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=loose), name
        assert (weights[chunks] - weights[1]).norm() < 1e-2 * (weights[1] - initial).norm()  # seen: 1e-3


def test_a_part_is_scored_in_another_thread_while_the_next_is_rolled_out(start):
    """Told by the order of events: the first score does not end before the second rollout has begun."""
    begun, events = threading.Event(), []

    def waiting(images, targets, asked):
        mine = threading.current_thread() is threading.main_thread()
        if not any(event.startswith("scored") for event in events):
            assert begun.wait(timeout=60)
        events.append(f"scored {len(targets)} {'here' if mine else 'apart'}")
        return images.flatten(1).mean(1)

    trainer = start(*UNEVEN, f"rollout.chunks={PARTS}", reward=waiting)
    roll_out = trainer.collector.roll_out

    def watched(batch, policy):
        events.append(f"rolled out {len(batch.slots)}")
        if len(events) > 1:
            begun.set()
        return roll_out(batch, policy)

    trainer.collector.roll_out = watched
    trainer.train_iteration()
    assert events.index("rolled out 2") < events.index("scored 3 apart")
    rolled_out = ["rolled out 2", "rolled out 2", "rolled out 3"]
    assert sorted(events) == [*rolled_out, "scored 2 apart", "scored 2 here", "scored 3 apart"]


@pytest.mark.parametrize("part", range(PARTS))
def test_a_score_that_fails_in_any_part_ends_the_iteration_before_any_update(start, part):
    sizes = iter(range(PARTS))

    def broken(images, targets, asked):
        score = images.flatten(1).mean(1)
        return score * torch.nan if next(sizes) == part else score

    trainer = start(*UNEVEN, f"rollout.chunks={PARTS}", reward=broken)
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    with pytest.raises(
        EngineError, match=r"iteration 1: .*broken is not finite for (12|8) of (12|8).*nothing was updated"
    ):
        trainer.train_iteration()
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.module.state_dict().items())


def test_an_error_of_another_kind_in_the_scoring_thread_is_not_swallowed(start):
    def wrong(images, targets, asked):
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("of the user's own reward")
        return images.flatten(1).mean(1)

    trainer = start(*UNEVEN, f"rollout.chunks={PARTS}", reward=wrong)
    with pytest.raises(ZeroDivisionError, match="of the user's own reward"):
        trainer.train_iteration()


# conditions on text


def test_a_group_of_text_conditions_is_stored_once_and_rewards_read_its_prompts(start, tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    things = ("cat", "dog", "house", "tree", "photo")
    prompts.write_text("".join(f"a {colour} {thing}\n" for colour in ("red", "blue", "green") for thing in things))
    asked_for = []

    def length(images, targets, asked):
        asked_for.append(asked["prompt"])
        return torch.tensor([float(len(prompt)) for prompt in asked["prompt"]])

    trainer = start(
        f"teacher.path={tiny_pipeline('sd')}",
        "teacher.resolution=[16, 16]",
        "teacher.guidance=2",
        "student.guidance=2",
        "reward.terms={pixel: 1}",
        f"prompts.path={prompts}",
        "prompts.held_out=0.4",
        "rollout.conditions=3",
        "rollout.pool=3",
        "rollout.chunks=2",
        "train.ratio_tolerance=0.01",
        reward=length,
    )
    batch = trainer.collector.draw_conditions(0)
    assert all(len(value) == 3 for value in batch.condition.values())
    samples = trainer.collector.collect(0, trainer.objective.policies[0])
    expected = [prompt for prompt in trainer.pool.asked(batch.indices)["prompt"] for _ in range(4)]
    assert [prompt for part in sorted(asked_for, key=len, reverse=True) for prompt in part] == expected
    assert samples.terms["length"].tolist() == [len(prompt) for prompt in expected]
    row = trainer.train_iteration()
    assert row["reward/within_group_std"] == 0  # a reward of the prompt alone
    assert row["ratio/first_pass_error"] < 0.01
