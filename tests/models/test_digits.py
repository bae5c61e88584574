"""The embedded digits models: what is shipped is what the script trains, and it is good enough to distill."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors import safe_open

from engine.metrics import frechet_distance
from engine.models.digits import TEACHER_DIR, digits, load_evaluation_encoder, load_reward_encoder, training
from engine.models.digits.encoders import accuracy

FOLDER = TEACHER_DIR.parent
WEIGHTS = {
    "teacher": TEACHER_DIR / "unet" / "diffusion_pytorch_model.safetensors",
    "reward_encoder": FOLDER / training.REWARD_FILE,
    "evaluation_encoder": FOLDER / training.EVALUATION_FILE,
}
TRAIN = {
    "teacher": training.train_teacher,
    "reward_encoder": training.train_reward_encoder,
    "evaluation_encoder": training.train_evaluation_encoder,
}
LOAD_ENCODER = {"reward_encoder": load_reward_encoder, "evaluation_encoder": load_evaluation_encoder}


@pytest.fixture(autouse=True)
def _one_thread():
    """The trainings are deterministic on one thread, and no slower: the networks are that small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def stock_teacher():
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(TEACHER_DIR, subfolder="unet").eval()
    return unet, DDIMScheduler.from_pretrained(TEACHER_DIR, subfolder="scheduler")


@cache
def sample(steps, count=1000):
    """(images (count, 1, 8, 8) in [0, 1], labels) of the shipped teacher."""
    labels = torch.arange(count) % 10
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(123))
    return training.sample_teacher(*stock_teacher(), noise, labels, steps), labels


def features_of_digits(split):
    return load_evaluation_encoder()((digits(split)[0] + 1) / 2).features


def distance_to_digits(steps):
    samples = load_evaluation_encoder()(sample(steps)[0]).features
    return frechet_distance(samples, features_of_digits("all"))


def test_digits_are_split_by_class_without_overlap():
    (train, train_labels), (held_out, held_out_labels), (images, labels) = map(digits, ("train", "held_out", "all"))
    assert train.shape == (1347, 1, 8, 8)
    assert held_out.shape == (450, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(torch.cat([train, held_out]), images)
    assert torch.equal(torch.cat([train_labels, held_out_labels]), labels)
    shares = train_labels.bincount() / labels.bincount()
    assert (shares - 1347 / 1797).abs().max() < 0.01


def test_changing_the_digits_leaves_the_next_reader_alone():
    digits("train")[0].zero_()
    assert digits("train")[0].std() > 0.5


def test_unknown_split_names_the_allowed_ones():
    with pytest.raises(ValueError, match="'train', 'held_out' or 'all'"):
        digits("test")


@pytest.mark.parametrize("name", WEIGHTS)
def test_shipped_weights_carry_the_configuration_of_the_script(name):
    with safe_open(WEIGHTS[name], framework="pt") as file:
        assert json.loads(file.metadata()["training"]) == training.Config().as_json()
    assert json.loads((FOLDER / training.TRACE_FILE).read_text())["config"] == training.Config().as_json()


@pytest.mark.parametrize("name", WEIGHTS)
def test_training_again_starts_with_the_recorded_losses(name):
    recorded = json.loads((FOLDER / training.TRACE_FILE).read_text())["first_losses"][name]
    assert len(recorded) == training.TRACED_LOSSES
    model, losses = TRAIN[name](training.Config(), stop_after=training.TRACED_LOSSES)
    # Other processors sum in another order; a changed seed, batch or learning rate is off by far more.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(recorded), rtol=2e-3, atol=0)
    with safe_open(WEIGHTS[name], framework="pt") as file:
        shipped = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shipped == {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_weights_are_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 3_000_000


def test_teacher_loads_with_stock_diffusers_and_keeps_its_schedule():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(TEACHER_DIR)
    assert type(pipeline.unet).__name__ == "UNet2DModel"
    assert dict(pipeline.scheduler.config) == dict(stock_teacher()[1].config)
    expected = training.build_scheduler(training.TeacherConfig())
    assert torch.equal(pipeline.scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert pipeline.scheduler.config.timestep_spacing == expected.config.timestep_spacing
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_null_class_is_the_last_embedding_and_differs_from_every_class():
    unet, _ = stock_teacher()
    assert unet.config.num_class_embeds == training.NULL_CLASS + 1
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(11, -1, -1, -1)
    with torch.no_grad():
        noise = unet(x, torch.tensor(500), class_labels=torch.arange(11)).sample
    assert (noise[:10] - noise[10]).abs().mean(dim=(1, 2, 3)).min() > 0.01


def test_null_class_is_trained_to_denoise_any_digit():
    unet, scheduler = stock_teacher()
    images, labels = digits("held_out")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.full((len(images),), 500)
    noised = scheduler.add_noise(images, noise, timestep)
    errors = {}
    for name, condition in (("own", labels), ("none", labels * 0 + training.NULL_CLASS), ("other", (labels + 1) % 10)):
        with torch.no_grad():
            errors[name] = (unet(noised, timestep, class_labels=condition).sample - noise).square().mean().item()
    assert errors["own"] < errors["none"] < errors["other"]


def test_teacher_draws_the_class_it_is_asked_for():
    assert accuracy(load_evaluation_encoder(), *sample(50)) >= 0.95


def test_teacher_is_near_the_floor_and_five_steps_are_clearly_not():
    floor = frechet_distance(features_of_digits("train"), features_of_digits("held_out"))
    many, few = distance_to_digits(50), distance_to_digits(5)
    assert many < 1.6 * floor
    assert few > many + 0.4


@pytest.mark.parametrize("name", LOAD_ENCODER)
def test_encoder_recognises_held_out_digits(name):
    images, labels = digits("held_out")
    assert accuracy(LOAD_ENCODER[name](), (images + 1) / 2, labels) >= 0.97


@pytest.mark.parametrize(("name", "dimensions"), [("reward_encoder", 128), ("evaluation_encoder", 64)])
def test_encoder_is_frozen_and_lets_gradients_through_to_the_images(name, dimensions):
    encoder = LOAD_ENCODER[name]()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoding = encoder(images)
    assert encoding.features.shape == (3, dimensions)
    assert encoding.logits.shape == (3, 10)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoding.features.square().sum().backward()
    assert (images.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_reward_and_evaluation_encoders_are_different_architectures():
    reward, evaluation = load_reward_encoder(), load_evaluation_encoder()
    kinds = [{type(module) for module in encoder.modules()} for encoder in (reward, evaluation)]
    assert torch.nn.GroupNorm in kinds[0] - kinds[1]
    assert {torch.nn.BatchNorm2d, torch.nn.ReLU} <= kinds[1] - kinds[0]
    shapes = [{tuple(p.shape) for p in encoder.parameters() if p.dim() == 4} for encoder in (reward, evaluation)]
    assert not shapes[0] & shapes[1]


def test_script_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    command = [sys.executable, "-m", "engine.models.digits", "--output-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "new or empty folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_import_is_cheap():
    script = "import sys, engine.models.digits; print([n for n in ('diffusers', 'sklearn') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
