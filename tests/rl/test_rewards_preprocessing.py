"""Preprocessing against the image processors of transformers, and against Pillow's resampling in floating point."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor

from engine.rl.rewards import RewardError
from engine.rl.rewards.preprocessing import Preprocessing

MEAN, STD = [0.48, 0.45, 0.40], [0.27, 0.26, 0.28]
PLAIN = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_center_crop": False,
    "image_mean": MEAN,
    "image_std": STD,
}


def written(folder, **config):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return Preprocessing.of(folder)


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(40, 40), (64, 40), (37, 90), (24, 20), (28, 28)])
@pytest.mark.parametrize("kind", [CLIPImageProcessor, BitImageProcessor])
def test_images_become_what_the_model_s_own_processor_makes_of_them(tmp_path, kind, size):
    processor = kind(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path)
    images = pixels(4, 3, *size)
    expected = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt").pixel_values
    ours = Preprocessing.of(tmp_path)(images / 255)
    assert ours.shape == expected.shape == (4, 3, 28, 28)
    # in units of 8-bit steps: the processor rounds after each of its two passes
    steps = (ours - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert steps.max() < 1.5
    assert steps.mean() < 0.4


@pytest.mark.parametrize(("resample", "filter_"), [(2, Image.BILINEAR), (3, Image.BICUBIC)])
@pytest.mark.parametrize("size", [(50, 41), (17, 20)])
def test_the_resize_is_pillow_s_without_its_rounding(tmp_path, resample, filter_, size):
    prepare = written(
        tmp_path,
        image_processor_type="DINOv3ViTImageProcessorFast",
        size={"height": 32, "width": 24},
        crop_size=None,
        do_center_crop=None,
        resample=resample,
        image_mean=MEAN,
        image_std=STD,
    )
    images = pixels(2, 3, *size) / 255
    for number, channel in enumerate(images.flatten(0, 1)):
        wide = np.array(Image.fromarray(channel.numpy(), "F").resize((24, size[0]), filter_)).clip(0, 1)
        both = np.array(Image.fromarray(wide, "F").resize((24, 32), filter_)).clip(0, 1)
        expected = (both - MEAN[number % 3]) / STD[number % 3]
        np.testing.assert_allclose(prepare(images).flatten(0, 1)[number], expected, atol=2e-5)


def test_a_saved_processor_of_transformers_5_is_read_too(tmp_path):
    CLIPImageProcessor(size={"shortest_edge": 9}, crop_size={"height": 8, "width": 7}).save_pretrained(tmp_path)
    alone = Preprocessing.of(tmp_path)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())})
    )
    (tmp_path / "preprocessor_config.json").unlink()
    assert Preprocessing.of(tmp_path) == alone
    assert (alone.size, alone.crop) == (9, (8, 7))


def test_sizes_of_older_files_are_bare_numbers(tmp_path):
    kind = {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD}
    cropped = written(tmp_path, size=9, crop_size=8, do_center_crop=True, resample=3, **kind)
    assert (cropped.size, cropped.crop) == (9, (8, 8))
    square = written(tmp_path, size=9, resample=2, **kind)
    assert (square.size, square.crop, square.mode) == ((9, 9), None, "bilinear")


def test_one_channel_is_taken_for_all_three(tmp_path):
    prepare, grey = written(tmp_path, **PLAIN), pixels(2, 1, 8, 8) / 255
    assert torch.equal(prepare(grey), prepare(grey.repeat(1, 3, 1, 1)))


def test_gradients_pass_through_every_step(tmp_path):
    resized = {"do_resize": True, "size": {"shortest_edge": 10}, "resample": 3}
    prepare = written(tmp_path, **{**PLAIN, **resized, "do_center_crop": True, "crop_size": 8})
    images = (torch.rand(1, 3, 13, 11, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25).requires_grad_()
    prepare(images).square().sum().backward()
    direction, step = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)), 1e-2
    with torch.no_grad():
        up, down = (prepare(images + sign * step * direction).double().square().sum() for sign in (1, -1))
    assert float((images.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=1e-3)


def test_values_keep_the_range_that_the_model_wants(tmp_path):
    image = torch.ones(1, 3, 2, 2)
    assert written(tmp_path, **PLAIN, do_normalize=False)(image).max() == 1
    assert written(tmp_path, **PLAIN, do_normalize=False, do_rescale=False)(image).max() == 255


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**PLAIN, "do_resize": True, "size": 8, "resample": 1}, r"resample=1; 2 \(bilinear\) and 3"),
        ({**PLAIN, "do_resize": True, "size": 8}, r"cannot be read: KeyError 'resample'"),
        ({**PLAIN, "image_mean": None}, r"cannot be read: TypeError"),
        ({**PLAIN, "do_resize": True, "size": {"longest_edge": 8}}, r"cannot be read: KeyError 'height'"),
        ({**PLAIN, "image_processor_type": "ConvNextImageProcessor"}, r"of a ConvNextImageProcessor; .*of CLIP, Bit"),
        (
            {**PLAIN, "do_resize": True, "size": 8, "resample": 3, "do_center_crop": True, "crop_size": 9},
            r"crops \(9, 9\) of images of \(8, 8\)",
        ),
        ({}, r"is of a None; the image processors of CLIP"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, config, message):
    with pytest.raises(RewardError, match=message):
        written(tmp_path, **config)


def test_images_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(RewardError, match=r"1 or 3 channels, got \(1, 4, 8, 8\)"):
        written(tmp_path, **PLAIN)(torch.zeros(1, 4, 8, 8))
    small = written(tmp_path, **{**PLAIN, "do_center_crop": True, "crop_size": 9})
    with pytest.raises(RewardError, match=r"images of \(8, 8\) pixels are smaller than the model's crop"):
        small(torch.zeros(1, 3, 8, 8))


def test_a_directory_without_a_readable_file_is_refused(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(RewardError, match=r"it has no preprocessor_config.json"):
        Preprocessing.of(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(RewardError, match=r"preprocessor_config.json cannot be read"):
        Preprocessing.of(tmp_path)
