"""The differentiable chain: the same steps as a rollout, and gradients through the last of them alone."""

import pytest
import torch

from engine import zero
from engine.objectives.chain import Chain, walk
from engine.rl import GaussianPolicy
from engine.rl.rollout import rollout

DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2", "train.batch_size=4")


class Linear(torch.nn.Module):
    """A denoiser in float64 that predicts weight * x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def guided(self, x, timestep, condition, *, guidance):
        return self.weight * x


def policy(std=(0.0, 0.0, 0.0, 0.0)) -> GaussianPolicy:
    a, b = torch.tensor([[0.9, 1.1, 0.7, 1.2], [0.4, -0.6, 0.5, -0.2]], dtype=torch.float64)
    return GaussianPolicy(torch.tensor([8, 6, 4, 2]), a, b, torch.tensor(std, dtype=torch.float64))


def latents(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", ["ode", "renoise"])
@pytest.mark.parametrize("guidance", [1, 2.5])
def test_the_chain_ends_where_a_rollout_with_the_same_noise_does(start, sampler, guidance):
    how = (f"student.sampler={sampler}", f"student.guidance={guidance}", "train.batch_size=8")
    trainer = start("objective.kind=regression", *how)
    chain = Chain(trainer.parts["regression"].objective.context, "regression", None)
    examples = chain.draw(0)
    stochastic = chain.policy.stochastic.nonzero().flatten().tolist()
    assert len(stochastic) == (2 if sampler == "renoise" else 0)
    drawn = rollout(
        trainer.student,
        chain.policy,
        examples["initial"],
        examples.condition,
        guidance=guidance,
        step_noise=lambda step: examples["noise"][:, stochastic.index(step)],
    )
    # the first image that a renoising student predicts is x / 0.006
    torch.testing.assert_close(chain.final(examples), drawn.final, rtol=0, atol=1e-6 * drawn.final.abs().max().item())


@pytest.mark.parametrize("gradient_steps", [1, 2, 3, 4, None])
def test_a_gradient_is_that_of_the_last_steps_with_the_state_before_them_held(gradient_steps):
    model, sampler, x = Linear(), policy(), latents(2, 1, 2, 2)
    final = walk(model, sampler, x, {}, gradient_steps=gradient_steps)
    final.sum().backward()
    weight = model.weight.item()
    factors = (sampler.a + sampler.b * weight).tolist()
    last = range(4 - (gradient_steps or 4), 4)
    slope = sum(sampler.b[i].item() * torch.tensor(factors[:i] + factors[i + 1 :]).double().prod().item() for i in last)
    torch.testing.assert_close(final.detach(), x * torch.tensor(factors).double().prod(), rtol=1e-6, atol=0)
    assert model.weight.grad.item() == pytest.approx(slope * x.sum().item(), rel=1e-6)


def test_the_noise_of_stochastic_steps_enters_in_their_order():
    model, sampler, x = Linear(), policy(std=(0.5, 0.0, 0.25, 0.0)), latents(2, 1, 2, 2)
    noise = latents(2, 2, 1, 2, 2)
    expected = x
    for step, added in enumerate((0.5 * noise[:, 0], 0, 0.25 * noise[:, 1], 0)):
        expected = (sampler.a[step] + sampler.b[step] * model.weight) * expected + added
    torch.testing.assert_close(walk(model, sampler, x, {}, noise=noise), expected, rtol=1e-12, atol=0)


def test_an_optimizer_step_draws_the_same_each_time_and_another_one_something_else(start):
    trainer = start("objective.kind=regression", "student.sampler=renoise", "train.batch_size=4")
    context = trainer.parts["regression"].objective.context
    first, again, other = (Chain(context, "regression", None).draw(number) for number in (3, 3, 4))
    for name in ("index", "initial", "target", "noise"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["noise"][:, 0], first["noise"][:, 1])
    assert torch.equal(first["initial"], context.pool.initial_noise(first["index"]))


def test_passes_are_counted_for_the_steps_that_have_a_gradient(start):
    how = ("objective.regression.gradient_steps=2", "student.guidance=2", "train.batch_size=8")
    trainer = start("objective.kind=regression", *how)
    row = trainer.train_iteration()
    updates, batch, guided = 2, 8, 2
    assert row["passes/student_forward"] == updates * batch * 3 * guided
    assert row["passes/student_backward"] == updates * batch * 2 * guided
    assert row["passes/teacher"] == trainer.pool.size * 6


@pytest.mark.parametrize("stage", [2, 3])
def test_partitioned_weights_learn_through_several_steps_as_whole_ones_do(start, stage):
    how = ("objective.kind=regression", "train.batch_size=8", "train.micro_batch=3", "iterations=1")
    whole, partitioned = start(*how), start(*how, f"zero.stage={stage}")
    assert whole.train_iteration()["loss/loss"] == pytest.approx(partitioned.train_iteration()["loss/loss"], rel=1e-5)
    expected = dict(zero.full_parameters(whole.engine))
    for name, value in zero.full_parameters(partitioned.engine):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_recomputed_activations_leave_the_gradient_as_it_is(start, tiny_pipeline, lora):
    how = ("objective.kind=regression", f"teacher.path={tiny_pipeline('dit')}", *DIT, f"lora.rank={lora}")
    plain, recomputed = start(*how), start(*how, "model.gradient_checkpointing=true")
    for trainer in (plain, recomputed):
        trainer.train_iteration()
    expected = dict(zero.full_parameters(plain.engine))
    for name, value in zero.full_parameters(recomputed.engine):
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
