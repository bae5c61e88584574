"""Which checkpoints stay, which student is the best one, and how folders take each other's place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import EngineError, checkpoint
from engine.run_directory import read_metrics
from engine.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quick_finish")


def rows(folder: Path) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def held_out_rewards(monkeypatch):
    """`held_out_rewards(...)`: what the held-out conditions say of iterations 1, 2, ..."""

    def say(*rewards: float) -> None:
        def evaluate(trainer):
            return {"reward/held_out_eta0": rewards[trainer.iteration - 1]}

        monkeypatch.setattr(Trainer, "evaluate_held_out", evaluate)

    return say


def assert_best_is(run: Path, iteration: int) -> None:
    best = load_file(run / "checkpoints" / "best" / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    averaged = load_file(run / "checkpoints" / checkpoint.NAME.format(iteration) / "ema.safetensors")
    assert sorted(best) == sorted(averaged)
    assert all(torch.equal(best[name], value) for name, value in averaged.items())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint.keep=2"], [4, 5]),
        (["checkpoint.keep=1"], [5]),
        (["checkpoint.keep=9"], [1, 2, 3, 4, 5]),
        (["checkpoint.every=2", "checkpoint.keep=9"], [2, 4, 5]),
        (["checkpoint.every=0", "checkpoint.keep=9"], [5]),
    ],
)
def test_the_newest_checkpoints_stay_and_the_best_student_besides(
    tmp_path, tiny_config, held_out_rewards, overrides, expected
):
    held_out_rewards(0.1, 0.9, 0.3, 0.2, 0.8)
    engine.distill(tiny_config(tmp_path / "run", "iterations=5", *overrides))
    assert names(tmp_path / "run") == ["best", *(f"iteration-{iteration:06d}" for iteration in expected)]
    assert json.loads((tmp_path / "run" / "checkpoints" / "best" / "best.json").read_text())["iteration"] == 2


def test_the_best_student_is_that_of_the_highest_held_out_reward(tmp_path, tiny_config):
    engine.distill(tiny_config(tmp_path / "run", "iterations=4", "checkpoint.keep=9"))
    rewards = [row["reward/held_out_eta0"] for row in rows(tmp_path / "run")]
    assert len(set(rewards)) == 4
    best = rewards.index(max(rewards)) + 1
    assert_best_is(tmp_path / "run", best)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"] == {"iteration": best, "reward": max(rewards)}


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_student_is_replaced_by_better_ones_only(tmp_path, tiny_config, held_out_rewards, best):
    held_out_rewards(*[0.9 if iteration == best else 0.1 * iteration for iteration in (1, 2, 3)])
    engine.distill(tiny_config(tmp_path / "run", "iterations=3", "checkpoint.keep=9"))
    assert_best_is(tmp_path / "run", best)


def test_the_held_out_reward_is_taken_every_so_often_and_at_the_end(tmp_path, tiny_config):
    engine.distill(tiny_config(tmp_path / "run", "iterations=5", "evaluation.every=2"))
    assert [row["iteration"] for row in rows(tmp_path / "run") if "reward/held_out_eta0" in row] == [2, 4, 5]


def test_a_run_without_held_out_rewards_has_no_best_student(tmp_path, tiny_config):
    engine.distill(tiny_config(tmp_path / "run", "evaluation.every=0"))
    assert names(tmp_path / "run") == ["iteration-000001", "iteration-000002"]
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["best"] is None


# ---------------------------------------------------------------------- the pieces


def test_locate_takes_a_run_or_one_of_its_checkpoints(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("best", "iteration-000003", "iteration-000004", ".unfinished-iteration-000005"):
        (checkpoints / name).mkdir(parents=True)
    for name in ("iteration-000003", "iteration-000004"):
        (checkpoints / name / "trainer.json").write_text("{}")
    assert checkpoint.locate("none", tmp_path) is None
    assert checkpoint.locate("auto", None) is None
    assert checkpoint.locate("auto", tmp_path) == checkpoints / "iteration-000004"
    assert checkpoint.locate(str(tmp_path), None) == checkpoints / "iteration-000004"
    assert checkpoint.locate(str(checkpoints / "iteration-000003"), None) == checkpoints / "iteration-000003"
    with pytest.raises(EngineError, match="no complete checkpoint"):
        checkpoint.locate(str(checkpoints / "best"), None)


def test_unfinished_folders_are_removed_and_former_ones_come_back_where_nothing_took_their_place(tmp_path):
    for name in (
        ".unfinished-best",
        ".former-best",
        ".former-iteration-000001",
        "iteration-000001",
        "iteration-000002",
    ):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / "name").write_text(name)
    checkpoint.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "iteration-000001", "iteration-000002"]
    assert (tmp_path / "best" / "inside" / "name").read_text() == ".former-best"
    assert (tmp_path / "iteration-000001" / "inside" / "name").read_text() == "iteration-000001"


def test_a_folder_is_replaced_also_where_a_killed_process_left_its_former_one(tmp_path):
    for name in ("student", ".former-student", ".unfinished-student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(f"old {name}")
    checkpoint.replace(tmp_path / "student", lambda path: (path / "weights").write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert [path.read_text() for path in (tmp_path / "student").iterdir()] == ["new"]
