"""Regression on the teacher's pairs: its distance, its gradient, and that it teaches."""

import pytest
import torch

from engine.models.pipelines import load_pipeline
from engine.objectives.regression import pseudo_huber

KIND = "objective.kind=regression"
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2", "train.batch_size=8")


def test_pseudo_huber_is_squared_below_c_and_absolute_above():
    small, large = (torch.tensor([value, -value], dtype=torch.float64, requires_grad=True) for value in (1e-4, 1e3))
    c = 0.5
    assert pseudo_huber(small, c).item() == pytest.approx(1e-8 / (2 * c), rel=1e-6)
    assert pseudo_huber(large, c).item() == pytest.approx(1e3 - c, rel=1e-6)
    pseudo_huber(large, c).backward()
    torch.testing.assert_close(large.grad, torch.tensor([0.5, -0.5], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_loss_compares_what_stock_samplers_draw(start, tiny_teacher, stock_ddim, loss, guidance):
    trainer = start(KIND, f"objective.regression.loss={loss}", f"teacher.guidance={guidance}", "train.batch_size=8")
    objective = trainer.parts["regression"].objective
    examples = objective.draw("student", 0)
    labels, noise = examples.condition["class_labels"], examples["initial"]
    student = stock_ddim(tiny_teacher, noise, labels, 3, 1.0)
    difference = (student - stock_ddim(tiny_teacher, noise, labels, 6, guidance)).double()
    c = trainer.config.objective.regression.huber_c
    expected = difference.square() if loss == "mse" else (difference.square() + c * c).sqrt() - c
    assert objective.loss("student", examples).loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_a_student_that_takes_its_teachers_steps_has_nothing_to_learn(start):
    objective = start(KIND, "student.steps=6").parts["regression"].objective
    assert objective.loss("student", objective.draw("student", 0)).loss.item() < 1e-9


@pytest.mark.parametrize("gradient_steps", [1, 3])
def test_the_gradient_is_that_of_stock_networks_and_schedulers(start, tiny_teacher, gradient_steps):
    trainer = start(KIND, f"objective.regression.gradient_steps={gradient_steps}", "train.batch_size=8")
    objective = trainer.parts["regression"].objective
    examples = objective.draw("student", 0)
    trainer.engine.backward(objective.loss("student", examples).loss)

    pipeline = load_pipeline(tiny_teacher)
    network, scheduler, x = pipeline.denoiser.network.train(False), pipeline.scheduler, examples["initial"]
    scheduler.set_timesteps(3)
    for step, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(step >= 3 - gradient_steps):
            prediction = network(x, timestep, class_labels=examples.condition["class_labels"]).sample
            x = scheduler.step(prediction, timestep, x, eta=0.0).prev_sample
    (x - examples["target"]).square().mean().backward()
    ours = torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()])
    stock = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(ours, stock, rtol=0, atol=float(stock.abs().max()) * 1e-3)
    assert float(stock.norm()) > 0


@pytest.mark.parametrize("schedule", ["diffusion", "flow"])
def test_a_few_conditions_are_learned(start, tiny_flow_teacher, schedule):
    flow = (f"teacher.path={tiny_flow_teacher}", "policy.kind=flow_sde") if schedule == "flow" else ()
    trainer = start(KIND, *flow, "train.batch_size=8", "rollout.pool=8", "optimizer.lr=3e-3", "teacher.steps=12")
    losses = [trainer.train_iteration()["loss/loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("lora", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_transformer_trains(start, tiny_pipeline, lora, precision):
    how = (f"lora.rank={lora}", f"precision={precision}", f"teacher.precision={precision}", "train.micro_batch=3")
    trainer = start(KIND, f"teacher.path={tiny_pipeline('dit')}", *DIT, *how)
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[1]["loss/loss"] != rows[0]["loss/loss"]
