"""What several folders of tests share: `bench` made importable without the checkout's root on the path (see
engine/__init__.py), and tiny models in the real formats. Packages that take seconds are imported in functions."""

import importlib.util
import json
import string
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).resolve().parent


def _import(name, path, **package):
    spec = importlib.util.spec_from_file_location(name, path, **package)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if "bench" not in sys.modules:
    _FOLDER = _TESTS.parent / "bench"
    _import("bench", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)])


VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def spread(make, config):
    """A model of weights large enough that images get different features; a fresh one tells hardly any apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_pipelines():
    """The module tests/tiny_pipelines.py."""
    return _import("tiny_pipelines", _TESTS / "tiny_pipelines.py")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_pipelines, tmp_path_factory):
    """Maps a family of `tiny_pipelines.FAMILIES` to the directory of its tiny pipeline, to be read only."""
    return cache(lambda family: tiny_pipelines.build(family, tmp_path_factory.mktemp("pipelines") / family))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A directory with a tiny CLIPModel, as CLIP models are published."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    special = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"]}
    text = {**VIT, **special, "vocab_size": len(words), "max_position_embeddings": 12, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=VIT, projection_dim=12, logit_scale_init_value=3.0)
    spread(CLIPModel, config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """Maps a config to the directory of a model of it, with a processor that keeps 28 x 28 images as they are."""
    from transformers import AutoModel, BitImageProcessor

    def saved(config):
        folder = tmp_path_factory.mktemp(config.model_type)
        spread(AutoModel.from_config, config).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
        return folder

    return saved
