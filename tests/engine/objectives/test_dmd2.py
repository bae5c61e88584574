"""DMD2: the GAN's gradients go where they should, real images are of the asked classes, and every network trains."""

import pytest
import torch
from torch.nn import functional as F

from engine.errors import EngineError
from engine.models.digits import digits
from engine.models.discriminator import ClassifyingDenoiser
from engine.models.pipelines import load_pipeline
from engine.models.process import levels, target, to_image

SIZES = (
    "objective.kind=dmd2",
    "objective.dmd2.critic.warmup=0",
    "student.sampler=renoise",
    "train.batch_size=4",
    "train.micro_batch=4",
    "train.updates=1",
)
GAN = "objective.dmd2.gan_weight="
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2")


def critic_of(trainer):
    return trainer.parts["dmd2"].learners["critic"].engine.module


def student_gradient(start, *more):
    """The gradient of one student loss in the student, and whether it left any in the critic."""
    trainer = start(*SIZES, *more)
    with torch.no_grad():
        examples = trainer.objective.draw("student", 0)
    with trainer._frozen_but(trainer.learner):
        result = trainer.objective.loss("student", examples)
        trainer.engine.backward(result.loss)
    left = [name for name, parameter in critic_of(trainer).named_parameters() if parameter.grad is not None]
    return torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()]), left, trainer, examples, result


def test_the_gans_gradient_reaches_the_student_and_leaves_none_in_the_critic(start):
    gradients = []
    for weight in (0, 1, 3):
        gradient, left, *_ = student_gradient(start, f"{GAN}{weight}")
        assert not left
        gradients.append(gradient)
    without, one, three = gradients
    assert (one - without).norm() > 1e-3 * without.norm()
    torch.testing.assert_close(three - without, 3 * (one - without), rtol=0, atol=1e-4 * float(three.abs().max()))


def test_the_student_descends_what_teacher_and_critic_disagree_about(start, tiny_teacher):
    torch.manual_seed(0)
    gradient, _, trainer, examples, result = student_gradient(
        start, f"{GAN}0", "teacher.guidance=1.5", "objective.dmd2.balance_steps=false"
    )
    # again by stock means in float64: the critic is a copy of the teacher, without guidance
    pipeline = load_pipeline(tiny_teacher)
    network, schedule = pipeline.denoiser.network, pipeline.denoiser.schedule
    labels, timestep = examples.condition["class_labels"], examples["timestep"]
    step_time = trainer.objective.matching.sampler.policy.timesteps[examples["step"]]
    student = load_pipeline(tiny_teacher).denoiser.network.requires_grad_(True)
    image = to_image(schedule, examples["x"], student(examples["x"], step_time, class_labels=labels).sample, step_time)
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in levels(schedule, timestep))
    with torch.no_grad():
        x = alpha * image.double() + sigma * examples["noise"].double()
        fake = network(x.float(), timestep, class_labels=labels).sample.double()
        nothing = network(x.float(), timestep, class_labels=torch.full_like(labels, 10)).sample.double()
        guided = nothing + 1.5 * (fake - nothing)
        mu_fake, mu_real = ((x - sigma * prediction) / alpha for prediction in (fake, guided))
        scale = (image - mu_real).abs().mean((1, 2, 3), keepdim=True)
        wanted = (mu_fake - mu_real) / scale
    (image * wanted / wanted.numel()).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert result.loss.item() == pytest.approx(0.5 * wanted.square().mean().item(), rel=2e-3)


def test_the_critic_denoises_and_classifies_in_one_pass(start):
    trainer = start(*SIZES, "objective.dmd2.classifier_weight=0.3", "objective.dmd2.real_images=null")
    with torch.no_grad():
        examples = trainer.objective.draw("critic", 0)
        result = trainer.objective.loss("critic", examples)
        critic = critic_of(trainer)
        teacher = trainer.objective.context.teacher
        values = [examples[name] for name in ("image", "noise", "timestep")]
        alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in levels(teacher.schedule, values[2]))
        labels = examples.condition["class_labels"]
        prediction = critic(alpha * values[0] + sigma * values[1], values[2], class_labels=labels).sample
        denoising, fake = F.mse_loss(prediction, target(teacher.schedule, *values)), critic.logits
        values = [examples[f"real_{name}"] for name in ("image", "noise", "timestep")]
        alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in levels(teacher.schedule, values[2]))
        critic(alpha * values[0] + sigma * values[1], values[2], class_labels=labels)
        classifying = F.softplus(fake).mean() + F.softplus(-critic.logits).mean()
    assert result.loss.item() == pytest.approx((denoising + 0.3 * classifying).item(), rel=1e-5)
    drawn = trainer.objective.context.targets
    rows = trainer.objective.matching.draws["critic"].rows(0)
    assert torch.equal(examples["real_image"], drawn.targets(trainer.pool, rows.indices, torch.device("cpu")))


