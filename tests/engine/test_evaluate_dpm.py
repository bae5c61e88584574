"""The row of DPM-Solver++ is drawn as the stock pipeline draws with diffusers' DPMSolverMultistepScheduler."""

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from engine.dpm import dpm_sample, dpm_scheduler
from engine.models.pipelines import load_pipeline

FAMILIES = ("sd", "sd2", "sdxl", "dit", "pixart-alpha", "sd3", "flux")
STEPS = 4
PROMPTS = ["a red cat on the house", "two dogs, blue"]
NEGATIVE = ["green tree", "a photo of the dog"]
LABELS = [7, 999]

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


def stock(directory):
    """The stock pipeline with DPM-Solver++, as its users set it."""
    pipeline = DiffusionPipeline.from_pretrained(directory)
    settings = {}
    if type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        # FLUX tells its scheduler the shift of the resolution when it draws; that of SD3 is in its configuration
        settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        settings |= {"flow_shift": pipeline.scheduler.config.shift}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_its_images_are_those_of_the_stock_pipeline(tiny_pipelines, tiny_pipeline, family):
    ours = load_pipeline(tiny_pipeline(family), resolution=(16, 16))
    guidance = 3.0
    noise = torch.randn(2, *ours.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    if ours.denoiser.classes is None:
        condition, asked = ours.encode(PROMPTS, NEGATIVE, "cpu"), {"prompts": PROMPTS, "negative": NEGATIVE}
    else:
        condition, asked = {"class_labels": torch.tensor(LABELS)}, {"class_labels": LABELS}
    scheduler = dpm_scheduler(ours, STEPS)
    with torch.no_grad():
        latents, passes = dpm_sample(ours.denoiser, scheduler, noise, condition, steps=STEPS, guidance=guidance)
        images = ours.decode(latents)
        again, _ = dpm_sample(ours.denoiser, scheduler, noise, condition, steps=STEPS, guidance=guidance)
    theirs = tiny_pipelines.draw(stock(tiny_pipeline(family)), noise, steps=STEPS, guidance=guidance, **asked)
    assert images.std() > 0.05
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)
    assert torch.equal(again, latents)  # nothing of a batch is left in the scheduler
    assert passes == 2 * STEPS * ours.denoiser.passes(guidance)


def test_a_flow_of_a_fixed_shift_keeps_it(tiny_pipeline):
    """The stock pipeline of FLUX.1-schnell cannot run DPM-Solver++: it tells any scheduler a dynamic shift."""
    schnell = load_pipeline(tiny_pipeline("flux-schnell"), resolution=(16, 16))
    scheduler = dpm_scheduler(schnell, STEPS)
    scheduler.set_timesteps(STEPS)
    shift = schnell.scheduler.config.shift
    levels = torch.linspace(1 - 1e-3, 0, STEPS + 1)
    expected = shift * levels / (1 + (shift - 1) * levels)
    torch.testing.assert_close(scheduler.sigmas, expected.float(), rtol=1e-5, atol=1e-6)
