"""Every family against stock diffusers: the same images, a ratio of 1, and students and adapters that stock loads."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from engine.models.lora import ADAPTER, add_lora, lora_state
from engine.models.pipelines import load_pipeline
from engine.rl.rollout import first_pass_error, rollout
from engine.sampling import deterministic_policy, make_policy

FAMILIES = (
    "sd", "sd2", "sdxl", "dit", "pixart-alpha", "pixart-sigma", "sd3", "sd35", "flux", "flux-schnell",
)  # fmt: skip
STEPS = 4
PROMPTS = ["a red cat on the house", "two dogs, blue"]
NEGATIVE = ["green tree", "a photo of the dog"]
LABELS = [7, 999]
GUIDANCE = {"flux-schnell": 1.0}  # elsewhere 3.0

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


def load(directory, **arguments):
    pipeline = load_pipeline(directory, **({"resolution": (16, 16)} | arguments))
    pipeline.denoiser.network.requires_grad_(False)
    return pipeline


def condition_of(pipeline, prompts=PROMPTS, negative=NEGATIVE):
    if pipeline.denoiser.classes is not None:
        return {"class_labels": torch.tensor(LABELS)}
    return pipeline.encode(prompts, negative, "cpu")


def noise_of(pipeline, seed=0):
    return torch.randn(2, *pipeline.denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))


def our_images(pipeline, guidance, *, denoiser=None, **arguments):
    denoiser = denoiser or pipeline.denoiser
    policy = deterministic_policy(denoiser, STEPS)
    condition = condition_of(pipeline, **arguments)
    with torch.no_grad():
        return pipeline.decode(rollout(denoiser, policy, noise_of(pipeline), condition, guidance=guidance).final)


def stock(directory, *, like_ours=True, **components):
    """The stock pipeline of a directory, whose diffusion scheduler is exchanged for DDIM, as its users do it."""
    pipeline = DiffusionPipeline.from_pretrained(directory, **components)
    config = pipeline.scheduler.config
    if like_ours and not type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        spacing = {"timestep_spacing": "trailing"} if config.timestep_spacing == "linspace" else {}
        pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False, **spacing)
    return pipeline


def assert_same(ours, theirs, tolerance=1e-4):
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture
def draw(tiny_pipelines):
    def call(pipeline, ours, guidance, *, prompts=PROMPTS, negative=NEGATIVE, **arguments):
        classes = ours.denoiser.classes is not None
        asked = {"class_labels": LABELS} if classes else {"prompts": prompts, "negative": negative}
        return tiny_pipelines.draw(pipeline, noise_of(ours), steps=STEPS, guidance=guidance, **asked, **arguments)

    return call


@pytest.fixture
def changed(tiny_pipeline, tmp_path):
    """Maps a family and changes of its configurations, {file: {key: value}}, to a changed copy of its directory."""

    def change(family, **files):
        directory = shutil.copytree(tiny_pipeline(family), tmp_path / "changed", dirs_exist_ok=True)
        for name, entries in files.items():
            path = next(
                directory.glob(f"{name}/*config.json") if name != "index" else directory.glob("model_index.json")
            )
            path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return directory

    return change


def test_these_are_the_families_that_are_built(tiny_pipelines):
    assert tuple(tiny_pipelines.FAMILIES) == FAMILIES


# ---------------------------------------------------------------------- the same images


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_deterministic_images_are_those_of_the_stock_pipeline(tiny_pipeline, draw, family, guided):
    ours = load(tiny_pipeline(family))
    guidance = GUIDANCE.get(family, 3.0) if guided else 1.0
    images = our_images(ours, guidance)
    assert_same(images, draw(stock(tiny_pipeline(family)), ours, guidance))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_negative_prompts_classes_and_guidance_show_in_the_images(tiny_pipeline, family):
    """So that the comparisons mean something."""
    ours = load(tiny_pipeline(family))
    guidance = GUIDANCE.get(family, 3.0)
    images = our_images(ours, guidance)
    if ours.denoiser.classes is None:
        others = [our_images(ours, guidance, prompts=PROMPTS[::-1])]
        if ours.denoiser.guidance_kind == "classifier_free":
            others.append(our_images(ours, guidance, negative=NEGATIVE[::-1]))
    else:
        labels = {"class_labels": torch.tensor(LABELS[::-1])}
        policy = deterministic_policy(ours.denoiser, STEPS)
        others = [ours.decode(rollout(ours.denoiser, policy, noise_of(ours), labels, guidance=guidance).final)]
    if guidance != 1:
        others.append(our_images(ours, 1.0))
    for other in others:
        assert (images - other).abs().amax(dim=(1, 2, 3)).min() > 5e-3


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-sigma", "sd3", "flux"])
def test_images_need_not_be_square(tiny_pipeline, draw, family):
    resolution = (24, 16)
    ours = load(tiny_pipeline(family), resolution=resolution)
    assert ours.denoiser.latent_shape[1:] == ((12, 8))
    ours_sized = our_images(ours, 3.0)
    assert_same(ours_sized, draw(stock(tiny_pipeline(family)), ours, 3.0, resolution=resolution))


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha", "sd3"])
def test_an_empty_negative_prompt_is_what_the_stock_pipeline_takes_when_none_is_given(tiny_pipeline, draw, family):
    ours = load(tiny_pipeline(family))
    images = our_images(ours, 3.0, negative=None)
    assert_same(images, draw(stock(tiny_pipeline(family)), ours, 3.0, negative=None))
    assert torch.equal(images, our_images(ours, 3.0, negative=["", ""]))


def test_sdxl_without_zeroed_empty_prompts_encodes_them(changed, draw):
    directory = changed("sdxl", index={"force_zeros_for_empty_prompt": False})
    ours = load(directory)
    assert ours.encode(PROMPTS, None, "cpu")["negative_text_embeds"].abs().max() > 0
    assert_same(our_images(ours, 3.0, negative=None), draw(stock(directory), ours, 3.0, negative=None))


def test_a_large_pixart_alpha_is_told_the_size_of_the_image(tiny_pipelines, tmp_path, draw):
    directory = tiny_pipelines.build("pixart-alpha", tmp_path / "large", sample_size=128)
    ours = load(directory, resolution=(24, 16))
    assert ours.encode(PROMPTS, None, "cpu")["resolution"].tolist() == [[24, 16]] * 2
    assert_same(our_images(ours, 3.0), draw(stock(directory), ours, 3.0, resolution=(24, 16)))


@pytest.mark.parametrize("family", ["sd3", "flux", "flux-schnell"])
@pytest.mark.parametrize(
    "scheduler",
    [
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 3.0, "max_image_seq_len": 300},
        {"use_dynamic_shifting": False, "shift": 6.0},
        {"use_dynamic_shifting": False, "use_karras_sigmas": True},
    ],
)
def test_every_shift_of_a_flow_is_the_stock_pipeline_s(changed, draw, family, scheduler):
    directory = changed(family, scheduler=scheduler)
    ours = load(directory)
    assert_same(our_images(ours, GUIDANCE.get(family, 3.0)), draw(stock(directory), ours, GUIDANCE.get(family, 3.0)))


@pytest.mark.parametrize("family", ["sd", "sd2"])
def test_a_directory_without_an_offset_of_steps_is_sampled_as_the_stock_pipeline_corrects_it(changed, draw, family):
    directory = changed(family, scheduler={"steps_offset": 0})
    ours = load(directory)
    assert_same(our_images(ours, 3.0), draw(stock(directory), ours, 3.0))


def test_a_zero_terminal_signal_is_sampled_from_pure_noise(changed, draw):
    directory = changed("sd2", scheduler={"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    ours = load(directory)
    assert ours.denoiser.schedule.alphas_cumprod[-1] == 0
    assert_same(our_images(ours, 3.0), draw(stock(directory), ours, 3.0))


def test_sd3_without_t5_is_the_stock_pipeline_without_it(changed, draw):
    directory = changed("sd3", index={"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    ours = load(directory)
    theirs = stock(directory, text_encoder_3=None, tokenizer_3=None)
    assert_same(our_images(ours, 3.0), draw(theirs, ours, 3.0))


@pytest.mark.parametrize(("family", "norm"), [("dit", "ada_norm_zero"), ("pixart-alpha", "ada_norm_single")])
def test_the_published_name_of_the_transformers_is_read(changed, draw, tmp_path, family, norm):
    named = {"_class_name": "Transformer2DModel", "norm_type": norm}
    directory = changed(family, transformer=named, index={"transformer": ["diffusers", "Transformer2DModel"]})
    ours = load(directory)
    images = our_images(ours, 3.0)
    assert_same(images, draw(stock(directory), ours, 3.0))
    ours.save_student(tmp_path / "student", ours.denoiser.network)
    assert_same(images, draw(stock(tmp_path / "student", like_ours=False), ours, 3.0))


def test_latents_with_statistics_are_denormalised_as_by_the_stock_pipeline(changed, draw):
    statistics = {"latents_mean": [0.5, -0.2, 0.1, 0.3], "latents_std": [0.8, 1.1, 1.2, 0.9]}
    directory = changed("sdxl", vae=statistics)
    ours = load(directory)
    assert_same(our_images(ours, 3.0), draw(stock(directory), ours, 3.0))


# ---------------------------------------------------------------------- what training relies on


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_is_one_before_an_update_with_guidance(tiny_pipeline, family):
    ours = load(tiny_pipeline(family))
    denoiser, guidance = ours.denoiser, GUIDANCE.get(family, 3.0)
    kind = "ddim" if hasattr(denoiser.schedule, "timesteps") else "cps"
    policy = make_policy(denoiser, kind, STEPS, 0.7)
    generator = torch.Generator().manual_seed(1)
    noises = torch.randn(STEPS, 4, *denoiser.latent_shape, generator=generator)
    condition = condition_of(ours)
    arguments = {"guidance": guidance, "batch_size": 3}
    trajectory = rollout(
        denoiser, policy, noise_of(ours), condition, group_size=2, step_noise=lambda step: noises[step], **arguments
    )
    assert len(trajectory.step) >= 4
    assert first_pass_error(denoiser, policy, trajectory, condition, guidance=guidance, batch_size=5) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight_that_an_image_depends_on(tiny_pipeline, family):
    ours = load(tiny_pipeline(family))
    ours.denoiser.network.requires_grad_(True)
    guidance = GUIDANCE.get(family, 3.0)
    timestep = torch.tensor([500, 250])
    pred, nothing = ours.denoiser.predict(noise_of(ours), timestep, condition_of(ours), guidance=guidance)
    (pred.square().mean() + (0 if nothing is None else nothing.square().mean())).backward()
    without = [name for name, value in ours.denoiser.network.named_parameters() if value.grad is None]
    assert not without
    ours.denoiser.network.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_networks_and_encoders_predict_nearly_the_same(tiny_pipeline, family):
    exact, rounded = load(tiny_pipeline(family)), load(tiny_pipeline(family), dtype=torch.bfloat16)
    timestep = torch.tensor([500, 250])
    guidance = GUIDANCE.get(family, 2.0)  # times 1000 without a rounding: FLUX takes the cosine of that
    with torch.no_grad():
        want = exact.denoiser.predict(noise_of(exact), timestep, condition_of(exact), guidance=guidance)[0]
        got = rounded.denoiser.predict(noise_of(exact), timestep, condition_of(rounded), guidance=guidance)[0]
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).std() < 0.05 * want.std()


# ---------------------------------------------------------------------- what is exported


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_student_is_a_stock_pipeline_with_our_images(tiny_pipeline, draw, tmp_path, family):
    ours = load(tiny_pipeline(family))
    network = copy.deepcopy(ours.denoiser.network)
    generator = torch.Generator().manual_seed(2)
    for value in network.parameters():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    student = ours.denoiser.with_network(network)
    guidance = GUIDANCE.get(family, 3.0)
    images = our_images(ours, guidance, denoiser=student)
    assert (images - our_images(ours, guidance)).abs().max() > 1e-2
    ours.save_student(tmp_path / "student", network)
    assert_same(images, draw(stock(tmp_path / "student", like_ours=False), ours, guidance))
    again = load(tmp_path / "student")
    assert torch.equal(our_images(again, guidance), images)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_adapter_is_loaded_by_the_stock_pipeline_with_our_images(tiny_pipeline, draw, tmp_path, family):
    ours = load(tiny_pipeline(family))
    before = our_images(ours, GUIDANCE.get(family, 3.0))
    network, guidance = ours.denoiser.network, GUIDANCE.get(family, 3.0)
    add_lora(network, rank=2, alpha=6.0)
    generator = torch.Generator().manual_seed(3)
    for name, value in network.named_parameters():
        if "lora_B" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    images = our_images(ours, guidance, denoiser=ours.denoiser.with_adapter(ADAPTER))
    assert (images - before).abs().max() > 1e-2
    assert torch.equal(our_images(ours, guidance), before)
    ours.save_lora(tmp_path / "lora", lora_state(network), network.peft_config[ADAPTER])
    state, read = lora_state(network), ours.read_lora(tmp_path / "lora")
    assert read.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in read.items())
    theirs = stock(tiny_pipeline(family))
    readme = (tmp_path / "lora" / "README.md").read_text()
    if hasattr(theirs, "load_lora_weights"):
        assert "pipeline.load_lora_weights('lora')" in readme
        theirs.load_lora_weights(tmp_path / "lora")
    else:
        from peft import PeftModel

        assert "PeftModel.from_pretrained(pipeline.transformer, 'lora')" in readme
        theirs.transformer = PeftModel.from_pretrained(theirs.transformer, tmp_path / "lora")
    assert_same(images, draw(theirs, ours, guidance))
