"""Students that draw by multi-step consistency sampling: as stock diffusers does, evaluated, trained and exported."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

import engine
from engine.conditions import ConditionPool, noise, seed_of
from engine.models.pipelines import load_pipeline
from engine.models.schedules import consistency_timesteps
from engine.roles import load_student, save_student
from engine.sampling import make_policy, sample, student_policy
from engine.sources import Classes

pytestmark = pytest.mark.usefixtures("quick_finish")

STEPS = 3
POOL = ConditionPool("train", 5, 20, Classes(10), (1, 8, 8))
INDICES = torch.tensor([0, 3, 11, 19])
RENOISE = ("student.sampler=renoise", "policy.kind=renoise", "policy.eta=0.7")


@pytest.fixture(params=["diffusion", "flow"])
def teacher(request, tiny_teacher, tiny_flow_teacher) -> Path:
    return tiny_teacher if request.param == "diffusion" else tiny_flow_teacher


@pytest.fixture
def configured(tmp_path, tiny_config, teacher):
    def make(*overrides: str):
        return tiny_config(tmp_path / "run", f"teacher.path={teacher}", *RENOISE, *overrides)

    return make


def step_noise(pool: ConditionPool, indices: torch.Tensor):
    """What our sampler adds at each step, in order."""
    for step in range(STEPS):
        yield noise([seed_of("step", pool.split, pool.seed, int(i), step) for i in indices], pool.latent_shape)


def given_noise(scheduler, pool: ConditionPool, indices: torch.Tensor):
    """diffusers' scheduler takes our noise in place of its own."""
    ours = step_noise(pool, indices)
    module = type(scheduler).__module__
    return mock.patch(f"{module}.randn_tensor", side_effect=lambda *arguments, **more: next(ours))


