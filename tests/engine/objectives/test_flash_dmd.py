"""Flash-DMD: the two bands, the pixel discriminator, and the critic that is moved towards the student."""

import pytest
import torch

from engine import zero
from engine.errors import EngineError
from engine.models.digits import load_reward_encoder
from engine.models.process import levels
from engine.objectives.flash_dmd import DISCRIMINATOR
from engine.objectives.injection import inject

KIND = "objective.kind=flash_dmd"
SIZES = (
    KIND,
    "objective.flash_dmd.critic.warmup=0",
    "student.sampler=renoise",
    "train.batch_size=4",
    "train.micro_batch=4",
    "train.updates=1",
)
PIXELS = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2")


def module_of(trainer, role):
    return trainer.parts["flash_dmd"].learners[role].engine.module


# ---------------------------------------------------------------------- the critic follows


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_injection_moves_what_the_optimizer_works_on(start, stage, precision):
    trainer = start(*SIZES, f"zero.stage={stage}", f"precision={precision}", "objective.flash_dmd.critic.keep=1")
    trainer.train_iteration()  # so that the two differ
    critic, student = trainer.parts["flash_dmd"].learners["critic"].engine, trainer.engine

    def weights(engine):
        return {name: value.clone() for name, value in zero.full_parameters(engine)}

    mine, theirs = weights(critic), weights(student)
    inject(critic, student, 0.75)
    moved = weights(critic)
    for name, value in moved.items():
        torch.testing.assert_close(value, 0.75 * mine[name] + 0.25 * theirs[name], rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(student).items())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    computing = zero.write_parameters(critic, moved)  # tells what stood in the network
    assert all(torch.equal(computing[name], value.to(dtype)) for name, value in moved.items())
    trainer.train_iteration()  # the optimizer goes on from there
    change = max(float((value - moved[name]).abs().max()) for name, value in zero.full_parameters(critic))
    assert 0 < change < 5 * trainer.config.objective.flash_dmd.critic.lr


def test_the_critic_is_moved_after_each_step_of_the_student(start):
    rows = []
    for keep in ("1", "0"):
        trainer = start(*SIZES, f"objective.flash_dmd.critic.keep={keep}")
        trainer.train_iteration()
        student, critic = (dict(zero.full_parameters(engine)) for engine in (trainer.engine, _critic(trainer)))
        rows.append(all(torch.equal(value, student[name]) for name, value in critic.items()))
    assert rows == [False, True]


def _critic(trainer):
    return trainer.parts["flash_dmd"].learners["critic"].engine


