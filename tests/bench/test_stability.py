"""What is said of training curves, and the variants that are compared."""

import json
import statistics
import subprocess
import sys

import pytest

from bench import stability
from bench.record import ROOT
from engine.comparing.settings import read


def curve(*points: tuple[float, float]) -> list[dict]:
    return [
        {"iteration": 10 * (place + 1), "reward": reward, "training_reward": 2 * reward, "student": {"fd": fd}}
        for place, (reward, fd) in enumerate(points)
    ]


CURVES = {
    "a": {0: curve((0.1, 3.0), (0.3, 2.0), (0.2, 4.0)), 1: curve((0.1, 1.0), (0.2, 2.0), (0.3, 5.0))},
    "b": {0: curve((0.1, 3.0))},
}


def test_early_stopping_takes_the_best_held_out_reward_and_not_the_lowest_distance():
    a, b = stability.summary(CURVES)
    assert a["early_stop"]["mean"] == statistics.mean([2.0, 5.0])
    assert a["early_stop_iteration"]["mean"] == statistics.mean([20, 30])
    assert a["lowest"]["mean"] == statistics.mean([2.0, 1.0])
    assert a["last"] == {"mean": 4.5, "std": pytest.approx(statistics.stdev([4.0, 5.0]))}
    assert a["rise"]["mean"] == statistics.mean([2.0, 4.0])
    assert a["training_reward"]["mean"] == pytest.approx(0.5)
    assert b["last"] == {"mean": 3.0, "std": None}


def test_the_picture_is_drawn(tmp_path):
    stability.picture(tmp_path / "curves.png", CURVES)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_variants_differ_in_how_they_train_and_in_nothing_else():
    comparison = read(stability.VARIANTS, [])
    assert comparison.settings.every > 0
    trained = [config.model_dump(exclude={"objective", "policy", "train"}) for config in comparison.methods.values()]
    assert all(one == trained[0] for one in trained)
    methods = list(comparison.methods.values())
    assert all(one != other for place, one in enumerate(methods) for other in methods[:place])


@pytest.mark.parametrize("file", sorted(stability.VARIANTS.parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_comparison_can_be_asked_for(file):
    assert read(file, []).jobs({})


def test_the_command_compares_and_writes_what_came_of_it(tmp_path):
    small = (
        "teacher.steps=4", "student.steps=3", "iterations=2", "rollout.pool=4", "rollout.conditions=2",
        "rollout.group_size=2", "evaluation.samples=100", "evaluation.held_out=8",
    )  # fmt: skip
    own = ("compare.methods=[grpo]", "compare.seeds=[0]", "compare.workers=1", "compare.every=1")
    files = ("--json", tmp_path / "out.json", "--picture", tmp_path / "out.png", f"output_dir={tmp_path / 'runs'}")
    subprocess.run([sys.executable, "-m", "bench.stability", *map(str, files), *small, *own], cwd=ROOT, check=True)
    [row] = json.loads((tmp_path / "out.json").read_text())["stability"]
    assert (row["method"], row["seeds"]) == ("grpo", [0])
    assert row["early_stop_iteration"]["mean"] in (1, 2)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
