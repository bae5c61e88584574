"""Directories in diffusers format: what is read from them, and that what is written is read back the same."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from engine.models.loading import LoadingError, fingerprint
from engine.models.pipelines import load_pipeline
from engine.models.schedules import DiffusionSchedule, FlowSchedule

STEPS = 5  # a divisor of 1000: elsewhere stock diffusers steps from "trailing" timesteps to others than the next one
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A class-conditional UNet of seeded random weights, 5 classes and the null class, 6x4 images of 2 channels."""
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=(6, 4),
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
            num_class_embeds=6,
        )
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def teacher(tmp_path, original):
    """A copy of it that a test may change."""
    return shutil.copytree(original, tmp_path / "teacher")


def with_scheduler(teacher, scheduler):
    shutil.rmtree(teacher / "scheduler")
    scheduler.save_pretrained(teacher / "scheduler")
    return load_pipeline(teacher).denoiser


def batch(denoiser, size=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *denoiser.latent_shape, generator=generator)
    return x, torch.tensor([999, 500, 1])[:size], {"class_labels": torch.tensor([0, 4, 2])[:size]}


def test_a_denoiser_knows_its_shape_and_its_classes(original):
    denoiser = load_pipeline(original).denoiser
    assert denoiser.latent_shape == (2, 6, 4)
    assert denoiser.classes == 5
    assert not denoiser.network.training
    labels = denoiser.unconditional({"class_labels": torch.tensor([0, 3])})["class_labels"]
    assert labels.tolist() == [5, 5]


def test_a_square_size_is_one_number(teacher):
    path = teacher / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 8}))
    assert load_pipeline(teacher).denoiser.latent_shape == (2, 8, 8)


def test_a_path_may_be_a_string(original):
    assert fingerprint(load_pipeline(str(original)).denoiser) == fingerprint(load_pipeline(original).denoiser)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_asked_dtype(original, dtype):
    assert {value.dtype for value in load_pipeline(original, dtype=dtype).denoiser.network.parameters()} == {dtype}


def test_what_is_saved_is_loaded_the_same(tmp_path, original):
    first = load_pipeline(original).denoiser
    load_pipeline(original).save_student(tmp_path / "new" / "copy", first.network)
    second = load_pipeline(tmp_path / "new" / "copy").denoiser
    weights = second.network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in first.network.state_dict().items())
    assert fingerprint(first) == fingerprint(second)
    assert torch.equal(first.schedule.alphas_cumprod, second.schedule.alphas_cumprod)
    assert second.latent_shape == first.latent_shape
    assert second.classes == first.classes
    x, timestep, condition = batch(first)
    with torch.no_grad():
        assert torch.equal(
            first.predict(x, timestep, condition)[0],
            second.predict(x, timestep, condition)[0],
        )


def test_saving_keeps_the_schedule_of_the_directory_that_is_named(tmp_path, teacher):
    flow = with_scheduler(teacher, FlowMatchEulerDiscreteScheduler(shift=3.0))
    load_pipeline(teacher).save_student(tmp_path / "copy", flow.network)
    saved = load_pipeline(tmp_path / "copy").denoiser
    assert torch.equal(saved.schedule.sigmas(5), flow.schedule.sigmas(5))
    # diffusers would open it as a DDIMPipeline, and sample a velocity as if it were noise.
    assert not (tmp_path / "copy" / "model_index.json").exists()


def test_saving_over_something_is_refused(tmp_path, original):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine.txt").write_text("mine")
    with pytest.raises(LoadingError, match="copy is not empty"):
        load_pipeline(original).save_student(tmp_path / "copy", load_pipeline(original).denoiser.network)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine.txt"]


def test_a_fingerprint_changes_with_any_weight(original):
    denoiser = load_pipeline(original).denoiser
    seen = {fingerprint(denoiser)}
    assert fingerprint(load_pipeline(original).denoiser) in seen
    parameters = list(denoiser.network.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        seen.add(fingerprint(denoiser))
    assert len(seen) == len(parameters) + 1


def test_a_fingerprint_changes_with_the_configuration_and_the_dtype(teacher):
    before = fingerprint(load_pipeline(teacher).denoiser)
    path = teacher / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 1e-3}))
    after = fingerprint(load_pipeline(teacher).denoiser)
    assert len({before, after, fingerprint(load_pipeline(teacher, dtype=torch.bfloat16).denoiser)}) == 3


def test_a_fingerprint_tells_apart_weights_that_changed_places(original):
    denoiser = load_pipeline(original).denoiser
    before = fingerprint(denoiser)
    weights = denoiser.network.state_dict()
    same = [name for name, value in weights.items() if value.shape == weights["mid_block.resnets.0.conv1.weight"].shape]
    assert len(same) > 1
    with torch.no_grad():
        first, second = weights[same[0]].clone(), weights[same[1]].clone()
        weights[same[0]].copy_(second)
        weights[same[1]].copy_(first)
    assert fingerprint(denoiser) != before


