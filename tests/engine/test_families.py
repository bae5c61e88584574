"""Every model family trains from the command line: full and LoRA, in fp32 and bf16, under each ZeRO stage."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import train
from engine.export import export
from engine.run_directory import read_metrics

CLASSES = ("dit",)
FLOWS = ("sd3", "sd35", "flux", "flux-schnell")
WITHOUT_GUIDANCE = ("flux-schnell",)
ITERATIONS = 3
SIZES = (
    f"iterations={ITERATIONS}",
    "teacher.steps=4",
    "teacher.resolution=[16, 16]",
    "student.steps=3",
    "rollout.conditions=2",
    "rollout.group_size=2",
    "rollout.pool=4",
    "reward.terms={pixel: 1}",
    "optimizer.lr=1e-3",
    "train.micro_batch=3",
    "train.threads=1",
    "evaluation.every=2",
    "evaluation.held_out=2",
    "evaluation.samples=100",
    "checkpoint.every=0",
    "logging.tensorboard=false",
)


def _cases():
    """Each family full and with LoRA; precisions and stages take turns so that all their pairs come up."""
    turn = count()
    for family in ("sd", "sd2", "sdxl", "dit", "pixart-alpha", "pixart-sigma", "sd3", "sd35", "flux", "flux-schnell"):
        for kind in ("full", "lora"):
            i = next(turn)
            yield pytest.param(family, kind, ("fp32", "bf16")[(i + i // 8) % 2], i % 4, id=f"{family}-{kind}")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"a {colour} {thing}\n" for colour in ("red", "blue", "green") for thing in THINGS))
    return path


THINGS = ("cat", "dog", "house", "tree", "photo")


def arguments(family: str, directory: Path, prompts: Path, output: Path, *overrides: str) -> list[str]:
    """Of the command line."""
    guidance = 1.0 if family in WITHOUT_GUIDANCE else 3.0
    return [
        *SIZES,
        f"teacher.path={directory}",
        f"teacher.guidance={guidance}",
        f"student.guidance={guidance}",
        f"policy.kind={'cps' if family in FLOWS else 'ddim'}",
        f"output_dir={output}",
        *([] if family in CLASSES else [f"prompts.path={prompts}", "prompts.held_out=0.5"]),
        *overrides,
    ]


def mode(kind: str, precision: str, stage: int) -> list[str]:
    base = [f"precision={precision}", f"teacher.precision={precision}", f"zero.stage={stage}"]
    return [*base, *(["lora.rank=2"] if kind == "lora" else [])]


@pytest.mark.parametrize(("family", "kind", "precision", "stage"), _cases())
def test_every_family_trains(tiny_pipeline, prompts, tmp_path, quick_finish, family, kind, precision, stage):
    command = arguments(family, tiny_pipeline(family), prompts, tmp_path / "run", *mode(kind, precision, stage))
    assert train.main(command) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert max(row["ratio/first_pass_error"] for row in rows) < (1e-3 if precision == "fp32" else 0.05)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student"]["steps"] == 3
    saved = list((tmp_path / "run" / "student").rglob("*.safetensors"))
    assert saved


@pytest.mark.parametrize("which", [None, "best"])
def test_a_lora_student_is_merged_into_a_whole_pipeline(tiny_pipeline, prompts, tmp_path, quick_finish, which):
    from diffusers import DiffusionPipeline

    directory = tiny_pipeline("sd")
    more = [*mode("lora", "fp32", 0), "iterations=1", "evaluation.every=1", "ema.decay=0", "optimizer.lr=0.1"]
    result = engine.distill(engine.load_config(None, arguments("sd", directory, prompts, tmp_path / "run", *more)))
    export(tmp_path / "run", tmp_path / "merged", which, merge=True)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged").unet
    teacher = DiffusionPipeline.from_pretrained(directory).unet
    x, timestep = torch.randn(2, *result.student.latent_shape), torch.tensor([7, 801])
    text = {"encoder_hidden_states": torch.randn(2, 5, merged.config.cross_attention_dim)}
    with torch.no_grad():
        adapted, _ = result.student.predict(x, timestep, text)
        found, before = (network(x, timestep, **text).sample for network in (merged, teacher))
    torch.testing.assert_close(found, adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, adapted, rtol=1e-4, atol=1e-4)


RUN_ALL = """
import json, sys
from engine import train
sys.exit(max(train.main(command) for command in json.loads(sys.argv[1])))
"""


def test_two_ranks_train_the_adapters_of_one_in_every_stage(tiny_pipeline, prompts, tmp_path, quick_finish, launch):
    """The whole data flow of a text pipeline; all stages in one pair of processes, as a start takes ten seconds."""
    directory = tiny_pipeline("sd3")

    def command(name: str, stage: int) -> list[str]:
        more = [*mode("lora", "fp32", stage), "evaluation.every=0", "optimizer.eps=1e-4"]
        return arguments("sd3", directory, prompts, tmp_path / name, *more)

    assert train.main(command("one", 0)) == 0
    together = json.dumps([command(f"two-{stage}", stage) for stage in range(4)])
    processes = launch.start_ranks([["-c", RUN_ALL, together]] * 2, tmp_path)
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][1][-4000:] + said[1][1][-4000:]
    alone = adapter(tmp_path / "one")
    assert any(bool(value.any()) for name, value in alone.items() if "lora_B" in name)  # B starts at 0
    for stage in range(4):
        found = adapter(tmp_path / f"two-{stage}")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * float(value.abs().max()), msg=name)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "pytorch_lora_weights.safetensors")


def test_a_run_on_a_gpu_prints_its_memory_plan_and_warns_when_it_is_too_large(
    tiny_pipeline, prompts, tmp_path, monkeypatch, capsys
):
    class Loaded(Exception):
        pass

    def stop(config):
        raise Loaded

    properties = type("Properties", (), {"total_memory": 2**20})
    monkeypatch.setattr("engine.ranks.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("engine.building.load_roles", stop)
    overrides = arguments("sd", tiny_pipeline("sd"), prompts, tmp_path / "run")
    with pytest.raises(Loaded):
        engine.distill(engine.load_config(None, overrides))
    said = capsys.readouterr().out
    assert "GiB per GPU" in said
    assert "does not fit" in said
    assert "warning: this run will probably end for want of GPU memory" in said
    assert not (tmp_path / "run").exists()
