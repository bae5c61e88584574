"""Behaviour cloning: a student of another architecture predicts as its teacher does before reward teaches it more."""

import json
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import EngineError, zero
from engine.cloning import clone, teacher_predictions
from engine.conditions import ConditionPool
from engine.models.digits import TEACHER_DIR
from engine.models.pipelines import load_pipeline
from engine.sampling import deterministic_policy, sample
from engine.sources import Classes

SMALLER = "student.architecture={block_out_channels: [8, 8]}"  # of the tiny teacher's [8, 16]
HELD_OUT = torch.arange(20)
CPU = torch.device("cpu")


def weights(trainer):
    return {name: value.clone() for name, value in zero.full_parameters(trainer.engine)}


def distance(first, second) -> float:
    return math.sqrt(sum((first[name].double() - second[name].double()).square().sum().item() for name in first))


def error(student, teacher, steps: int) -> float:
    """Mean squared error of the student's predictions on the teacher's trajectories of held-out conditions."""
    pool = ConditionPool("held_out", 0, len(HELD_OUT), Classes(10), teacher.latent_shape)
    policy, condition = deterministic_policy(teacher, steps), pool.condition(HELD_OUT)
    states, predictions = teacher_predictions(
        teacher, policy, pool.initial_noise(HELD_OUT), condition, guidance=1.0, batch_size=None
    )
    with torch.no_grad():
        own = [
            student.predict(x, policy.timesteps[step].expand(len(x)), condition)[0].float()
            for step, x in enumerate(states)
        ]
    return (torch.stack(own) - predictions).square().mean().item()


def test_a_smaller_student_of_the_digits_learns_to_predict_as_its_teacher(start):
    trainer = start(
        f"teacher.path={TEACHER_DIR}",
        "student.architecture={block_out_channels: [16, 24]}",
        "student.steps=4",
        "cloning.iterations=150",
        "cloning.lr=3e-3",
        "rollout.pool=64",
        "rollout.conditions=16",
        "train.micro_batch=128",
        "train.updates=1",
    )
    teacher = load_pipeline(TEACHER_DIR).denoiser
    count = sum(value.numel() for value in trainer.engine.module.parameters())
    assert count < 0.5 * sum(value.numel() for value in teacher.network.parameters())
    before = error(trainer.student, teacher, 4)
    losses = clone(trainer, teacher)
    after = error(trainer.student, teacher, 4)
    assert len(losses) == 150
    assert all(math.isfinite(loss) for loss in losses)
    assert max(losses[-5:]) < losses[0] / 50  # seen: 176
    assert after < before / 10  # seen: 23, on 20 conditions that it was not cloned on


def test_states_and_predictions_are_those_of_the_teachers_own_trajectories(tiny_teacher):
    teacher = load_pipeline(tiny_teacher).denoiser
    pool, indices = ConditionPool("train", 0, 5, Classes(10), (1, 8, 8)), torch.arange(5)
    policy = deterministic_policy(teacher, 3)
    noise, condition = pool.initial_noise(indices), pool.condition(indices)
    states, predictions = teacher_predictions(teacher, policy, noise, condition, guidance=2.0, batch_size=2)
    assert states.shape == predictions.shape == (3, 5, 1, 8, 8)
    assert torch.equal(states[0], noise)
    for step, (x, prediction) in enumerate(zip(states, predictions, strict=True)):
        t, labels = policy.timesteps[step], condition["class_labels"]
        with torch.no_grad():
            asked = teacher.network(x, t, class_labels=labels).sample
            nothing = teacher.network(x, t, class_labels=torch.full_like(labels, 10)).sample
        torch.testing.assert_close(prediction, nothing + 2 * (asked - nothing), rtol=1e-4, atol=1e-4)
    final, _ = sample(teacher, policy, pool, indices, guidance=2.0, device=CPU)
    torch.testing.assert_close(
        policy.a[-1].float() * states[-1] + policy.b[-1].float() * predictions[-1], final, rtol=1e-4, atol=1e-4
    )


def test_the_average_and_the_reference_start_from_the_cloned_student(start):
    settings = (SMALLER, "cloning.iterations=3", "objective.kl_coef=0.1", "train.updates=1", "train.micro_batch=32")
    trainer = start(*settings)
    before = weights(trainer)
    clone(trainer, trainer.collector.targets.teacher)
    cloned = weights(trainer)
    assert distance(cloned, before) > 1e-2
    reference = dict(trainer.reference.network.named_parameters())
    assert all(torch.equal(value, cloned[name]) for name, value in trainer.averaged.values.items())
    assert all(torch.equal(value, cloned[name]) for name, value in reference.items())
    assert trainer.iteration == 0
    rows = [trainer.train_iteration() for _ in range(2)]
    assert rows[0]["loss/kl"] == 0
    assert rows[1]["loss/kl"] > 0
    assert rows[0]["lr"] == trainer.config.optimizer.lr
    assert all(torch.equal(value, cloned[name]) for name, value in reference.items())  # and is frozen again


@pytest.mark.parametrize(("guidance", "per_latent"), [(1, 1), (2, 2)])
def test_passes_of_cloning_are_the_rows_that_went_through_the_networks(start, guidance, per_latent):
    trainer = start(
        SMALLER,
        "cloning.iterations=2",
        f"student.guidance={guidance}",
        f"teacher.guidance={guidance}",
        "train.micro_batch=12",
        "train.updates=1",
    )
    rows = Counter()
    teacher = trainer.collector.targets.teacher
    trainer.engine.module.register_forward_hook(lambda m, i, o: rows.update(student_forward=len(o.sample)))
    trainer.engine.module.conv_out.register_full_backward_hook(lambda m, i, o: rows.update(student_backward=len(o[0])))
    teacher.network.register_forward_hook(lambda m, i, o: rows.update(teacher=len(o.sample)))
    clone(trainer, teacher)
    counted = trainer.account.passes
    assert {role: counted[role] for role in rows} == rows
    # 8 conditions, the whole pool, of 3 steps give 24 pairs, where three micro-batches of 12 would hold 36
    assert rows == Counter(
        student_forward=2 * 24 * per_latent, student_backward=2 * 24 * per_latent, teacher=2 * 24 * per_latent
    )
    assert trainer.account.seconds["cloning"] > 0


