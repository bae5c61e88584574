"""What is replaced, what is left alone, and that nothing but the class of a module changes."""

import copy
import functools
import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from engine.kernels import backend, patch, unpatch
from engine.kernels.patch import _digest

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="says nothing about Triton")

# All there is in the tiny models, but for two chains a model that the model's own forward computes: DiT's and PixArt's
# last adaptive norm, the SiLU of a VAE's decoder.
REPLACED = {
    "digits": {"GroupNorm": 20, "GroupNormSiLU": 1, "ResnetBlock2D": 8},
    "sd": {"GroupNorm": 20, "GroupNormSiLU": 1, "ResnetBlock2D": 8, "GEGLU": 4},
    "sdxl": {"GroupNorm": 20, "GroupNormSiLU": 1, "ResnetBlock2D": 8, "GEGLU": 5},
    "dit": {"BasicTransformerBlock": 2, "AdaLayerNormZero": 2},
    "pixart": {"BasicTransformerBlock": 2},
    "sd3": {
        "JointTransformerBlock": 2, "SD35AdaLayerNormZeroX": 1, "AdaLayerNormZero": 2, "AdaLayerNormContinuous": 2,
    },
    "flux": {
        "FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1, "AdaLayerNormZero": 2, "AdaLayerNormZeroSingle": 1,
        "AdaLayerNormContinuous": 1,
    },
    "vae": {"GroupNorm": 23, "GroupNormSiLU": 1, "ResnetBlock2D": 10},
}  # fmt: skip


def classes(model):
    return [type(module) for module in model.modules()]


def assert_same_bits(results, others):
    assert results.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in results.items())


def test_what_runs_fused_is_reported_however_often_one_patches(tiny, name):
    model, _ = tiny.make(name)
    stock = classes(model)
    assert patch(model) == REPLACED[name]
    assert patch(model) == REPLACED[name]
    changed = sum(now is not before for now, before in zip(classes(model), stock, strict=True))
    assert changed == sum(REPLACED[name].values()) + REPLACED[name].get("GroupNormSiLU", 0)  # and its SiLU


def test_unpatch_brings_the_stock_model_back(tiny, name):
    model, inputs = tiny.make(name)
    stock, before = classes(model), tiny.run(model, inputs)
    patch(model)
    unpatch(model)
    assert classes(model) == stock
    assert_same_bits(tiny.run(model, inputs), before)


