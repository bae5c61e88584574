"""Reward gradients: that they are right, that they teach, and that a reward without them is refused."""

import pytest
import torch

from engine.errors import EngineError
from engine.models.pipelines import load_pipeline

KIND = "objective.kind=draft"
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2", "train.batch_size=8")


def brightness(images, targets, asked):
    return images.flatten(1).mean(1)


def test_the_gradient_is_the_rewards_through_stock_networks_and_schedulers(start, tiny_teacher):
    trainer = start(KIND, "reward.terms={pixel: 2}", "train.batch_size=8")
    objective = trainer.parts["draft"].objective
    examples = objective.draw("student", 0)
    result = objective.loss("student", examples)
    trainer.engine.backward(result.loss)

    pipeline = load_pipeline(tiny_teacher)
    network, scheduler, x = pipeline.denoiser.network, pipeline.scheduler, examples["initial"]
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        prediction = network(x, timestep, class_labels=examples.condition["class_labels"]).sample
        x = scheduler.step(prediction, timestep, x, eta=0.0).prev_sample
    student, teacher = ((latents / 2 + 0.5).clamp(0, 1) for latents in (x, examples["target"]))
    loss = 2 * (student - teacher).square().mean()  # minus the pixel reward
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert result.figures["draft/reward"].item() == -result.loss.item()
    assert result.figures["draft/pixel"].item() == pytest.approx(-loss.item() / 2, rel=1e-4)
    ours = torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()])
    stock = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(ours, stock, rtol=0, atol=float(stock.abs().max()) * 1e-3)


@pytest.mark.parametrize("sampler", ["ode", "renoise"])
@pytest.mark.parametrize("gradient_steps", ["1", "null"])
def test_a_reward_is_climbed(start, sampler, gradient_steps):
    sizes = ("train.batch_size=16", "optimizer.lr=3e-3", "train.updates=1")
    how = (f"student.sampler={sampler}", f"objective.draft.gradient_steps={gradient_steps}")
    trainer = start(KIND, *sizes, *how, reward=brightness)
    rewards = [trainer.train_iteration()["draft/reward"] for _ in range(12)]
    assert rewards[-1] > rewards[0] + 0.1


def test_a_term_without_a_gradient_is_refused_by_its_name(start):
    with pytest.raises(EngineError, match=r"reward.terms has jpeg without one"):
        start(KIND, "reward.terms={pixel: 1, jpeg: 0.5}")


def test_a_term_without_a_gradient_may_be_watched(start):
    row = start(KIND, "reward.terms={pixel: 1, jpeg: 0}", "train.batch_size=8").train_iteration()
    assert row["draft/jpeg"] < 0
    assert row["draft/reward"] == pytest.approx(row["draft/pixel"])


@pytest.mark.parametrize(("lora", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_transformer_trains_through_its_decoder(start, tiny_pipeline, lora, precision):
    how = (f"lora.rank={lora}", f"precision={precision}", f"teacher.precision={precision}", "train.micro_batch=3")
    trainer = start(KIND, f"teacher.path={tiny_pipeline('dit')}", *DIT, *how)
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[1]["loss/loss"] != rows[0]["loss/loss"]
