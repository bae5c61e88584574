"""Consistency distillation: the boundary, the teacher's step, gradients, and the averaged target."""

import pytest
import torch

from engine import zero
from engine.errors import EngineError
from engine.models import process
from engine.models.schedules import DiffusionSchedule, FlowSchedule
from engine.objectives.consistency import consistent_image
from engine.rl import ddim_policy

KIND = ("objective.kind=consistency", "student.sampler=renoise", "train.batch_size=8", "rollout.pool=8")
GRID = "objective.consistency.grid=10"
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2")
ALPHAS = torch.linspace(1.0, 0.98, 1001, dtype=torch.float64)[1:].cumprod(0)


def schedule(kind: str):
    return FlowSchedule(None) if kind == "flow" else DiffusionSchedule(ALPHAS, 1.0, kind, timesteps=None)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# the consistency function


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_at_timestep_0_the_image_is_the_latent_itself(kind):
    x, timestep = normal(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(consistent_image(schedule(kind), x, normal(3, 1, 4, 4, seed=1), timestep), x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_at_other_timesteps_it_is_the_predicted_one_with_lcms_scalings(kind):
    x, prediction, timestep = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1), torch.tensor([1, 100, 900])
    t = 10.0 * timestep.double().view(-1, 1, 1, 1)
    skip, out = 0.5**2 / (t**2 + 0.5**2), t / (t**2 + 0.5**2).sqrt()
    expected = skip * x + out * process.to_image(schedule(kind), x, prediction, timestep)
    torch.testing.assert_close(consistent_image(schedule(kind), x, prediction, timestep), expected, rtol=1e-12, atol=0)
    assert float(skip[0]) > 1e-3
    assert float(skip[1:].max()) < 1e-6


def test_a_linear_denoisers_gradient_is_the_closed_form_with_the_target_held():
    """Prediction w x: f = (skip + out (1 - sigma w) / alpha) x, so df/dw = -out sigma / alpha x."""
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    image, noise, eps = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), schedule("epsilon")
    timestep, after = torch.tensor([800, 300]), torch.tensor([780, 280])
    x = process.diffuse(eps, image, noise, timestep)
    steps = [ddim_policy(ALPHAS, [int(t), int(s)], eta=0.0) for t, s in zip(timestep, after, strict=True)]
    a, b = (torch.stack([getattr(step, name)[0] for step in steps]).view(-1, 1, 1, 1) for name in ("a", "b"))
    x_next = (a + b * 0.7) * x  # the teacher predicts 0.7 x
    with torch.no_grad():
        target = consistent_image(eps, x_next, w * x_next, after)
    loss = (consistent_image(eps, x, w * x, timestep) - target).square().mean()
    loss.backward()

    def f(latents, t, weight):
        alpha, sigma = ALPHAS[t].sqrt().view(-1, 1, 1, 1), (1 - ALPHAS[t]).sqrt().view(-1, 1, 1, 1)
        scaled = 10.0 * t.double().view(-1, 1, 1, 1)
        out = scaled / (scaled**2 + 0.25).sqrt()
        return (
            0.25 / (scaled**2 + 0.25) + out * (1 - sigma * weight) / alpha
        ) * latents, -out * sigma / alpha * latents

    value, slope = f(x, timestep, 0.3)
    # the teacher's step by LCM's formula: the guided image and noise at the next level
    alpha, sigma = ALPHAS[timestep].sqrt().view(-1, 1, 1, 1), (1 - ALPHAS[timestep]).sqrt().view(-1, 1, 1, 1)
    alpha_next, sigma_next = ALPHAS[after].sqrt().view(-1, 1, 1, 1), (1 - ALPHAS[after]).sqrt().view(-1, 1, 1, 1)
    led = alpha_next * (x - sigma * 0.7 * x) / alpha + sigma_next * 0.7 * x
    difference = value - f(led, after, 0.3)[0]
    assert loss.item() == pytest.approx(difference.square().mean().item(), rel=1e-10)
    assert w.grad.item() == pytest.approx((2 * difference * slope).mean().item(), rel=1e-10)


