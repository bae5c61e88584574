"""Progressive distillation: targets and weights against the paper's formulas, the teacher's way, and the stages."""

import pytest
import torch

from engine import zero
from engine.errors import EngineError
from engine.models import process
from engine.models.schedules import DiffusionSchedule, FlowSchedule
from engine.objectives.progressive import prediction_weight, target_prediction, teacher_path
from engine.rl import ddim_policy, flow_sde_policy
from engine.rl.rollout import rollout
from engine.sampling import deterministic_policy

KIND = "objective.kind=progressive"
SMALL = ("train.batch_size=8", "rollout.pool=8")
STAGES = "objective.progressive.stages=[4, 3]"
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2", "train.batch_size=8")
ALPHAS = torch.linspace(1.0, 0.9, 1001, dtype=torch.float64)[1:].cumprod(0)
TIMESTEPS = torch.tensor([800, 600, 400, 200, 0])


def diffusion(prediction_type: str) -> DiffusionSchedule:
    return DiffusionSchedule(ALPHAS, 1.0, prediction_type, timesteps=lambda steps: TIMESTEPS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels() -> list[torch.Tensor]:
    """alpha, sigma at each step and after it, (5, 1, 1, 1)."""
    now, after = ALPHAS[TIMESTEPS], torch.cat([ALPHAS[TIMESTEPS[1:]], torch.ones(1, dtype=torch.float64)])
    return [value.sqrt().view(-1, 1, 1, 1) for value in (now, 1 - now, after, 1 - after)]


# the target


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_the_papers_in_each_prediction_type(prediction_type):
    z, landing = normal(5, 1, 4, 4), normal(5, 1, 4, 4, seed=1)
    policy = ddim_policy(ALPHAS, TIMESTEPS, eta=0.0, prediction_type=prediction_type)
    target = target_prediction(policy, torch.arange(5), z, landing)
    alpha, sigma, alpha_next, sigma_next = levels()
    x = (landing - sigma_next / sigma * z) / (alpha_next - sigma_next / sigma * alpha)
    eps = (landing - alpha_next / alpha * z) / (sigma_next - alpha_next / alpha * sigma)
    torch.testing.assert_close(alpha * x + sigma * eps, z, rtol=0, atol=1e-11)  # the formulas agree with each other
    expected = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x}[prediction_type]
    scale = expected.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(target / scale, expected / scale, rtol=0, atol=1e-12)
    image = process.to_image(diffusion(prediction_type), z, target, TIMESTEPS)
    torch.testing.assert_close(image[-1], landing[-1], rtol=0, atol=1e-12)  # no noise is left after the last step


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_ddim_step_with_the_target_lands_where_the_teacher_did(prediction_type):
    z, landing = normal(5, 1, 4, 4), normal(5, 1, 4, 4, seed=1)
    policy = ddim_policy(ALPHAS, TIMESTEPS, eta=0.0, prediction_type=prediction_type)
    target = target_prediction(policy, torch.arange(5), z, landing)
    schedule = diffusion(prediction_type)
    image, noise = (read(schedule, z, target, TIMESTEPS) for read in (process.to_image, process.to_noise))
    _, _, alpha_next, sigma_next = levels()
    torch.testing.assert_close(alpha_next * image + sigma_next * noise, landing, rtol=0, atol=1e-12)


