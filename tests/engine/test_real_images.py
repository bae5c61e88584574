"""Real images of a discriminator: found by what is asked for, brought to the teacher's size, encoded as its latents."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from engine.conditions import ConditionPool
from engine.errors import EngineError
from engine.models.pipelines import load_pipeline
from engine.objectives.draws import Rows
from engine.real_images import RealImages
from engine.sources import Classes

KEY = "objective.dmd2.real_images"
SIZE = (16, 16)
PROMPTS = ("a red cat", "two trees")


class Prompts:
    """A source of two prompts."""

    def __len__(self):
        return len(PROMPTS)

    def asked(self, rows):
        return {"prompt": [PROMPTS[row] for row in rows.tolist()]}


def folder_of(tmp_path, rows, side=SIZE):
    """An imagefolder of gray RGB images, each of its own brightness: 40, 80, ..."""
    for number, row in enumerate(rows, 1):
        Image.new("RGB", side[::-1], (40 * number,) * 3).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(tmp_path)


def context_of(pipeline, source, size):
    pool = ConditionPool("train", 0, size, source, pipeline.denoiser.latent_shape)
    return SimpleNamespace(
        pool=pool, pipeline=pipeline, teacher=pipeline.denoiser, decode=pipeline.decode, device=torch.device("cpu")
    )


def drawn(images, indices):
    """Latents of pool indices, the first image of each condition."""
    draws = SimpleNamespace(uniform=lambda what, number, rows: torch.zeros(len(rows.indices)))
    return images(draws, 0, Rows(torch.arange(len(indices)), torch.tensor(indices), {}))


@pytest.fixture
def pixels(tiny_teacher):
    return load_pipeline(tiny_teacher)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "dit"])
@pytest.mark.parametrize("statistics", [False, True])
def test_encoding_takes_back_what_decoding_does_to_latents(tiny_pipeline, monkeypatch, family, statistics):
    pipeline = load_pipeline(tiny_pipeline(family), resolution=SIZE)
    latents = torch.randn(2, *pipeline.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    if statistics:
        count = latents.shape[1]
        more = {"latents_mean": [0.1 * i for i in range(count)], "latents_std": [1.0 + i for i in range(count)]}
        pipeline.vae.register_to_config(**more)
    given = {}
    monkeypatch.setattr(
        pipeline.vae, "decode", lambda z, return_dict: given.update(z=z) or (torch.zeros(2, 3, 16, 16),)
    )
    images = pipeline.decode(latents)
    kept = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: given["z"]))
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: given.update(x=x) or kept)
    torch.testing.assert_close(pipeline.encode_images(images), latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(given["x"], 2 * images - 1)
    assert not torch.allclose(given["z"], latents)


def test_pixels_are_their_own_latents(pixels):
    latents = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(pixels.encode_images(pixels.decode(latents)), latents)


def test_a_prompt_gets_an_image_of_its_own(tmp_path, tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline("sd"), resolution=SIZE)
    rows = [{"file_name": "b.png", "text": PROMPTS[1]}, {"file_name": "a.png", "text": PROMPTS[0]}]
    images = RealImages(context_of(pipeline, Prompts(), 6), folder_of(tmp_path, rows), KEY)
    expected = pipeline.encode_images(torch.tensor([80.0, 40.0, 80.0]).view(3, 1, 1, 1).expand(3, 3, *SIZE) / 255)
    torch.testing.assert_close(drawn(images, [0, 3, 4]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [(8, 8), (8, 24), (32, 16)])
def test_a_label_gets_an_image_at_the_teachers_size(tmp_path, pixels, side):
    rows = [{"file_name": f"{label}.png", "label": label} for label in range(3)]
    images = RealImages(context_of(pixels, Classes(3), 5), folder_of(tmp_path, rows, side), KEY)
    latents = drawn(images, [0, 2, 4])
    expected = torch.tensor([40.0, 120.0, 80.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8) / 127.5 - 1
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"file_name": "0.png", "label": 0}], "has no image of 1 conditions that are trained on, as '1'"),
        ([{"file_name": "0.png", "text": "one"}], "line 1 of .*the number of a class"),
        ([{"file_name": "0.png", "label": "one"}], "line 1 of .*the number of a class"),
        ([{"label": 0}], "line 1 of "),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, pixels, rows, says):
    for row in rows:
        Image.new("L", (8, 8)).save(tmp_path / row.get("file_name", "other.png"))
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(EngineError, match=says):
        RealImages(context_of(pixels, Classes(2), 4), str(tmp_path), KEY)


def test_a_folder_without_metadata_is_refused(tmp_path, pixels):
    with pytest.raises(EngineError, match=r"there is no metadata.jsonl in it"):
        RealImages(context_of(pixels, Classes(2), 4), str(tmp_path), KEY)
