"""Pipelines from directories: what is read and written, and what is said of a directory that cannot be used."""

import gc
import json
import os
import shutil
import warnings
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from engine.models.digits import TEACHER_DIR
from engine.models.loading import LoadingError, fingerprint
from engine.models.lora import ADAPTER, LoraError, add_lora, lora_state, merged
from engine.models.pipelines import load_pipeline

SIZE = {"resolution": (16, 16)}

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


@pytest.fixture
def copy_of(tiny_pipeline, tmp_path):
    """Maps a family to a copy of its directory that a test may change."""
    return lambda family: shutil.copytree(tiny_pipeline(family), tmp_path / family)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------- what is read


def test_the_digits_are_a_pipeline_of_pixels_and_classes():
    digits = load_pipeline(TEACHER_DIR)
    assert digits.denoiser.classes == 10
    assert digits.denoiser.latent_shape == (1, 8, 8)
    latents = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0]).view(5, 1, 1, 1)
    assert digits.decode(latents).flatten().tolist() == [0, 0, 0.5, 0.75, 1]
    with pytest.raises(LoadingError, match="conditioned on classes and encodes no prompts"):
        digits.encode(["a"], None, "cpu")
    digits.release_encoders()


def test_the_classes_of_dit_have_their_names(tiny_pipeline):
    dit = load_pipeline(tiny_pipeline("dit"))
    assert dit.denoiser.classes == len(dit.class_names) == 1000
    assert dit.class_names[999] == "class 999, number 999"


@pytest.mark.parametrize(
    ("family", "shape"), [("sd", (4, 8, 8)), ("pixart-sigma", (4, 8, 8)), ("sd3", (16, 8, 8)), ("flux", (16, 128, 128))]
)
def test_the_size_is_what_the_stock_pipeline_takes(tiny_pipeline, family, shape):
    assert load_pipeline(tiny_pipeline(family)).denoiser.latent_shape == shape
    stock = DiffusionPipeline.from_pretrained(tiny_pipeline(family))
    assert getattr(stock, "default_sample_size", 8) == shape[1]


@pytest.mark.parametrize(("family", "kinds"), [("sd", 1), ("sd2", 0), ("sdxl", 1), ("pixart-alpha", 1), ("sd3", 0)])
def test_another_scheduler_than_the_sampler_s_is_warned_of_once(tiny_pipeline, family, kinds):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_pipeline(tiny_pipeline(family))
    said = [str(warning.message) for warning in caught if "scheduler" in str(warning.message)]
    assert len(said) == kinds
    assert all(
        str(tiny_pipeline(family)) in text and "differ from those of the stock scheduler" in text for text in said
    )


def test_linspace_becomes_trailing_whose_steps_ddim_takes(tiny_pipeline):
    with pytest.warns(UserWarning, match="DPMSolverMultistepScheduler, timestep_spacing=linspace, for which trailing"):
        pixart = load_pipeline(tiny_pipeline("pixart-alpha"))
    assert pixart.denoiser.schedule.timesteps(4).tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha", "sd3", "flux"])
def test_a_network_without_weights_takes_no_memory_and_prompts_are_encoded_the_same(tiny_pipeline, family):
    whole, empty = (load_pipeline(tiny_pipeline(family), network=network, **SIZE) for network in (True, False))
    assert {value.device.type for value in empty.denoiser.network.parameters()} == {"meta"}
    shapes = [{n: v.shape for n, v in p.denoiser.network.named_parameters()} for p in (whole, empty)]
    assert shapes[0] == shapes[1]
    assert empty.denoiser.latent_shape == whole.denoiser.latent_shape
    encoded = [pipeline.encode(["a cat"], None, "cpu") for pipeline in (whole, empty)]
    assert all(torch.equal(value, encoded[1][name]) for name, value in encoded[0].items())


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_images_do_not_depend_on_the_batch_that_decodes_them(tiny_pipeline, family):
    pipeline = load_pipeline(tiny_pipeline(family), **SIZE)
    latents = 3 * torch.randn(5, *pipeline.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    images = pipeline.decode(latents)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(pipeline.decode(latents, batch_size=2), images, rtol=0, atol=1e-5)
    pipeline.vae.bfloat16()
    rounded = pipeline.decode(latents)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - images).abs().max() < 0.1


def test_gradients_reach_latents_but_not_the_autoencoder(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline("sd"))
    latents = torch.zeros(1, 4, 8, 8, requires_grad=True)
    pipeline.decode(latents).sum().backward()
    assert latents.grad.abs().max() > 0
    assert not any(value.requires_grad for value in pipeline.vae.parameters())


# ---------------------------------------------------------------------- prompts