def test_real_digits_are_of_the_asked_classes(start):
    trainer = start(*SIZES, "objective.dmd2.real_images=digits", "rollout.pool=20", "train.batch_size=12")
    examples = trainer.objective.draw("critic", 3)
    images, labels = digits("train")
    for image, label in zip(examples["real_image"], examples.condition["class_labels"], strict=True):
        match = (images == image).flatten(1).all(1)
        assert match.any()
        assert (labels[match] == label).all()
    assert trainer.account.passes["teacher"] == 0


def test_without_a_gan_there_is_no_discriminator(start):
    trainer = start(*SIZES, f"{GAN}0")
    assert not isinstance(critic_of(trainer), ClassifyingDenoiser)
    row = trainer.train_iteration()
    assert "gan/generator" not in row
    assert row["passes/teacher"] == 4


def test_a_band_trains_the_steps_of_the_student_in_it(start):
    trainer = start(*SIZES, "objective.bands={dmd2: [0.5, 1]}", "train.batch_size=32")
    policy = trainer.objective.matching.sampler.policy
    assert set(trainer.objective.draw("student", 0)["step"].tolist()) == {0, 1}
    assert (policy.timesteps[:2] >= 499).all()
    assert policy.timesteps[2] < 499


@pytest.mark.parametrize("network", ["unet", "dit", "dit with adapters"])
def test_it_trains_the_same_at_all_stages(start, tiny_pipeline, network):
    dit = (f"teacher.path={tiny_pipeline('dit')}", *DIT, f"lora.rank={2 if 'adapters' in network else 0}")
    losses = []
    for stage in (0, 3):
        trainer = start(*SIZES, *(() if network == "unet" else dit), f"zero.stage={stage}")
        rows = [trainer.train_iteration() for _ in range(2)]
        assert all(row["grad_norm"] > 0 and row["grad_norm/critic"] > 0 for row in rows)
        losses.append([row[name] for row in rows for name in ("loss/loss", "loss/critic", "gan/generator")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_transformer_trains(start, tiny_pipeline, lora):
    trainer = start(*SIZES, f"teacher.path={tiny_pipeline('dit')}", *DIT, f"lora.rank={lora}")
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 and row["grad_norm/critic"] > 0 for row in rows)
    head = [name for name, parameter in critic_of(trainer).named_parameters() if parameter.requires_grad]
    assert any(name.startswith("head.") for name in head)


def test_real_digits_of_another_teacher_are_refused(start, tiny_pipeline):
    with pytest.raises(EngineError, match=r"objective.dmd2.real_images=digits: the teacher's latents are"):
        start(*SIZES, f"teacher.path={tiny_pipeline('dit')}", *DIT, "objective.dmd2.real_images=digits")


def test_policy_optimisation_can_be_joined(start):
    both = (
        "objective.kind=grpo",
        "objective.joined={dmd2: 0.5}",
        "objective.dmd2.critic.warmup=0",
        "student.sampler=renoise",
        "policy.kind=renoise",
    )
    trainer = start(*both, "train.batch_size=4", "train.updates=1", "policy.eta=0.7")
    row = trainer.train_iteration()
    assert row["grad_norm"] > 0
    assert row["loss/dmd2"] > 0
    assert row["grad_norm/critic"] > 0


def test_levels_must_ascend(start):
    with pytest.raises(EngineError, match=r"objective.dmd2.levels=\[0.9, 0.1\] is empty"):
        start(*SIZES, "objective.dmd2.levels=[0.9, 0.1]")


def test_a_network_without_a_middle_can_have_no_head(start, write_teacher, tmp_path):
    from diffusers import DDIMScheduler

    teacher = write_teacher(tmp_path / "teacher", DDIMScheduler(clip_sample=False), mid_block_type=None)
    with pytest.raises(EngineError, match=r"objective.dmd2.gan_weight: a UNet2DModel has no middle"):
        start(*SIZES, f"teacher.path={teacher}")
    assert start(*SIZES, f"teacher.path={teacher}", f"{GAN}0").train_iteration()["grad_norm"] > 0
