"""Directories and files that are not what a term needs: refused at the start, by the key that names them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config

from engine.rl.rewards import RewardError, make_reward


def broken(folder, tmp_path, change):
    """A copy of a directory, changed."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def rewrite(name, **entries):
    def change(folder):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | entries))

    return change


def cut(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def fewer_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"it does not exist; a directory in transformers format"),
        (without("config.json"), r"it has no config.json; .*HPSv2.*converted to a CLIPModel"),
        (lambda folder: (folder / "config.json").write_text("{"), r"its config.json cannot be read"),
        (rewrite("config.json", model_type="bert"), r"it holds a model of type 'bert'; one of clip is needed"),
        (without("preprocessor_config.json"), r"it has no preprocessor_config.json"),
        (
            rewrite("preprocessor_config.json", resample=0),
            r"its preprocessor config has resample=0; 2 \(bilinear\) and 3 \(bicubic\)",
        ),
        (
            rewrite("preprocessor_config.json", size=20, crop_size=20),
            r"it does not run on an image: .*20.*28",
        ),
        (cut, r"its weights cannot be loaded: SafetensorError: .*is the download complete"),
        (without("model.safetensors"), r"its weights cannot be loaded: OSError"),
        (fewer_weights, r"its weights do not fit its config.json: 1 are missing or .*, as visual_projection.weight"),
        (
            rewrite("config.json", projection_dim=13),
            r"its weights do not fit its config.json: 2 are .*, as text_projection.weight",
        ),
        (without("vocab.json"), r"it has no tokenizer.*vocab.json and merges.txt"),
        (lambda f: (f / "vocab.json").write_text("["), r"its tokenizer cannot be loaded"),
        (
            lambda f: (f / "vocab.json").write_text(json.dumps({f"w{n}": n for n in range(99)})),
            r"its tokenizer has \d+ words, and its text model 54",
        ),
    ],
)
def test_a_directory_that_is_no_model_is_refused_by_the_key_of_its_path(clip, tmp_path, change, message):
    path = broken(clip, tmp_path, change)
    with pytest.raises(RewardError, match=rf"^reward\.terms\.mine\.path={re.escape(path)}: {message}"):
        make_reward({"pixel": 1.0, "mine": {"kind": "clip_text", "path": path}}, device="cpu")


def test_models_that_do_not_fit_the_term_are_refused(clip, vision):
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    dino = str(vision(Dinov2Config(**tiny)))
    with pytest.raises(RewardError, match=r"terms.clip.path=.*model of type 'dinov2'; one of clip is needed"):
        make_reward({"clip": {"path": dino}}, device="cpu")
    with pytest.raises(RewardError, match=r"terms.dino.path=.*model of type 'clip'; one of dinov2, .*dinov3_vit"):
        make_reward({"dino": {"path": str(clip)}}, device="cpu")
    with pytest.raises(RewardError, match=r"terms.perceptual.path=.*it has hidden states 0..2, not 7"):
        make_reward({"perceptual": {"path": dino, "layers": [1, 7]}}, device="cpu")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, r"this file does not exist"),
        (b"no tensors", r"it cannot be read as .safetensors weights"),
        ({"fc.weight": torch.zeros(1, 12)}, r"it holds fc.weight; supported are a linear head"),
        ({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, r"weight \(1, 768\) .* do not take 12 features"),
        ({"weight": torch.zeros(2, 12), "bias": torch.zeros(2)}, r"it gives 2 scores an image; 1 is needed"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(clip, tmp_path, tensors, message):
    file = tmp_path / "head.safetensors"
    if isinstance(tensors, bytes):
        file.write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, file)
    with pytest.raises(RewardError, match=rf"^reward\.terms\.aesthetic\.head={re.escape(str(file))}: {message}"):
        make_reward({"aesthetic": {"path": str(clip), "head": str(file)}}, device="cpu")
