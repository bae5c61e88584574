"""The folder of a run: what a finished one holds, and that a stopped one is never half of anything."""

import json
import math
import os
import re

import pytest
import yaml
from PIL import Image

import engine
from engine import load_config
from engine.run_directory import RunDirectory, read_metrics, resolve, write_atomically

LISTED = {
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "samples.png",
    "curves.png",
    "tensorboard",
    "checkpoints",
    "student",
}
SAMPLER = {"steps", "fd", "precision", "recall", "density", "coverage", "class_accuracy", "paired_cosine"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    """A finished run with all that it may write."""
    folder = tmp_path_factory.mktemp("run_directory") / "run"
    config = tiny_config(folder, "logging.tensorboard=true", "iterations=3", "checkpoint.keep=2")
    return engine.distill(config)


def test_a_finished_run_holds_what_is_documented_and_no_leftovers(finished):
    names = {path.name for path in finished.output_dir.iterdir()}
    assert names >= LISTED
    assert names - LISTED == {"teacher_cache"}
    assert list(finished.output_dir.rglob(".*")) == []
    assert list(finished.output_dir.rglob("*.tmp")) == []


def test_summary_has_the_documented_structure_in_strict_json(finished):
    summary = json.loads((finished.output_dir / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == json.loads(json.dumps(finished.metrics))
    for name, steps in (("teacher", 6), ("teacher_few_steps", 3), ("student", 3)):
        assert set(summary[name]) >= SAMPLER
        assert summary[name]["steps"] == steps
        assert all(math.isfinite(summary[name][metric]) for metric in SAMPLER)
    assert summary["teacher"]["paired_cosine"] == pytest.approx(1, abs=1e-6)
    few, teacher, student = (summary[name]["fd"] for name in ("teacher_few_steps", "teacher", "student"))
    assert summary["gap_closed"] == ((few - student) / (few - teacher) if few > teacher else None)
    assert summary["evaluation_samples"] == 100
    assert summary["seed"] == 0
    assert summary["iterations"] == 3
    assert set(summary["passes"]) >= {"teacher", "student_forward", "student_backward"}
    assert set(summary["seconds"]) >= {"rollout", "reward", "update", "evaluation", "total"}
    assert all(value >= 0 for value in summary["seconds"].values())
    parts = sum(value for name, value in summary["seconds"].items() if name != "total")
    assert parts <= summary["seconds"]["total"] * 1.01
    assert set(summary["versions"]) >= {"python", "torch", "deepspeed", "diffusers", "redif-engine"}


def test_metrics_have_one_documented_row_an_iteration_and_add_up_to_the_summary(finished):
    lines = (finished.output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= {
            "reward/mean",
            "ratio/first_pass_error",
            "time/iteration",
            "time/rollout",
            "time/update",
            "passes/teacher",
            "passes/student_forward",
            "passes/student_backward",
        }
        assert all(isinstance(value, (int, float)) for value in row.values())
    summary = finished.metrics
    for name in ("teacher", "student_forward", "student_backward"):
        assert sum(row[f"passes/{name}"] for row in rows) == summary["passes"][name]
    assert summary["ratio_first_pass_error"] == max(row["ratio/first_pass_error"] for row in rows)


def test_the_config_of_a_run_is_what_it_ran_with(finished, tiny_config):
    config = load_config(finished.output_dir / "config.yaml")
    expected = tiny_config(finished.output_dir, "logging.tensorboard=true", "iterations=3", "checkpoint.keep=2")
    assert config == expected


def test_pictures_of_a_run_can_be_opened(finished):
    for name in ("samples.png", "curves.png"):
        with Image.open(finished.output_dir / name) as picture:
            picture.verify()
            assert min(picture.size) > 100


def test_tensorboard_shows_every_metric_of_every_iteration(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.output_dir / "tensorboard"))
    events.Reload()
    rows = read_metrics(finished.output_dir / "metrics.jsonl")
    for name in set().union(*rows) - {"iteration"}:
        expected = [(row["iteration"], row[name]) for row in rows if name in row]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.usefixtures("quick_finish")
def test_tensorboard_is_left_out_when_not_asked_for(tmp_path, tiny_config):
    engine.distill(tiny_config(tmp_path / "run", "logging.tensorboard=false", "iterations=1"))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_resumed_run_shows_each_iteration_once_in_tensorboard(tmp_path, tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path / "run", "logging.tensorboard=true")
    first = RunDirectory(tmp_path / "run", config)
    for iteration in (1, 2, 3):
        first.log({"iteration": iteration, "reward/mean": 0.1 * iteration})
    first.close()
    second = RunDirectory(tmp_path / "run", config, iteration=2)
    second.log({"iteration": 3, "reward/mean": 0.7})
    second.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [(event.step, round(event.value, 3)) for event in events.Scalars("reward/mean")]
    assert shown == [(1, 0.1), (2, 0.2), (3, 0.7)]
    assert [row["reward/mean"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0.1, 0.2, 0.7]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("rest", ["", '{"iteration": 3, "rew', '{"iteration": 3', "\x00\x00\x00", "{"])
def test_a_cut_last_line_of_the_metrics_is_left_out(tmp_path, rest):
    rows = [{"iteration": 1, "reward/mean": 0.5}, {"iteration": 2, "reward/mean": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


def test_metrics_that_are_not_there_are_none(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_logged_rows_are_on_disk_at_once(tmp_path, tiny_config):
    run = RunDirectory(tmp_path / "run", tiny_config(tmp_path / "run"))
    for iteration in (1, 2):
        run.log({"iteration": iteration, "reward/mean": 0.5})
        assert [row["iteration"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == iteration


def test_a_write_that_is_cut_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def cut(source, target):
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_new_run_starts_with_no_rows(tmp_path, tiny_config):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"iteration": 1}\n')
    assert RunDirectory(tmp_path / "run", tiny_config(tmp_path / "run"), iteration=0).metrics == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


# ---------------------------------------------------------------------- where a run goes


def test_without_output_dir_a_run_gets_a_new_folder_below_runs(tmp_path, monkeypatch, tiny_config):
    monkeypatch.chdir(tmp_path)
    config = load_config(tiny_config("x"), ["output_dir=null", "seed=4"])
    assert re.fullmatch(r"runs/\d{8}-\d{6}-grpo-seed4-\d+", str(resolve(config, None)))
    assert list(tmp_path.iterdir()) == []


def test_without_output_dir_a_resumed_run_goes_on_where_it_was(finished, tiny_config):
    config = load_config(tiny_config("x"), ["output_dir=null"])
    newest = finished.output_dir / "checkpoints" / "iteration-000003"
    assert resolve(config, newest) == finished.output_dir


def test_an_empty_folder_is_as_good_as_none(tmp_path, tiny_config):
    (tmp_path / "run").mkdir()
    assert resolve(tiny_config(tmp_path / "run"), None) == tmp_path / "run"
    assert resolve(tiny_config(tmp_path / "new"), None) == tmp_path / "new"


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_only_when_resumed(tmp_path, tiny_config):
    (tmp_path / "run").mkdir()
    config = tiny_config(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    with pytest.raises(engine.EngineError, match="never overwritten"):
        resolve(config, None)
    assert resolve(load_config(config, ["resume=auto"]), None) == tmp_path / "run"