# the objective


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_loss_is_lcms_on_guided_steps_of_the_teacher(start, loss, guidance):
    trainer = start(*KIND, GRID, f"objective.consistency.loss={loss}", f"teacher.guidance={guidance}")
    objective = trainer.parts["consistency"].objective
    examples = objective.draw("student", 0)
    x, labels = examples["x"], examples.condition["class_labels"]
    timesteps = objective._solver.timesteps
    timestep = timesteps[examples["place"]]
    after = torch.cat([timesteps[1:], torch.tensor([-1])])[examples["place"]]
    products = objective.context.teacher.schedule.alphas_cumprod
    product = products[timestep].view(-1, 1, 1, 1)
    product_next = torch.where(after < 0, 1.0, products[after.clamp(min=0)]).view(-1, 1, 1, 1)
    network = objective.context.teacher.network

    def image(latents, eps, t, at):
        scaled = 10.0 * t.double().view(-1, 1, 1, 1)
        predicted = (latents - (1 - at).sqrt() * eps) / at.sqrt()
        return 0.25 / (scaled**2 + 0.25) * latents + scaled / (scaled**2 + 0.25).sqrt() * predicted

    with torch.no_grad():
        given = network(x, timestep, class_labels=labels).sample.double()
        nothing = network(x, timestep, class_labels=torch.full_like(labels, 10)).sample.double()
        eps = nothing + guidance * (given - nothing)
        predicted = (x - (1 - product).sqrt() * eps) / product.sqrt()
        x_next = product_next.sqrt() * predicted + (1 - product_next).sqrt() * eps
        later = network(x_next.float(), after.clamp(min=0), class_labels=labels).sample.double()
        target = image(x_next, later, after.clamp(min=0), product_next)
        difference = image(x, given, timestep, product) - target
    c = trainer.config.objective.consistency.huber_c
    expected = difference.square() if loss == "mse" else (difference.square() + c * c).sqrt() - c
    assert objective.loss("student", examples).loss.item() == pytest.approx(expected.mean().item(), rel=1e-3)


def test_only_what_a_student_can_meet_is_trained_and_each_of_its_timesteps_is(start):
    trainer = start(*KIND, GRID, "train.batch_size=64")
    objective = trainer.parts["consistency"].objective
    timesteps = objective._solver.timesteps
    drawn = set(timesteps[torch.cat([objective.draw("student", n)["place"] for n in range(8)])].tolist())
    assert {999, 679, 339} <= drawn  # LCM's own for 3 steps
    assert 0 not in drawn
    assert len(timesteps) == 10


def test_the_last_steps_target_is_the_teachers_image(start, tiny_flow_teacher):
    flow = (f"teacher.path={tiny_flow_teacher}", "policy.kind=renoise")
    trainer = start(*KIND, *flow, "objective.consistency.grid=4", "objective.consistency.loss=mse")
    objective = trainer.parts["consistency"].objective
    examples = objective.draw("student", 0)
    examples["place"][:] = 3
    x, labels, context = examples["x"], examples.condition, objective.context
    timestep = objective._solver.timesteps[3].float().expand(8)
    with torch.no_grad():
        image = x - timestep.view(-1, 1, 1, 1) / 1000 * context.teacher.guided(x, timestep, labels)
    loss = objective.loss("student", examples).loss.item()
    t = 10 * timestep[0].double().item()
    skip, out = 0.25 / (t * t + 0.25), t / (t * t + 0.25) ** 0.5
    ours = skip * x.double() + out * image.double()  # the student is a copy of the teacher
    assert loss == pytest.approx((ours - image).square().mean().item(), abs=1e-9)