@torch.no_grad()
def stock_images(directory: Path, pool: ConditionPool, indices: torch.Tensor) -> torch.Tensor:
    """Images of a class UNet by diffusers' own classes, with our noise."""
    import diffusers

    unet = diffusers.UNet2DModel.from_pretrained(directory, subfolder="unet").eval()
    kind = json.loads((directory / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(directory, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    x = pool.initial_noise(indices)
    with given_noise(scheduler, pool, indices):
        for timestep in scheduler.timesteps:
            x = scheduler.step(unet(x, timestep, class_labels=indices % 10).sample, timestep, x).prev_sample
    return x


def test_the_timesteps_are_those_of_stock_lcm():
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert torch.equal(consistency_timesteps(1000, steps), scheduler.timesteps), steps


def test_stock_diffusers_draws_our_images_with_an_export(tmp_path, configured, teacher):
    config, pipeline = configured(), load_pipeline(teacher)
    save_student(config, pipeline, pipeline.denoiser.network.state_dict(), tmp_path / "student")
    student = load_student(config)
    ours, _ = sample(student, student_policy(config, student), POOL, INDICES, guidance=1.0, device=torch.device("cpu"))
    drawn = stock_images(tmp_path / "student", POOL, INDICES)
    torch.testing.assert_close(drawn, ours, rtol=0, atol=1e-4)


def test_an_export_is_a_pipeline_whose_scheduler_stays(tmp_path, tiny_config, tiny_teacher):
    from diffusers import DDPMPipeline, DiffusionPipeline, LCMScheduler

    config, pipeline = tiny_config(tmp_path / "run", *RENOISE), load_pipeline(tiny_teacher)
    save_student(config, pipeline, pipeline.denoiser.network.state_dict(), tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert (type(stock), type(stock.scheduler)) == (DDPMPipeline, LCMScheduler)


@pytest.mark.filterwarnings("ignore:.*/scheduler. ")
def test_stable_diffusion_draws_our_images_with_its_own_loop(tmp_path, tiny_config, tiny_pipelines, tiny_pipeline):
    from diffusers import StableDiffusionPipeline

    directory = tiny_pipeline("sd")
    config = tiny_config(tmp_path / "run", f"teacher.path={directory}", *RENOISE, "reward.terms={pixel: 1}")
    pipeline = load_pipeline(directory)
    save_student(config, pipeline, pipeline.denoiser.network.state_dict(), tmp_path / "student")
    prompts = ["a red cat", "two dogs", "the blue house"]
    source = mock.Mock(spec=Classes, __len__=lambda self: len(prompts))
    source.condition = lambda rows: pipeline.encode([prompts[row] for row in rows.tolist()], None, "cpu")
    pool, rows = ConditionPool("train", 5, 3, source, pipeline.denoiser.latent_shape), torch.arange(3)
    policy = student_policy(config, pipeline.denoiser)
    ours, _ = sample(pipeline.denoiser, policy, pool, rows, guidance=2.0, device=torch.device("cpu"))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    with given_noise(stock.scheduler, pool, rows):
        drawn = tiny_pipelines.draw(stock, pool.initial_noise(rows), steps=STEPS, guidance=2.0, prompts=prompts)
    torch.testing.assert_close(drawn, pipeline.decode(ours), rtol=0, atol=1e-4)


def test_eta_is_the_share_of_the_next_noise_that_is_fresh(teacher):
    denoiser = load_pipeline(teacher).denoiser
    full, part = (make_policy(denoiser, "renoise", STEPS, eta) for eta in (1.0, 0.6))
    torch.testing.assert_close(part.std, 0.6 * full.std)
    with pytest.raises(engine.EngineError, match=r"eta=1.5 must be in \[0, 1\]"):
        make_policy(denoiser, "renoise", STEPS, 1.5)


def test_a_student_has_at_most_the_steps_that_lcm_has(tiny_teacher):
    with pytest.raises(engine.EngineError, match=r"takes 1 to 50 steps .* got 51 of 1000"):
        make_policy(load_pipeline(tiny_teacher).denoiser, "renoise", 51, 1.0)


def test_a_rewarded_student_is_trained_judged_and_exported_with_the_noise(configured, recwarn):
    result = engine.distill(configured("iterations=2", "evaluation.every=1"))
    summary = result.metrics
    assert (summary["student"]["eta"], summary["student_training_eta"]["eta"]) == (1.0, 0.7)
    assert summary["student"]["paired_cosine"] != summary["student_training_eta"]["paired_cosine"]
    assert summary["teacher"]["eta"] == summary["teacher_few_steps"]["eta"] == 0
    assert summary["ratio_first_pass_error"] <= 1e-3
    assert not [warning for warning in recwarn if "/scheduler: " in str(warning.message)]
    policy = make_policy(result.student, "renoise", STEPS, 1.0)
    ours, _ = sample(result.student, policy, POOL, INDICES, guidance=1.0, device=torch.device("cpu"))
    drawn = stock_images(result.output_dir / "student", POOL, INDICES)
    torch.testing.assert_close(drawn, ours, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*/scheduler. ")
def test_an_export_is_the_student_and_the_teacher_of_the_next_run(tmp_path, configured, teacher):
    pipeline = load_pipeline(teacher)
    save_student(configured(), pipeline, pipeline.denoiser.network.state_dict(), tmp_path / "student")
    student = tmp_path / "student"
    result = engine.distill(configured(f"teacher.path={student}", f"student.init={student}", "iterations=1"))
    first = engine.distill(configured("iterations=1", f"output_dir={tmp_path / 'other'}"))
    assert result.metrics["student"] == first.metrics["student"]


def test_the_reward_on_held_out_conditions_is_of_the_students_own_sampler(start):
    rewards = []
    for overrides in ((), RENOISE[:1], RENOISE):
        (reward,) = start(*overrides, "objective.kind=regression").evaluate_held_out().values()
        rewards.append(reward)
    ode, renoise, noisy_training = rewards
    assert ode != renoise == noisy_training
