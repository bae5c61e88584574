"""A tiny denoiser of each family with something to predict."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

RESOLUTION = (16, 16)


@pytest.fixture(scope="session")
def _conditions(tiny_pipeline):
    """Maps a text family to the condition of two prompts."""
    from engine.models.pipelines import load_pipeline

    def encode(family):
        pipeline = load_pipeline(tiny_pipeline(family), resolution=RESOLUTION)
        return pipeline.encode(["a red cat", "dog"], ["tree", "the blue house"], "cpu")

    return cache(encode)


@pytest.fixture
def tiny(tiny_pipeline, write_class_unet, _conditions):
    """Maps a family (or "class-unet") to a namespace: its `denoiser`, freshly loaded, `x` (2, C, H, W), `timestep` and
    `condition`."""
    from engine.models.pipelines import load_pipeline

    def make(family, **keywords):
        directory = write_class_unet if family == "class-unet" else tiny_pipeline(family)
        resolution = None if family == "class-unet" else RESOLUTION
        denoiser = load_pipeline(directory, resolution=resolution, **keywords).denoiser
        condition = {"class_labels": torch.tensor([3, 7])} if denoiser.classes is not None else _conditions(family)
        x = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        timestep = torch.tensor([500, 250])
        return SimpleNamespace(denoiser=denoiser, x=x, timestep=timestep, condition=condition)

    return make


@pytest.fixture(scope="session")
def write_class_unet(tmp_path_factory):
    """The directory of a class-conditional UNet with attention, as the embedded digits have without."""
    from diffusers import DDIMScheduler, UNet2DModel

    directory = tmp_path_factory.mktemp("class_unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11,
        )  # fmt: skip
    unet.save_pretrained(directory / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(directory / "scheduler")
    return directory