def test_a_flows_target_is_the_mean_velocity_between_the_states():
    sigmas = torch.tensor([1.0, 0.75, 0.4, 0.0], dtype=torch.float64)
    z, landing = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    target = target_prediction(flow_sde_policy(sigmas, noise_level=0.0), torch.arange(3), z, landing)
    torch.testing.assert_close(target, (z - landing) / -sigmas.diff().view(-1, 1, 1, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["snr_plus_one", "truncated_snr"])
def test_weights_turn_errors_of_predictions_into_weighted_errors_of_images(prediction_type, weighting):
    timestep, z = torch.tensor([10, 200]), normal(2, 1, 4, 4)  # alpha above 0.05
    schedule, first, second = diffusion(prediction_type), normal(2, 1, 4, 4, seed=1), normal(2, 1, 4, 4, seed=2)
    images = [process.to_image(schedule, z, prediction, timestep) for prediction in (first, second)]
    snr = ALPHAS[timestep] / (1 - ALPHAS[timestep])
    assert snr.min() < 1 < snr.max()
    weight = snr + 1 if weighting == "snr_plus_one" else snr.clamp(min=1)
    ours = prediction_weight(schedule, timestep, weighting) * (first - second).square().flatten(1).sum(1)
    expected = weight * (images[0] - images[1]).square().flatten(1).sum(1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    if (prediction_type, weighting) == ("v_prediction", "snr_plus_one"):
        torch.testing.assert_close(prediction_weight(schedule, timestep, weighting), torch.ones(2).double())


def test_the_weight_is_finite_where_noise_says_nothing_of_the_image():
    assert ALPHAS[999].sqrt() < 1e-3
    assert prediction_weight(diffusion("epsilon"), torch.tensor([999]), "snr_plus_one").item() == pytest.approx(400)
    assert prediction_weight(FlowSchedule(None), torch.tensor([1000.0]), "truncated_snr").item() == pytest.approx(1)


# the teacher's way


def grid(steps: int) -> torch.Tensor:
    return (torch.arange(steps) * (1000 // steps)).flip(0)


def test_a_nested_grid_stays_as_it_is():
    path = teacher_path(diffusion("epsilon"), grid(50), grid(5))
    own = ddim_policy(ALPHAS, grid(50), eta=0.0)
    assert path.policy.timesteps.tolist() == grid(50).tolist()
    assert torch.equal(path.policy.b, own.b)
    assert path.bounds == (9, 19, 29, 39, 49, 50)


@pytest.mark.parametrize(("teacher", "student"), [(50, 25), (25, 12), (12, 5), (13, 12), (7, 7)])
def test_the_teacher_passes_each_timestep_of_the_student_in_as_many_steps_as_before(teacher, student):
    path = teacher_path(diffusion("epsilon"), grid(teacher), grid(student))
    timesteps = path.policy.timesteps
    assert len(timesteps) == teacher
    assert timesteps[list(path.bounds[:-1])].tolist() == grid(student).tolist()
    assert path.bounds[-1] == teacher
    moved = (timesteps - grid(teacher)).abs()
    assert int(moved.max()) <= 1000 // teacher // 2 + 1


def test_a_flow_ends_its_way_at_the_image():
    sigmas = [torch.linspace(1, 0, steps + 1).double() for steps in (7, 3)]
    teacher, student = (sigma[:-1] * 1000 for sigma in sigmas)
    path = teacher_path(FlowSchedule(None), teacher, student)
    passed = path.policy.timesteps[list(path.bounds[:-1])]
    torch.testing.assert_close(passed, student, rtol=1e-12, atol=0)
    assert path.policy.b.sum().item() == pytest.approx(-1, abs=1e-12)  # from all noise to none


@pytest.mark.parametrize("schedule", ["diffusion", "flow"])
def test_the_states_are_those_of_the_teachers_own_trajectory(start, tiny_flow_teacher, schedule):
    flow = (f"teacher.path={tiny_flow_teacher}", "policy.kind=flow_sde") if schedule == "flow" else ()
    trainer = start(KIND, *SMALL, *flow, "teacher.guidance=2", "teacher.steps=10", "student.steps=5")
    objective, pool = trainer.parts["progressive"].objective, trainer.pool
    objective.begin(0)
    teacher, indices = objective.context.teacher, torch.arange(8)
    policy, passed = deterministic_policy(teacher, 10), [0, 3, 5, 7, 9, 10]  # 900, 800, ... 0 and 800, 600, ... 0
    if schedule == "flow":  # grids that end at sigma 0.001 are not nested
        policy, passed = objective._path.policy, [0, *objective._path.bounds[1:]]
    states = [pool.initial_noise(indices)]
    with torch.no_grad():
        for step, timestep in enumerate(policy.timesteps):
            told = (timestep.float() if schedule == "flow" else timestep).expand(8)
            prediction = teacher.guided(states[-1], told, pool.condition(indices), guidance=2.0)
            states.append(policy.a[step].float() * states[-1] + policy.b[step].float() * prediction)
    expected = torch.stack([states[place] for place in passed], dim=1)
    torch.testing.assert_close(objective._trajectories, expected, rtol=1e-4, atol=1e-4)


def test_an_example_is_a_state_of_its_condition_and_the_one_after_it(start):
    trainer = start(KIND, *SMALL)
    objective = trainer.parts["progressive"].objective
    objective.begin(0)
    indices = objective._draws.rows(5).indices
    examples = objective.draw("student", 5)
    assert len(examples["step"].unique()) > 1
    for row, (index, step) in enumerate(zip(indices.tolist(), examples["step"].tolist(), strict=True)):
        assert torch.equal(examples["x"][row], objective._trajectories[index, step])
        assert torch.equal(examples["landing"][row], objective._trajectories[index, step + 1])


# training


@pytest.mark.parametrize("states", ["trajectory", "noised"])
def test_a_student_that_takes_its_teachers_steps_has_nothing_to_learn(start, states):
    objective = (
        start(KIND, *SMALL, "student.steps=6", f"objective.progressive.states={states}").parts["progressive"].objective
    )
    objective.begin(0)
    assert objective.loss("student", objective.draw("student", 0)).loss.item() < 1e-6


@pytest.mark.parametrize("states", ["trajectory", "noised"])
def test_a_few_conditions_are_learned(start, states):
    how = (f"objective.progressive.states={states}", "teacher.guidance=2", "optimizer.lr=5e-3", "train.updates=1")
    trainer = start(KIND, *SMALL, *how, "train.batch_size=24", "iterations=20")
    losses = [trainer.train_iteration()["loss/loss"] for _ in range(20)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_an_epsilon_students_error_is_the_mean_square_of_its_noise(start):
    trainer = start(KIND, *SMALL)
    objective = trainer.parts["progressive"].objective
    objective.begin(0)
    examples = objective.draw("student", 0)
    policy = deterministic_policy(trainer.student, 3)
    alphas = objective.context.teacher.schedule.alphas_cumprod
    with torch.no_grad():
        timestep = policy.timesteps[examples["step"]]
        prediction = trainer.student.network.module(examples["x"], timestep, **examples.condition).sample.double()
    after = torch.cat([policy.timesteps[1:], torch.tensor([-1])])[examples["step"]]
    now = alphas[timestep].view(-1, 1, 1, 1)
    then = torch.where(after < 0, 1.0, alphas[after.clamp(min=0)]).view(-1, 1, 1, 1)
    ratio = (then / now).sqrt()
    eps = (examples["landing"] - ratio * examples["x"]) / ((1 - then).sqrt() - ratio * (1 - now).sqrt())
    error = (prediction - eps).square().flatten(1).mean(1)
    now = now.flatten()
    slope = ((1 - now) / now).sqrt().clamp(max=20)
    result = objective.loss("student", examples)
    assert result.loss.item() == pytest.approx(((now / (1 - now) + 1) * slope.square() * error).mean().item(), rel=1e-3)
    assert result.figures["progressive/error"].item() == pytest.approx(error.mean().item(), rel=1e-3)


@pytest.mark.parametrize("band", ["[0, 0.5]", "[0.5, 1]"])
def test_only_steps_in_the_band_are_trained(start, band):
    trainer = start(KIND, *SMALL, f"objective.bands={{progressive: {band}}}", "train.batch_size=32")
    objective = trainer.parts["progressive"].objective
    objective.begin(0)
    timesteps = deterministic_policy(trainer.student, 3).timesteps  # 666, 333, 0
    drawn = set(timesteps[objective.draw("student", 0)["step"]].tolist())
    assert drawn == ({0, 333} if band == "[0, 0.5]" else {666})


def test_a_band_that_misses_every_step_of_a_stage_is_refused(start):
    with pytest.raises(EngineError, match=r"none of the noise levels .* of a student of 3 steps"):
        start(KIND, *SMALL, STAGES, "objective.bands={progressive: [0.7, 0.8]}")  # 4 steps have one at 0.75


# stages


@pytest.mark.parametrize("stage", [0, 3])
def test_the_student_at_the_end_of_a_stage_teaches_the_next_without_guidance(start, stage):
    trainer = start(KIND, *SMALL, STAGES, "teacher.guidance=2", "iterations=4", f"zero.stage={stage}")
    first = trainer.train_iteration()
    assert first["progressive/steps"] == 4
    assert first["passes/teacher"] == 8 * 6 * 2
    assert first["passes/stage_teacher"] == 0
    assert trainer.train_iteration()["passes/teacher"] == 0
    promoted = {name: value.clone() for name, value in zero.full_parameters(trainer.engine)}
    third = trainer.train_iteration()
    assert third["progressive/steps"] == 3
    assert third["passes/stage_teacher"] == 8 * 4
    assert third["passes/teacher"] == 0
    objective = trainer.parts["progressive"].objective
    teacher = dict(objective.context.networks["stage_teacher"].named_parameters())
    trained = dict(zero.full_parameters(trainer.engine))
    assert promoted.keys() == teacher.keys()
    for name, value in promoted.items():
        assert torch.equal(teacher[name], value)
    assert any(not torch.equal(trained[name], value) for name, value in promoted.items())
    with torch.no_grad():
        taught = rollout(
            trainer.student.with_network(objective.context.networks["stage_teacher"]),
            objective._path.policy,
            trainer.pool.initial_noise(torch.arange(8)),
            trainer.pool.condition(torch.arange(8)),
        ).final
    torch.testing.assert_close(objective._trajectories[:, -1], taught, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_goes_on_in_its_stage_with_its_teacher(start, tmp_path):
    overrides = (KIND, *SMALL, STAGES, "iterations=4")
    whole = start(*overrides)
    for iteration in range(4):
        if iteration == 3:
            (tmp_path / "checkpoint").mkdir()
            whole.save(tmp_path / "checkpoint", "teacher")
        whole.train_iteration()
    resumed = start(*overrides)
    resumed.restore(tmp_path / "checkpoint")
    assert resumed.train_iteration()["progressive/steps"] == 3
    expected = dict(zero.full_parameters(whole.engine))
    for name, value in zero.full_parameters(resumed.engine):
        assert torch.equal(value, expected[name])


def test_a_run_that_is_resumed_with_more_iterations_does_not_go_back_a_stage(start):
    objective = start(KIND, *SMALL, STAGES, "iterations=4").parts["progressive"].objective
    objective.load_state_dict({"stage": torch.tensor(1)})
    assert objective.begin(0)["progressive/steps"] == 3


@pytest.mark.parametrize("stages", ["[]", "[4]", "[3, 4, 3]", "[7, 3]", "[3, 3]", "[6, 5, 4, 3]"])
def test_stages_that_do_not_lead_to_the_student_are_refused(start, stages):
    with pytest.raises(EngineError, match=r"must fall from at most teacher.steps=6 to student.steps=3"):
        start(KIND, f"objective.progressive.stages={stages}", "iterations=3")


@pytest.mark.parametrize(("lora", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_transformer_trains_in_stages(start, tiny_pipeline, lora, precision):
    how = (f"lora.rank={lora}", f"precision={precision}", f"teacher.precision={precision}", "train.micro_batch=3")
    trainer = start(KIND, f"teacher.path={tiny_pipeline('dit')}", *DIT, STAGES, *how)
    rows = [trainer.train_iteration() for _ in range(2)]
    assert [row["progressive/steps"] for row in rows] == [4, 3]
    assert all(row["grad_norm"] > 0 for row in rows)
