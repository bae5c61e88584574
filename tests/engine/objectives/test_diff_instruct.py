"""Diff-Instruct: exact with an exact critic, and running on every kind of network."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.models.denoiser import Denoiser
from engine.models.pipelines import load_pipeline
from engine.models.process import diffuse, levels, target
from engine.models.schedules import DiffusionSchedule
from engine.objectives.contract import Context, Examples
from engine.objectives.diff_instruct import DiffInstruct

KIND = "objective.kind=diff_instruct"
WARM = "objective.diff_instruct.critic.warmup=0"
SIZES = (KIND, WARM, "student.sampler=renoise", "train.batch_size=4", "train.micro_batch=3")
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2")
UNBALANCED = "objective.diff_instruct.balance_steps=false"
TIMES, LAST = 20, 19


class Gaussian(nn.Module):
    """Predicts the noise in noised images of N(mean, std^2)."""

    def __init__(self, mean, std, schedule):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))
        self.schedule = schedule

    def forward(self, x, timestep):
        alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in levels(self.schedule, timestep))
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)


class Generator(nn.Module):
    """Predicts the noise that makes the image slope z + shift of pure noise z."""

    def __init__(self, slope, shift, schedule):
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(shift))
        self.schedule = schedule

    def forward(self, x, timestep):
        alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in levels(self.schedule, timestep))
        return (x - alpha * (self.slope * x + self.shift)) / sigma


@pytest.fixture
def gaussian(tiny_config, tmp_path):
    """The objective of a one-step generator N(shift, slope^2), its exact critic and the teacher N(0.7, 1.3^2)."""
    schedule = DiffusionSchedule(
        torch.linspace(0.99, 0.05, TIMES, dtype=torch.float64), 1.0, "epsilon", lambda steps: torch.tensor([LAST])
    )

    def denoiser(network):
        def call(network, x, timestep, condition, guidance):
            return network(x, timestep)

        return Denoiser(network, schedule, (1, 1, 1), call, lambda condition: condition, "none", 1)

    student = Generator(0.8, -0.4, schedule)
    critic = Gaussian(-0.4, 0.8, schedule)
    context = Context(
        config=tiny_config(tmp_path, KIND, "student.steps=1", "objective.diff_instruct.weight=none", UNBALANCED),
        pipeline=None,
        teacher=denoiser(Gaussian(0.7, 1.3, schedule)),
        student=denoiser(student),
        reference=None,
        networks={"critic": critic},
        pool=None,
        targets=None,
        reward=None,
        decode=None,
        collector=None,
        account=SimpleNamespace(passes=Counter()),
        device=torch.device("cpu"),
    )
    return DiffInstruct(context), student, schedule


@pytest.mark.parametrize("time", [0, 5, 12, 19])
def test_an_exact_critic_gives_the_gradient_of_the_kl(gaussian, time):
    objective, student, schedule = gaussian
    # Points of equal weight with the moments of two normal variables up to the third.
    points = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).view(4, 2, 1, 1, 1)
    timestep = torch.full((4,), time)
    values = {"x": points[:, 0], "noise": points[:, 1], "timestep": timestep, "weight": torch.ones(4)}
    values["step"] = torch.zeros(4, dtype=torch.int64)
    objective.loss("student", Examples(values)).loss.backward()

    slope, shift = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, -0.4))
    alpha, sigma = (float(value) for value in levels(schedule, torch.tensor(time)))
    own, theirs = (alpha**2 * std**2 + sigma**2 for std in (slope, 1.3))
    gap = alpha * (shift - 0.7)
    kl = 0.5 * (own / theirs + gap**2 / theirs - 1 - torch.log(own / theirs))
    expected = torch.autograd.grad(kl, (slope, shift))
    # images of noise at the largest timestep are rounded as 1 / alpha of them
    assert student.slope.grad.item() == pytest.approx(expected[0].item(), rel=1e-4, abs=1e-6)
    assert student.shift.grad.item() == pytest.approx(expected[1].item(), rel=1e-4, abs=1e-6)
    critic = objective.context.networks["critic"]
    assert critic.mean.grad is None
    assert critic.std.grad is None


def test_the_critic_learns_by_plain_denoising_of_student_images(start, tiny_teacher):
    trainer = start(*SIZES)
    objective = trainer.objective
    with torch.no_grad():
        examples = objective.draw("critic", 0)
        loss = objective.loss("critic", examples).loss
        teacher = load_pipeline(tiny_teacher).denoiser  # whose copy the critic is at first
        levels = examples["image"], examples["noise"], examples["timestep"]
        prediction = teacher.guided(diffuse(teacher.schedule, *levels), examples["timestep"], examples.condition)
        expected = (prediction - target(teacher.schedule, *levels)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_steps_are_balanced_by_what_their_prediction_does_to_the_image(start):
    gradients = {}
    for balance in ("true", "false"):
        trainer = start(*SIZES, f"objective.diff_instruct.balance_steps={balance}", "train.batch_size=1")
        sampler, student = trainer.objective.matching.sampler, trainer.student
        for step in range(3):
            with torch.no_grad():
                examples = trainer.objective.draw("student", 0)
            examples["step"].fill_(step)
            with trainer._frozen_but(trainer.learner):
                trainer.engine.backward(trainer.objective.loss("student", examples).loss)
            gradients[balance, step] = torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()])
            trainer.engine.module.zero_grad()
    alpha, sigma = levels(student.schedule, sampler.policy.timesteps)
    for step, gain in enumerate((sigma / alpha).tolist()):  # of a noise prediction
        expected = gradients["false", step] / max(gain, 1)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients["true", step], expected, rtol=0, atol=1e-4 * scale)


def test_the_roles_train_apart(start):
    trainer = start(*SIZES)
    critic = trainer.parts["diff_instruct"].learners["critic"].engine.module
    student = trainer.engine.module
    before = [parameter.clone() for parameter in student.parameters()]
    trainer._step(trainer.parts["diff_instruct"].learners["critic"], "critic", list(trainer.parts.values()), 0)
    assert all(torch.equal(now, then) for now, then in zip(student.parameters(), before, strict=True))
    before = [parameter.clone() for parameter in critic.parameters()]
    trainer._step(trainer.learner, "student", list(trainer.parts.values()), 0)
    assert all(torch.equal(now, then) for now, then in zip(critic.parameters(), before, strict=True))


def test_the_student_waits_until_the_critic_is_warm(start):
    trainer = start(*SIZES, "objective.diff_instruct.critic.warmup=2", "train.updates=1")
    first = [parameter.clone() for parameter in trainer.engine.module.parameters()]
    rows = []
    for moves in (False, False, True):
        rows.append(trainer.train_iteration())
        now = trainer.engine.module.parameters()
        assert moves == any(not torch.equal(a, b) for a, b in zip(now, first, strict=True))
    assert all(row["grad_norm/critic"] > 0 for row in rows)
    assert [row["passes/student_backward"] for row in rows] == [1, 1, 4]


def test_passes_are_those_that_were_made(start):
    trainer = start(*SIZES, "train.updates=1", "objective.diff_instruct.critic.updates=2")
    calls = Counter()
    networks = {"student": trainer.engine.module, "teacher": trainer.objective.context.teacher.network}
    networks["critic"] = trainer.parts["diff_instruct"].learners["critic"].engine.module
    for name, network in networks.items():
        network.register_forward_hook(lambda _, given, out, name=name: calls.update({name: len(given[0])}))
    row = trainer.train_iteration()
    assert row["passes/student_forward"] == calls["student"]
    assert row["passes/teacher"] == calls["teacher"] == 4
    assert row["passes/critic_forward"] == calls["critic"] == 2 * 4 + 4
    assert row["passes/critic_backward"] == 2 * 4
    assert row["passes/student_backward"] == 4


@pytest.mark.parametrize("more", [("zero.stage=3",), ("teacher.guidance=2", "objective.diff_instruct.weight=none")])
def test_a_unet_trains(start, more):
    trainer = start(*SIZES, *more)
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 and row["grad_norm/critic"] > 0 for row in rows)
    assert rows[1]["loss/loss"] != rows[0]["loss/loss"]


def test_a_flow_trains(start, tiny_flow_teacher):
    row = start(*SIZES, f"teacher.path={tiny_flow_teacher}", "policy.kind=cps").train_iteration()
    assert row["grad_norm"] > 0
    assert row["grad_norm/critic"] > 0


@pytest.mark.parametrize("lora", [0, 2])
def test_a_transformer_trains(start, tiny_pipeline, lora):
    trainer = start(*SIZES, f"teacher.path={tiny_pipeline('dit')}", *DIT, f"lora.rank={lora}")
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 and row["grad_norm/critic"] > 0 for row in rows)
    if lora:
        critic = trainer.parts["diff_instruct"].learners["critic"].engine.module
        trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(".lora_" in name for name in trained)
        assert critic is not trainer.engine.module