RANKS = """
import torch
from engine import load_config, ranks, zero
from engine.objectives.injection import inject
config = load_config({{"zero": {{"stage": {stage}}}, "precision": "fp32", "optimizer": {{"lr": 0.1}}}})
ranks.start(1)
engines = []
for seed in (0, 1):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))  # odd sizes: a part is padded
    engines.append(zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=2))
before = [{{name: value.clone() for name, value in zero.full_parameters(engine)}} for engine in engines]
inject(*engines, 0.25)
for name, value in zero.full_parameters(engines[0]):
    torch.testing.assert_close(value, 0.25 * before[0][name] + 0.75 * before[1][name])
x = torch.full((2, 3), 0.5)
full = dict(zero.full_parameters(engines[0]))
expected = (x @ full["0.weight"].T + full["0.bias"]) @ full["1.weight"].T + full["1.bias"]
torch.testing.assert_close(engines[0](x), expected)
ranks.barrier()
ranks.stop()
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_move_their_parts(launch, tmp_path, stage):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(stage=stage))
    processes = launch.start_ranks([[str(script)]] * 2, tmp_path)
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


def test_a_student_of_another_architecture_cannot_pull_the_critic(start):
    how = ("student.architecture={layers_per_block: 2}", "cloning.iterations=1")
    with pytest.raises(EngineError, match=r"objective.flash_dmd.critic.keep=0.99 moves the critic"):
        start(*SIZES, *how)


# ---------------------------------------------------------------------- the bands


def test_each_band_has_its_own_steps_and_the_low_one_noised_images_of_the_student(start):
    trainer = start(*SIZES, "train.batch_size=32", "student.steps=4", "objective.flash_dmd.boundary=0.4")
    objective = trainer.objective
    policy, schedule = objective.matching.sampler.policy, trainer.student.schedule
    with torch.no_grad():
        examples = objective.draw("student", 0)
        times = {name: policy.timesteps[examples[name]] for name in ("step", "low_step")}
        assert set(examples["step"].tolist()) == {0, 1, 2}
        assert set(examples["low_step"].tolist()) == {3}
        assert times["low_step"].max() < 400 <= times["step"].min()
        # what is noised at low noise is an image that the sampler draws: with the noise taken off, the last step's
        rows = objective.draws["student"].rows(0)
        noise = objective.draws["student"].noise("low noise", 0, rows)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in levels(schedule, times["low_step"]))
        image = (examples["low_x"] - sigma * noise) / alpha
        again = objective.matching.sampler.walk(
            objective.draws["student"], 0, rows, examples["x"], examples["step"], torch.full_like(examples["step"], 4)
        )
    torch.testing.assert_close(image.float(), again, rtol=0, atol=1e-4 * float(again.abs().max()))


@pytest.mark.parametrize("boundary", [0.01, 0.999999])
def test_a_boundary_that_leaves_a_band_without_steps_is_refused(start, boundary):
    with pytest.raises(EngineError, match=r"objective.flash_dmd.boundary: none of the student's steps reads"):
        start(
            *SIZES,
            "student.steps=1" if boundary == 0.999999 else "student.steps=2",
            f"objective.flash_dmd.boundary={boundary}",
        )


def test_the_gan_reaches_the_student_through_the_low_band_alone_and_leaves_nothing_behind(start):
    gradients = []
    for weight in (1e-9, 1, 3):
        trainer = start(*SIZES, f"objective.flash_dmd.gan_weight={weight}")
        with torch.no_grad():
            examples = trainer.objective.draw("student", 0)
        for name in ("low_x", "x"):
            examples[name].requires_grad_()
        with trainer._frozen_but(trainer.learner):
            trainer.engine.backward(trainer.objective.loss("student", examples).loss)
        for role in ("critic", DISCRIMINATOR):
            assert all(parameter.grad is None for parameter in module_of(trainer, role).parameters())
        network = torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()])
        gradients.append((network, examples["x"].grad.clone(), examples["low_x"].grad.clone()))
    (none, high, low), (one, high_one, low_one), (three, high_three, low_three) = gradients
    torch.testing.assert_close(three - none, 3 * (one - none), rtol=0, atol=1e-4 * float(three.abs().max()))
    assert torch.equal(high, high_one)
    assert torch.equal(high, high_three)
    assert low_one.abs().max() > 0
    assert low.abs().max() < 1e-6
    torch.testing.assert_close(low_three, 3 * low_one, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------- the discriminator


def test_the_discriminator_looks_at_digits_through_the_rewards_encoder_and_trains_heads_alone(start):
    trainer = start(*SIZES)
    objective, encoder = trainer.objective, load_reward_encoder()
    seen = {}
    for name in ("fine", "coarse"):
        getattr(encoder, name).register_forward_hook(lambda _, given, out, name=name: seen.__setitem__(name, out))
    images = torch.rand(3, 1, 8, 8)
    encoder(images)
    for ours, name in zip(objective.features(images), ("fine", "coarse"), strict=True):
        assert torch.equal(ours, seen[name])
    assert {name.split(".")[0] for name, _ in module_of(trainer, DISCRIMINATOR).named_parameters()} == {"heads"}


def test_the_discriminator_learns_to_tell_the_images_apart(start):
    trainer = start(*SIZES, "train.batch_size=16", "objective.flash_dmd.discriminator_lr=1e-2")
    learner, parts = trainer.parts["flash_dmd"].learners[DISCRIMINATOR], list(trainer.parts.values())
    losses = [trainer._step(learner, DISCRIMINATOR, parts, number)["loss/discriminator"] for number in range(12)]
    assert losses[-1] < losses[0] - 0.1


def test_other_images_need_the_directory_of_an_encoder(start, tiny_pipeline, tmp_path):
    dit = (*SIZES, f"teacher.path={tiny_pipeline('dit')}", *PIXELS)
    with pytest.raises(EngineError, match=r"objective.flash_dmd.encoder.path is not set"):
        start(*dit)
    with pytest.raises(EngineError, match=rf"objective.flash_dmd.encoder.path={tmp_path}: it has no config.json"):
        start(*dit, f"objective.flash_dmd.encoder.path={tmp_path}")


@pytest.mark.parametrize("lora", [0, 2])
def test_a_transformer_trains_with_the_hidden_states_of_a_vision_model(start, tiny_pipeline, clip, lora):
    encoder = (f"objective.flash_dmd.encoder.path={clip}", "objective.flash_dmd.encoder.layers=[1, 2]")
    trainer = start(*SIZES, f"teacher.path={tiny_pipeline('dit')}", *PIXELS, *encoder, f"lora.rank={lora}")
    assert len(module_of(trainer, DISCRIMINATOR).heads) == 2
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row[f"grad_norm{role}"] > 0 for row in rows for role in ("", "/critic", "/discriminator"))


# ---------------------------------------------------------------------- with others


def test_a_flow_trains_and_takes_turns_with_policy_optimisation(start, tiny_flow_teacher):
    joint = (
        "objective.kind=grpo",
        "objective.joined={flash_dmd: 1}",
        "objective.flash_dmd.critic.warmup=0",
        "objective.turns={grpo: 1, flash_dmd: 1}",
    )
    policy = ("student.sampler=renoise", "policy.kind=renoise", "policy.eta=0.7", f"teacher.path={tiny_flow_teacher}")
    trainer = start(*joint, *policy, "train.batch_size=4", "train.updates=1")
    first, second = (trainer.train_iteration() for _ in range(2))
    assert "reward/mean" in first
    assert "gan/generator" not in first
    assert "gan/generator" in second
    assert "reward/mean" not in second


def test_a_resumed_run_goes_on_exactly(start, tmp_path):
    whole = start(*SIZES)
    rows = [whole.train_iteration() for _ in range(2)]
    first = start(*SIZES)
    first.train_iteration()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    first.save(folder, "teacher")
    second = start(*SIZES)
    second.restore(folder)
    again = second.train_iteration()
    same = {name for name in rows[1] if not name.startswith(("time/", "passes/"))}
    assert {name: again[name] for name in same} == {name: rows[1][name] for name in same}