def test_parameters_and_their_names_are_untouched(tiny, name):
    model, _ = tiny.make(name)
    before = dict(model.named_parameters()), list(model.state_dict())
    patch(model)
    now = dict(model.named_parameters())
    assert (list(now), list(model.state_dict())) == (list(before[0]), before[1])
    assert all(parameter is before[0][key] for key, parameter in now.items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_run_fused_on_weights_of_their_own(tiny, name, duplicate):
    model, inputs = tiny.make(name)
    patch(model)
    expected = tiny.run(model, inputs)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert patch(twin) == REPLACED[name]
    assert_same_bits(tiny.run(twin, inputs), expected)


def test_a_patched_model_is_saved_as_the_stock_one(tiny, name, tmp_path):
    model, inputs = tiny.make(name)
    stock = classes(model)
    model.save_pretrained(tmp_path / "stock")
    patch(model)
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    for file in files:
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    assert json.loads((tmp_path / "patched" / "config.json").read_text())["_class_name"] == type(model).__name__
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    assert classes(loaded) == stock
    unpatch(model)
    assert_same_bits(tiny.run(loaded, inputs), tiny.run(model, inputs))


def test_blocks_keep_the_names_by_which_diffusers_finds_them(tiny):
    model, _ = tiny.make("flux")
    patch(model)
    assert {type(module).__name__ for module in model.modules()} >= set(model._repeated_blocks)


# ---- What is left alone


def of_another_release(self, input_tensor, temb):
    return self.conv2(self.norm2(self.conv1(self.norm1(input_tensor))))


@functools.wraps(ResnetBlock2D.forward)
def wrapped(*arguments, forward=ResnetBlock2D.forward):
    return 2 * forward(*arguments)


@pytest.mark.parametrize(
    "forward", [of_another_release, wrapped, lambda self, input_tensor, temb: self.conv2(self.conv1(input_tensor))]
)
def test_blocks_with_an_unknown_forward_are_left_alone_and_named(tiny, monkeypatch, caplog, forward):
    monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    stock, inputs = tiny.make("digits")
    model = copy.deepcopy(stock)
    with caplog.at_level(logging.WARNING, "engine.kernels.patch"):
        assert patch(model) == {"GroupNorm": 20, "GroupNormSiLU": 1}
    [record] = [record for record in caplog.records if record.name == "engine.kernels.patch"]
    assert record.getMessage().startswith(
        "8 ResnetBlock2D left without fused kernels: its forward is not that of diffusers"
    )
    tiny.assert_agreement(tiny.run(model, inputs), tiny.run(stock, inputs), 5e-5)


def test_without_source_files_only_what_needs_none_is_replaced(tiny, monkeypatch, caplog):
    def no_source(function):
        raise OSError

    monkeypatch.setattr("inspect.getsource", no_source)
    _digest.cache_clear()
    model, _ = tiny.make("sd")
    assert patch(model) == {"GroupNorm": 21}
    assert "8 ResnetBlock2D left without fused kernels" in caplog.text
    _digest.cache_clear()


def test_a_module_whose_forward_was_replaced_is_left_alone_and_named(tiny, caplog):
    model, _ = tiny.make("dit")
    block = model.transformer_blocks[0]
    block.forward = block.forward
    with caplog.at_level(logging.WARNING, "engine.kernels.patch"):
        assert patch(model) == {"BasicTransformerBlock": 1, "AdaLayerNormZero": 2}
    assert "1 BasicTransformerBlock left without fused kernels: its forward was replaced" in caplog.text


@pytest.mark.parametrize(
    ("name", "part", "kept"),
    [
        ("digits", "conv_act", "GroupNormSiLU"),
        ("digits", "mid_block.resnets.0.nonlinearity", "ResnetBlock2D"),
        ("pixart", "transformer_blocks.0.norm2", "BasicTransformerBlock"),
    ],
)
def test_a_part_whose_forward_was_replaced_is_not_absorbed(tiny, name, part, kept):
    stock, inputs = tiny.make(name, dtype=torch.float64)
    for network in (stock, model := copy.deepcopy(stock)):
        network.get_submodule(part).forward = torch.sin
    assert patch(model).get(kept, 0) == REPLACED[name][kept] - 1
    tiny.assert_agreement(tiny.run(model, inputs), tiny.run(stock, inputs), 1e-11)


def test_subclasses_are_left_alone():
    class Own(nn.GroupNorm):
        pass

    assert patch(nn.Sequential(Own(2, 4), nn.GroupNorm(2, 4))) == {"GroupNorm": 1}


def test_norms_with_weights_of_their_own_are_not_absorbed_by_a_block(tiny, caplog):
    stock, inputs = tiny.make("dit", norm_elementwise_affine=True, dtype=torch.float64)
    model = copy.deepcopy(stock)
    assert patch(model) == {"AdaLayerNormZero": 2}
    assert "fused kernels" not in caplog.text
    tiny.assert_agreement(tiny.run(model, inputs), tiny.run(stock, inputs), 1e-11)


@pytest.mark.parametrize("activation", ["gelu", "mish"])
def test_unets_of_another_activation_keep_it(tiny, activation):
    stock, inputs = tiny.make("digits", act_fn=activation, dtype=torch.float64)
    model = copy.deepcopy(stock)
    assert patch(model)["GroupNorm"] == 20
    assert "ResnetBlock2D" not in patch(model)
    tiny.assert_agreement(tiny.run(model, inputs), tiny.run(stock, inputs), 1e-11)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_norm_out, self.conv_act = nn.GroupNorm(2, 4), nn.SiLU()


class Adjacent(Head):
    def forward(self, sample):
        sample = self.conv_norm_out(sample)
        sample = self.conv_act(sample)
        return 2 * sample


class Apart(Head):
    def forward(self, sample):
        sample = self.conv_norm_out(sample)
        sample = sample + 1
        return self.conv_act(sample)


class Twice(Head):
    def forward(self, sample):
        sample = self.conv_norm_out(sample)
        sample = self.conv_act(sample)
        return self.conv_act(sample)


@pytest.mark.parametrize(("kind", "fused"), [(Adjacent, "GroupNormSiLU"), (Apart, "GroupNorm"), (Twice, "GroupNorm")])
def test_the_last_norm_takes_the_silu_only_where_it_is_called_right_behind(kind, fused):
    head, x = kind(), torch.randn(2, 4, 3, 3)
    expected = head(x)
    assert patch(head) == {fused: 1}
    torch.testing.assert_close(head(x), expected)


def test_a_pipeline_is_refused():
    with pytest.raises(TypeError, match="got dict; of a pipeline, pass its unet or transformer"):
        patch({})


def test_importing_the_kernels_does_not_import_diffusers():
    code = "import sys, engine.kernels; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