def test_a_row_of_a_condition_depends_on_its_own_prompts_alone(tiny_pipeline):
    for family in ("sd", "sdxl", "pixart-alpha", "sd3", "flux"):
        pipeline = load_pipeline(tiny_pipeline(family), **SIZE)
        both = pipeline.encode(["a red cat", "dog"], ["", "the blue tree on the house"], "cpu")
        for row, (prompt, negative) in enumerate([("a red cat", ""), ("dog", "the blue tree on the house")]):
            alone = pipeline.encode([prompt], [negative], "cpu")
            assert alone.keys() == both.keys()
            for name, value in both.items():
                torch.testing.assert_close(value[row], alone[name][0], rtol=0, atol=1e-5)


def test_released_encoders_are_gone_and_are_loaded_again_when_needed(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline("sdxl"))
    before = pipeline.encode(["a cat"], None, "cpu")
    encoder = weakref.ref(pipeline.text._pipeline.text_encoder_2)
    assert encoder() is not None
    pipeline.release_encoders()
    gc.collect()
    assert encoder() is None
    after = pipeline.encode(["a cat"], None, "cpu")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("family", "most"), [("sd", 77), ("pixart-alpha", 120), ("sd3", 256)])
def test_prompts_that_are_cut_are_warned_of_once_and_counted(tiny_pipeline, family, most):
    pipeline = load_pipeline(tiny_pipeline(family), **SIZE)
    long = "a cat on the house " * 60
    with pytest.warns(UserWarning, match=rf'a prompt of \d+ tokens is cut to the {most} .* "a cat on the'):
        pipeline.encode([long, "a cat"], None, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.encode(["dog", long + "red", long], None, "cpu")
    with pytest.warns(UserWarning, match="3 prompts were longer than the text encoders read"):
        pipeline.release_encoders()


def test_prompts_that_fit_exactly_are_not_warned_of(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline("sd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.encode(["cat " * 75], None, "cpu")  # and the two tokens around them
        pipeline.release_encoders()


def test_the_fingerprint_of_the_encoders_is_that_of_files_dtype_and_size(copy_of):
    directory = copy_of("sdxl")
    seen = [load_pipeline(directory).text_fingerprint()]
    path = directory / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    assert load_pipeline(directory).text_fingerprint() == seen[0]
    seen.append(load_pipeline(directory, dtype=torch.bfloat16).text_fingerprint())
    seen.append(load_pipeline(directory, resolution=(32, 16)).text_fingerprint())
    path = directory / "text_encoder_2" / "model.safetensors"
    save_file({name: value * 1.001 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    seen.append(load_pipeline(directory).text_fingerprint())
    (directory / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\n")
    seen.append(load_pipeline(directory).text_fingerprint())
    edit(directory / "model_index.json", force_zeros_for_empty_prompt=False)
    seen.append(load_pipeline(directory).text_fingerprint())
    assert len(set(seen)) == len(seen)


# ---------------------------------------------------------------------- quantised networks


@pytest.mark.parametrize("family", ["dit", "sd", "flux"])
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("nf4", 0.25)])
def test_a_quantised_network_predicts_nearly_the_same_in_a_part_of_the_memory(tiny_pipeline, family, kind, error):
    exact = load_pipeline(tiny_pipeline(family), **SIZE)
    small = load_pipeline(tiny_pipeline(family), quantization=kind, **SIZE)
    condition = {"class_labels": torch.tensor([3, 500])}
    if exact.text is not None:
        condition = exact.encode(["a red cat", "dog"], None, "cpu")
    x, timestep = torch.randn(2, *exact.denoiser.latent_shape), torch.tensor([500, 250])
    with torch.no_grad():
        want, got = (p.denoiser.predict(x, timestep, condition, guidance=2.0)[0] for p in (exact, small))
    assert got.dtype == torch.float32
    assert 0 < (got - want).std() < error * want.std()
    linear = [m for m in small.denoiser.network.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) > 10
    assert {m.weight.element_size() for m in linear} == {1}
    stored = sum(m.weight.numel() for m in linear) / sum(m.in_features * m.out_features for m in linear)
    assert stored == {"int8": 1, "nf4": 0.5}[kind]
    assert not any(value.requires_grad for value in small.denoiser.network.parameters())
    assert fingerprint(small.denoiser) != fingerprint(exact.denoiser)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_learn_beside_quantised_weights_and_are_not_merged_into_them(tiny_pipeline, kind):
    denoiser = load_pipeline(tiny_pipeline("dit"), quantization=kind).denoiser.with_adapter(ADAPTER)
    add_lora(denoiser.network, rank=2)
    pred, _ = denoiser.predict(torch.randn(2, 4, 8, 8), torch.tensor([9, 7]), {"class_labels": torch.tensor([1, 2])})
    pred.square().sum().backward()
    learning = [value for value in denoiser.network.parameters() if value.requires_grad]
    assert learning
    assert all(value.grad.isfinite().all() for value in learning)
    assert any(value.grad.abs().max() > 0 for value in learning)
    with pytest.raises(LoraError, match="quantised"):
        merged(denoiser.network)


# ---------------------------------------------------------------------- what is written


def test_a_student_shares_the_untouched_files_with_its_teacher(tiny_pipeline, tmp_path):
    teacher = load_pipeline(tiny_pipeline("sdxl"))
    teacher.save_student(tmp_path / "student", teacher.denoiser.network)
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        for path in (teacher.directory / part).iterdir():
            assert os.path.samefile(path, tmp_path / "student" / part / path.name)
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index == {**teacher.index, "scheduler": ["diffusers", "DDIMScheduler"]}
    assert not os.path.samefile(
        teacher.directory / "unet" / "config.json", tmp_path / "student" / "unet" / "config.json"
    )


def test_a_student_is_whole_where_there_are_no_links_and_files_are_links_themselves(copy_of, tmp_path, monkeypatch):
    directory = copy_of("sd")
    weights = directory / "vae" / "diffusion_pytorch_model.safetensors"  # as in a cache of downloads
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    pipeline = load_pipeline(directory)
    pipeline.save_student(tmp_path / "linked", pipeline.denoiser.network)

    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    pipeline.save_student(tmp_path / "copied", pipeline.denoiser.network)
    for name in ("linked", "copied"):
        path = tmp_path / name / "vae" / weights.name
        assert not path.is_symlink()
        assert os.path.samefile(path, tmp_path / "blob") == (name == "linked")
        DiffusionPipeline.from_pretrained(tmp_path / name)


def test_a_student_of_another_architecture_is_loaded_by_stock(tiny_pipeline, tmp_path):
    pipeline = load_pipeline(tiny_pipeline("sd3"))
    network = pipeline.denoiser.network
    smaller = type(network).from_config({**network.config, "num_layers": 1})
    pipeline.save_student(tmp_path / "student", smaller)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert len(stock.transformer.transformer_blocks) == 1
    assert stock.scheduler.config.shift == 3.0


def test_nothing_is_written_over_something(tiny_pipeline, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    pipeline = load_pipeline(tiny_pipeline("dit"))
    network = pipeline.denoiser.network
    add_lora(network, rank=2)
    with pytest.raises(LoadingError, match="is not empty"):
        pipeline.save_student(tmp_path, network)
    with pytest.raises(LoadingError, match="is not empty"):
        pipeline.save_lora(tmp_path, lora_state(network), network.peft_config[ADAPTER])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("family", ["sd", "dit"])
def test_an_adapter_that_is_missing_or_cut_is_refused(tiny_pipeline, tmp_path, family):
    pipeline = load_pipeline(tiny_pipeline(family))
    network = pipeline.denoiser.network
    with pytest.raises(LoadingError, match=r"holds no LoRA adapter; it needs pytorch_lora_weights.safetensors or"):
        pipeline.read_lora(tmp_path)
    add_lora(network, rank=2)
    pipeline.save_lora(tmp_path / "lora", lora_state(network), network.peft_config[ADAPTER])
    cut(next((tmp_path / "lora").glob("*.safetensors")))
    with pytest.raises(LoadingError, match=r"safetensors cannot be loaded"):
        pipeline.read_lora(tmp_path / "lora")


# ---------------------------------------------------------------------- what cannot be used


def refused(directory, message, **arguments):
    with pytest.raises(LoadingError, match=message) as error:
        load_pipeline(directory, **arguments).encode(["a cat"], None, "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(path):
    save_file({name: value for name, value in load_file(path).items() if name != "conv_in.bias"}, path)


def forget(tokenizer):
    (tokenizer / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")


def test_a_path_that_is_no_directory_is_refused(tmp_path, tiny_pipeline):
    refused(tmp_path / "nowhere", r"nowhere is not a directory; give one in diffusers format, with a model_index.json")
    refused(tiny_pipeline("sd") / "model_index.json", r"is not a directory")
    refused(tmp_path, r"has no model_index.json")


def test_an_unsupported_pipeline_names_the_supported_ones(copy_of):
    directory = copy_of("sd")
    edit(directory / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    text = refused(directory, "is a StableDiffusionInpaintPipeline; supported are")
    assert all(name in text for name in ("StableDiffusionXLPipeline", "FluxPipeline", "DiTPipeline"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model_index.json").write_text("{"), r"model_index.json is corrupt"),
        (lambda d: (d / "model_index.json").unlink(), r"is a UNet2DConditionModel"),
        (lambda d: shutil.rmtree(d / "unet"), r"has no unet/config.json"),
        (lambda d: shutil.rmtree(d / "vae"), r"has no vae/, which its model_index.json names"),
        (lambda d: shutil.rmtree(d / "text_encoder_2"), r"has no text_encoder_2/, which"),
        (lambda d: shutil.rmtree(d / "tokenizer"), r"has no tokenizer/, which"),
        (lambda d: cut(d / "unet/diffusion_pytorch_model.safetensors"), r"sdxl/unet cannot be loaded as a UNet2DCond"),
        (lambda d: (d / "unet/diffusion_pytorch_model.safetensors").unlink(), r"sdxl/unet cannot be loaded"),
        (lambda d: cut(d / "vae/diffusion_pytorch_model.safetensors"), r"sdxl/vae cannot be loaded as a AutoencoderKL"),
        (lambda d: cut(d / "text_encoder/model.safetensors"), r"text_encoder, .* cannot be loaded"),
        (lambda d: edit(d / "unet/config.json", _class_name="FluxTransformer2DModel"), r"needs a UNet2DConditionModel"),
        (lambda d: drop(d / "unet/diffusion_pytorch_model.safetensors"), r"unet lacks 1 weights .*, such as conv_in"),
        (lambda d: edit(d / "vae/config.json", _class_name="VQModel"), r"vae is a VQModel; supported are Auto"),
        (lambda d: edit(d / "scheduler/scheduler_config.json", _class_name="Mine"), r"is of a Mine, which is not a"),
        (lambda d: edit(d / "scheduler/scheduler_config.json", beta_schedule="odd"), r"scheduler_config.json cannot"),
        (lambda d: (d / "tokenizer/vocab.json").unlink(), r"tokenizer holds no CLIP tokenizer; it needs tok"),
        (lambda d: (d / "tokenizer/vocab.json").write_text("{"), r"tokenizer, .* cannot be loaded"),
        (
            lambda d: (forget(d / "tokenizer")),
            r"tokenizer knows 2 tokens, but the text encoder beside it 199; they are not of one another",
        ),
    ],
)  # fmt: skip
def test_a_damaged_directory_is_refused_by_what_is_wrong(copy_of, damage, message):
    directory = copy_of("sdxl")
    damage(directory)
    assert str(directory) in refused(directory, message)


def test_a_tokenizer_of_another_encoder_is_refused(copy_of):
    directory = copy_of("flux")
    for path in (directory / "tokenizer_2").iterdir():
        shutil.copy(path, directory / "tokenizer" / path.name)
    refused(directory, r"tokenizer is a T5Tokenizer.*, but the text encoder beside it needs a CLIP tokenizer", **SIZE)


def test_an_autoencoder_of_another_pipeline_is_refused(copy_of, tiny_pipeline):
    directory = copy_of("sd3")
    shutil.rmtree(directory / "vae")
    shutil.copytree(tiny_pipeline("sd") / "vae", directory / "vae")
    refused(directory, r"vae decodes 4 channels, and transformer gives 16; they are not of one pipeline")


@pytest.mark.parametrize(
    ("family", "resolution", "message"),
    [
        ("sd", (15, 16), r"resolution 15x16: both sides must be multiples of 2 for "),
        ("sd", (0, 16), r"multiples of 2"),
        ("sd3", (18, 16), r"multiples of 4"),
        ("flux", (16, 18), r"multiples of 4"),
        ("sd3", (36, 16), r"resolution 36x16: the longest side of .* is 32"),
        ("dit", (32, 32), r"resolution 32x32: a DiT draws only its own, 16x16"),
    ],
)
def test_a_size_that_the_network_cannot_draw_is_refused(tiny_pipeline, family, resolution, message):
    refused(tiny_pipeline(family), message, resolution=resolution)


def test_a_network_of_no_known_size_asks_for_one(copy_of):
    directory = copy_of("sd")
    edit(directory / "unet" / "config.json", sample_size=None)
    refused(directory, "does not say the size of its images; give a resolution")
    assert load_pipeline(directory, **SIZE).denoiser.latent_shape == (4, 8, 8)


def test_an_unknown_quantisation_names_the_known_ones(tiny_pipeline):
    refused(tiny_pipeline("dit"), "quantization='int3' is not one of int8, nf4", quantization="int3")


def test_the_scheduler_that_is_exported_is_the_one_that_is_sampled(tiny_pipeline, tmp_path):
    pipeline = load_pipeline(tiny_pipeline("pixart-sigma"))
    pipeline.save_student(tmp_path / "student", pipeline.denoiser.network)
    stock = DDIMScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    assert not stock.config.clip_sample
    for steps in (1, 3, 8):
        stock.set_timesteps(steps)
        assert torch.equal(stock.timesteps, pipeline.denoiser.schedule.timesteps(steps))