@pytest.mark.parametrize("guidance", [0.0, 1.5, 4.0])
def test_the_guidance_pair_is_two_separate_predictions(original, guidance):
    denoiser = load_pipeline(original).denoiser
    x, timestep, condition = batch(denoiser)
    with torch.no_grad():
        pred, uncond = denoiser.predict(x, timestep, condition, guidance=guidance)
        alone = denoiser.predict(x, timestep, condition)[0]
        nothing = denoiser.network(x, timestep, class_labels=torch.full((3,), 5)).sample
    torch.testing.assert_close(pred, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(uncond, nothing, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pred, uncond, atol=1e-3)
    assert denoiser.passes(guidance) == 2


def test_guidance_of_1_is_one_pass_without_the_null_class(original):
    denoiser = load_pipeline(original).denoiser
    calls = []
    denoiser.network.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
    x, timestep, condition = batch(denoiser)
    with torch.no_grad():
        assert denoiser.predict(x, timestep, condition, guidance=1.0)[1] is None
        denoiser.predict(x, timestep, condition, guidance=2.0)
    assert calls == [3, 6]
    assert denoiser.passes(1.0) == 1


def test_latents_are_seen_in_the_dtype_of_the_network(original):
    denoiser = load_pipeline(original, dtype=torch.bfloat16).denoiser
    x, timestep, condition = batch(denoiser)
    with torch.no_grad():
        assert denoiser.predict(x, timestep, condition)[0].dtype == torch.bfloat16


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_read_from_the_scheduler(teacher, prediction_type):
    denoiser = with_scheduler(teacher, DDIMScheduler(prediction_type=prediction_type, clip_sample=False))
    assert isinstance(denoiser.schedule, DiffusionSchedule)
    assert denoiser.schedule.prediction_type == prediction_type


def test_a_schedule_that_cuts_is_warned_of_and_exported_as_it_was_sampled(tmp_path, teacher):
    with pytest.warns(UserWarning, match=r"clip_sample=true; .* differ from those of the stock scheduler"):
        denoiser = with_scheduler(teacher, DDIMScheduler(clip_sample=True))
    with pytest.warns(UserWarning, match="clip_sample"):
        load_pipeline(teacher).save_student(tmp_path / "copy", denoiser.network)
    assert not DDIMScheduler.from_pretrained(tmp_path / "copy", subfolder="scheduler").config.clip_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "settings", [{}, {"set_alpha_to_one": False, "steps_offset": 1}, {"timestep_spacing": "trailing"}]
)
def test_a_deterministic_rollout_is_that_of_stock_diffusers(teacher, prediction_type, settings):
    from engine.rl import ddim_policy
    from engine.rl.rollout import rollout

    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **settings)
    denoiser = with_scheduler(teacher, scheduler)
    schedule = denoiser.schedule
    policy = ddim_policy(
        schedule.alphas_cumprod,
        schedule.timesteps(STEPS),
        eta=0.0,
        prediction_type=schedule.prediction_type,
        final_alpha_cumprod=schedule.final_alpha_cumprod,
    )
    noise, _, condition = batch(denoiser)
    scheduler.set_timesteps(STEPS)
    x = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(denoiser.network(x, timestep, **condition).sample, timestep, x, eta=0.0).prev_sample
    torch.testing.assert_close(rollout(denoiser, policy, noise, condition).final, x, rtol=1e-4, atol=1e-4)


def test_a_flow_teacher_has_the_sigmas_of_its_scheduler(teacher):
    denoiser = with_scheduler(teacher, FlowMatchEulerDiscreteScheduler(shift=2.0))
    assert isinstance(denoiser.schedule, FlowSchedule)
    stock = FlowMatchEulerDiscreteScheduler(shift=2.0)
    stock.set_timesteps(5)
    sigmas = denoiser.schedule.sigmas(5)
    assert sigmas.dtype == torch.float64
    assert torch.equal(sigmas, stock.sigmas.double())
    assert sigmas[-1] == 0


def test_asking_for_other_steps_does_not_change_those_given_before(teacher):
    schedule = load_pipeline(teacher).denoiser.schedule
    first = schedule.timesteps(5)
    before = first.clone()
    schedule.timesteps(9)
    assert torch.equal(first, before)
    assert torch.equal(schedule.timesteps(5), before)


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()])
def test_steps_that_a_schedule_does_not_have_are_refused(teacher, scheduler, steps):
    schedule = with_scheduler(teacher, scheduler).schedule
    ask = schedule.timesteps if isinstance(schedule, DiffusionSchedule) else schedule.sigmas
    with pytest.raises(LoadingError, match=f"{steps} steps of a schedule of 1000; give between 1 and 1000"):
        ask(steps)


# ---------------------------------------------------------------------- what cannot be loaded


def remove(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def configure(**change):
    def damage(folder):
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("unet"), r"has no model_index.json; give a whole directory in diffusers format"),
        (remove("scheduler"), r"has no scheduler/scheduler_config.json"),
        (remove(WEIGHTS), r"cannot be loaded"),
        (cut, r"cannot be loaded"),
        (write(WEIGHTS, "hello"), r"cannot be loaded"),
        (write("unet/config.json", "{"), r"unet/config.json is corrupt"),
        (write("unet/config.json", "[]"), r"unet/config.json is corrupt: it holds a list"),
        (write("scheduler/scheduler_config.json", "{"), r"scheduler_config.json is corrupt"),
        (
            configure(_class_name="UNet2DConditionModel"),
            r"is a UNet2DConditionModel; a class-conditional UNet needs a UNet2DModel",
        ),
        (configure(num_class_embeds=None), r"num_class_embeds=None; at least one class and the null class"),
        (configure(block_out_channels=[8, 24]), r"cannot be loaded"),
    ],
)
def test_a_damaged_directory_is_refused_by_what_is_wrong(teacher, damage, message):
    damage(teacher)
    with pytest.raises(LoadingError, match=message) as error:
        load_pipeline(teacher)
    assert str(teacher) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LoadingError, match="nowhere is not a directory; give one in diffusers format"):
        load_pipeline(tmp_path / "nowhere")
