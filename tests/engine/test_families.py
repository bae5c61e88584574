"""Every model family trains from the command line: full and LoRA, in fp32 and bf16, under each ZeRO stage."""

import json
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

import engine
from engine import train
from engine.run_directory import read_metrics

TRAIN = Path(engine.__file__).parent / "train.py"
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