def test_the_target_has_no_gradient(start):
    trainer = start(*KIND, GRID, "objective.consistency.decay=0", "objective.consistency.loss=mse")
    objective = trainer.parts["consistency"].objective
    examples = objective.draw("student", 0)
    trainer.engine.backward(objective.loss("student", examples).loss)
    ours = torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()])
    network, context = objective.context.teacher.network, objective.context
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    timestep = objective._solver.timesteps[examples["place"]]
    with torch.no_grad():
        a, b = (getattr(objective._solver, name)[examples["place"]].float().view(-1, 1, 1, 1) for name in ("a", "b"))
        x_next = a * examples["x"] + b * context.teacher.guided(examples["x"], timestep, examples.condition)
        after = torch.cat([objective._solver.timesteps[1:], torch.tensor([0])])[examples["place"]]
        prediction = context.teacher.guided(x_next, after, examples.condition)
        target = consistent_image(context.teacher.schedule, x_next, prediction, after)
    prediction = context.teacher.guided(examples["x"], timestep, examples.condition)
    own = consistent_image(context.teacher.schedule, examples["x"], prediction, timestep)
    (own - target).square().mean().backward()
    held = torch.cat([p.grad.flatten() for p in network.parameters()])
    torch.testing.assert_close(ours, held, rtol=0, atol=float(held.abs().max()) * 1e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_target_follows_the_average_formula_at_each_optimizer_step(start, stage):
    trainer = start(*KIND, GRID, "objective.consistency.decay=0.7", "train.updates=1", f"zero.stage={stage}")
    objective = trainer.parts["consistency"].objective
    target = dict(objective.context.networks["consistency_target"].named_parameters())
    expected = {name: value.double() for name, value in zero.full_parameters(trainer.engine)}
    begun = {name: value.clone() for name, value in expected.items()}
    for _ in range(3):
        trainer.train_iteration()
        for name, value in zero.full_parameters(trainer.engine):
            expected[name] = 0.7 * expected[name] + 0.3 * value.double()
        for name, value in expected.items():
            torch.testing.assert_close(target[name].double(), value, rtol=0, atol=1e-6)
    assert max(float((value - begun[name]).abs().max()) for name, value in expected.items()) > 1e-4


def test_the_average_loses_nothing_to_low_precision(start):
    trainer = start(*KIND, GRID, "objective.consistency.decay=0.999", "precision=bf16", "train.updates=1")
    objective = trainer.parts["consistency"].objective
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    trainer.train_iteration()
    moved = sum(float((value - before[name]).abs().sum()) for name, value in objective.state_dict().items())
    assert moved > 0
    network = objective.context.networks["consistency_target"]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_without_an_average_there_is_no_copy_and_the_student_is_counted_twice(start):
    trainer = start(*KIND, GRID, "objective.consistency.decay=0", "train.updates=1")
    assert not trainer.parts["consistency"].networks
    row = trainer.train_iteration()
    assert row["passes/student_forward"] == 2 * row["passes/student_backward"] == 16
    assert row["passes/teacher"] == 8 * 6 + 8


@pytest.mark.parametrize("schedule", ["diffusion", "flow"])
def test_neighbours_become_consistent(start, tiny_flow_teacher, schedule):
    flow = (f"teacher.path={tiny_flow_teacher}", "policy.kind=renoise") if schedule == "flow" else ()
    how = ("optimizer.lr=2e-3", "train.batch_size=32", "train.updates=1", "iterations=20")
    trainer = start(*KIND, GRID, *flow, *how)
    losses = [trainer.train_iteration()["loss/loss"] for _ in range(20)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_resumed_run_goes_on_exactly(start, tmp_path):
    whole = start(*KIND, GRID)
    whole.train_iteration()
    (tmp_path / "checkpoint").mkdir()
    whole.save(tmp_path / "checkpoint", "teacher")
    whole.train_iteration()
    resumed = start(*KIND, GRID)
    resumed.restore(tmp_path / "checkpoint")
    resumed.train_iteration()
    expected = dict(zero.full_parameters(whole.engine))
    for name, value in zero.full_parameters(resumed.engine):
        assert torch.equal(value, expected[name])


def test_a_band_without_a_timestep_is_refused(start):
    with pytest.raises(EngineError, match=r"holds no timestep of the grid"):
        start(*KIND, GRID, "objective.bands={consistency: [0.12, 0.13]}")


@pytest.mark.parametrize(("lora", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_transformer_trains(start, tiny_pipeline, lora, precision):
    how = (f"lora.rank={lora}", f"precision={precision}", f"teacher.precision={precision}", "train.micro_batch=3")
    trainer = start(*KIND, GRID, f"teacher.path={tiny_pipeline('dit')}", *DIT, *how)
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[1]["loss/loss"] != rows[0]["loss/loss"]