@pytest.mark.parametrize(("stage", "micro_batch"), [(0, 16), (0, 8), (2, 8), (3, 16)])
def test_micro_batches_give_the_gradient_of_one(start, stage, micro_batch):
    # eps=1 makes Adam's first steps linear in the gradient, so that a wrong gradient is not hidden by its normalisation
    linear = (
        SMALLER,
        "cloning.iterations=2",
        "cloning.lr=1e-2",
        "optimizer.eps=1",
        "optimizer.max_grad_norm=1000",
        "train.updates=1",
        "rollout.pool=16",
    )
    whole, parts = (
        start(*linear, "train.micro_batch=32"),
        start(*linear, f"train.micro_batch={micro_batch}", f"zero.stage={stage}"),
    )
    steps = [trainer.engine.gradient_accumulation_steps() for trainer in (whole, parts)]
    assert steps == [1, 32 // micro_batch]
    before = weights(whole)
    losses = [clone(trainer, trainer.collector.targets.teacher) for trainer in (whole, parts)]
    after = weights(whole)
    assert distance(after, before) > 1e-3
    assert distance(weights(parts), after) < 1e-4 * distance(after, before)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_loss_is_the_mean_squared_error_of_the_predictions(start):
    trainer = start(SMALLER, "cloning.iterations=1", "train.updates=1", "train.micro_batch=32", "rollout.pool=8")
    teacher = trainer.collector.targets.teacher
    network = type(trainer.engine.module).from_config(trainer.engine.module.config)
    network.load_state_dict(weights(trainer))
    pool, policy = trainer.pool, deterministic_policy(teacher, 3)
    indices = pool.draw(8, iteration=0)
    states, predictions = teacher_predictions(
        teacher, policy, pool.initial_noise(indices), pool.condition(indices), guidance=1.0, batch_size=None
    )
    errors = []
    for step, (x, target) in enumerate(zip(states, predictions, strict=True)):
        with torch.no_grad():
            own = network(x, policy.timesteps[step], **pool.condition(indices)).sample
        errors.append((own - target).double().square().mean().item())
    assert clone(trainer, teacher) == [pytest.approx(sum(errors) / 3, rel=1e-4)]


def test_the_learning_rate_falls_as_a_cosine_from_that_of_cloning(start, monkeypatch):
    rates, usual = [], zero.set_learning_rate
    monkeypatch.setattr(zero, "set_learning_rate", lambda engine, lr: rates.append(lr) or usual(engine, lr))
    trainer = start(SMALLER, "cloning.iterations=4", "cloning.lr=2e-3")
    clone(trainer, trainer.collector.targets.teacher)
    assert rates == pytest.approx([2e-3, 1.70711e-3, 1e-3, 0.29289e-3], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_cloning(start):
    trainer = start(SMALLER, "cloning.iterations=4", "train.micro_batch=12")
    trainer.engine.module.register_forward_hook(lambda m, i, o: setattr(o, "sample", o.sample * torch.nan))
    with pytest.raises(EngineError, match=r"cloning: the loss is nan; lower cloning\.lr"):
        clone(trainer, trainer.collector.targets.teacher)


def test_a_pool_smaller_than_a_step_of_cloning_is_regressed_on_whole(start):
    sizes = ("rollout.conditions=2", "rollout.pool=2", "rollout.group_size=8", "train.updates=1", "train.micro_batch=4")
    trainer = start(SMALLER, "cloning.iterations=4", *sizes)
    clone(trainer, trainer.collector.targets.teacher)
    assert trainer.account.passes["student_backward"] == 4 * 2 * 3  # iterations, conditions, steps


@pytest.mark.usefixtures("quick_finish")
def test_a_run_clones_goes_on_with_rewards_and_leaves_a_student_for_stock_diffusers(tmp_path, tiny_config, stock_ddim):
    from diffusers import DiffusionPipeline

    settings = (SMALLER, "cloning.iterations=5", "iterations=2", "optimizer.lr=5e-3")
    result = engine.distill(tiny_config(tmp_path / "run", *settings))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)
    cloning = result.metrics["passes"]["student_backward"] - sum(row["passes/student_backward"] for row in rows)
    assert cloning == 5 * 16
    assert result.metrics["seconds"]["cloning"] > 0
    directory = tmp_path / "run" / "student"
    pipeline = DiffusionPipeline.from_pretrained(directory)
    assert pipeline.unet.config.block_out_channels == [8, 8]
    averaged = load_file(tmp_path / "run" / "checkpoints" / "iteration-000002" / "ema.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in pipeline.unet.state_dict().items())
    pool, indices = ConditionPool("train", 5, 20, Classes(10), (1, 8, 8)), torch.tensor([0, 3, 11, 19])
    policy = deterministic_policy(result.student, 3)
    ours, _ = sample(result.student, policy, pool, indices, guidance=1.0, device=CPU)
    drawn = stock_ddim(directory, pool.initial_noise(indices), indices % 10, 3, 1.0)
    torch.testing.assert_close(drawn, ours, rtol=1e-4, atol=1e-4)
