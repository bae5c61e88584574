"""model.fused_kernels: a run with fused kernels is the run without them, up to rounding, and leaves a stock student."""

import json

import pytest
import torch
import yaml
from diffusers import UNet2DModel

import engine
from engine import EngineError, load_config
from engine.kernels import patch
from engine.models.pipelines import load_pipeline
from engine.roles import fuse_kernels

CPU = torch.device("cpu")


def fused(network):
    return sum(type(module).__module__.startswith("engine.kernels") for module in network.modules())


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_the_words_mean_themselves_although_yaml_reads_two_of_them_as_booleans(word, tmp_path):
    config = load_config({}, [f"model.fused_kernels={word}"])
    assert config.model.fused_kernels == word
    path = tmp_path / "config.yaml"
    for text in (f"model:\n  fused_kernels: {word}\n", yaml.safe_dump(config.as_dict())):
        path.write_text(text)
        assert load_config(path).model.fused_kernels == word


def test_another_word_is_refused_by_name():
    with pytest.raises(EngineError, match=r"model\.fused_kernels"):
        load_config({}, ["model.fused_kernels=maybe"])


@pytest.mark.parametrize(
    ("choice", "on_cpu", "on_gpu"), [("auto", False, True), ("on", True, True), ("off", False, False)]
)
def test_the_device_decides_unless_told(tiny_teacher, monkeypatch, choice, on_cpu, on_gpu):
    for has_triton, expected in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr("engine.roles.runs_triton", lambda tensor, has_triton=has_triton: has_triton)
        network = load_pipeline(tiny_teacher).denoiser.network
        fuse_kernels(network, choice, CPU)
        assert bool(fused(network)) == expected


def test_on_is_refused_where_nothing_can_be_replaced():
    with pytest.raises(EngineError, match=r"model\.fused_kernels=on, but nothing in a Linear can be replaced"):
        fuse_kernels(torch.nn.Linear(2, 2), "on", CPU)


@pytest.mark.usefixtures("quick_finish")
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_has_the_same_figures_and_leaves_a_stock_student(tiny_config, tmp_path, monkeypatch, stage):
    rows, unets = {}, {}
    for choice, expected in (("off", []), ("on", [26, 26, 26])):
        patched = []
        monkeypatch.setattr("engine.roles.patch", lambda network, seen=patched: seen.append(network) or patch(network))
        # with the student, the teacher and the frozen reference, each another copy of the network
        settings = ("iterations=4", "objective.kl_coef=0.1", f"zero.stage={stage}", f"model.fused_kernels={choice}")
        result = engine.distill(tiny_config(tmp_path / choice, *settings))
        assert [fused(network) for network in patched] == expected
        assert fused(result.student.network) == 0
        lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
        rows[choice] = [
            {name: value for name, value in json.loads(line).items() if not name.startswith("time/")} for line in lines
        ]
        unets[choice] = result.output_dir / "student" / "unet"
    assert len(rows["on"]) == 4
    for ours, stock in zip(rows["on"], rows["off"], strict=True):
        # seen: 6e-6 after four iterations, in which the network's late steps multiply its rounding
        assert ours == pytest.approx(stock, rel=1e-4)
    assert (unets["on"] / "config.json").read_text() == (unets["off"] / "config.json").read_text()
    assert fused(UNet2DModel.from_pretrained(unets["on"])) == 0
