"""A run that was stopped anywhere and resumed is the run that was never stopped, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine import checkpoint
from engine.run_directory import RunDirectory, read_metrics
from engine.trainer import Trainer

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    """Ends a process at one place, as far as nothing in the engine catches it."""


pytestmark = pytest.mark.usefixtures("quick_finish")

CLOCKS = ("time/",)
CACHE = ("passes/teacher", "passes/evaluation")
"""What the teacher drew: nothing again where a stopped run left its targets, everything where it did not."""


def rows(folder: Path, *, without: tuple[str, ...] = (*CLOCKS, *CACHE)) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith(without)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_equal(first, second, where: str = "") -> None:
    """Equal trees of tensors and plain values."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for place, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}/{place}")
    elif isinstance(first, (int, float, str, bool, type(None))):
        assert first == second, where


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a folder, by file."""
    found = {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    assert found, f"{folder} holds no tensors"
    return found


def assert_same_run(first: Path, second: Path) -> None:
    """Equal metrics, student, best student, and state to go on from; the checkpoints may be of different age."""
    assert rows(first) == rows(second)
    best = [folder / "checkpoints" / "best" for folder in (first, second)]
    assert json.loads((best[0] / "best.json").read_text()) == json.loads((best[1] / "best.json").read_text())
    assert_equal(*(weights(folder / "student") for folder in (first, second)), "student")
    assert_equal(*(weights(folder / "student") for folder in best), "best")
    newest = [checkpoint.existing(folder / "checkpoints")[-1] for folder in (first, second)]
    assert newest[0].name == newest[1].name
    assert_equal(*(weights(folder) for folder in newest), "checkpoint")
    states = sorted(path.name for path in (newest[0] / "deepspeed").iterdir())
    assert states == sorted(path.name for path in (newest[1] / "deepspeed").iterdir())
    for file in states:
        pair = [torch.load(folder / "deepspeed" / file, weights_only=False) for folder in newest]
        for state in pair:
            state.pop("ds_config", None)
        assert_equal(*pair, file)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    for summary in summaries:
        summary["passes"] = {name: count for name, count in summary["passes"].items() if f"passes/{name}" not in CACHE}
    for key in ("student", "teacher", "best", "iterations", "passes", "ratio_first_pass_error", "gap_closed"):
        assert summaries[0][key] == summaries[1][key], key


def assert_best_is(run: Path, iteration: int) -> None:
    best = load_file(run / "checkpoints" / "best" / "student" / UNET)
    assert_equal(best, load_file(run / "checkpoints" / checkpoint.NAME.format(iteration) / "ema.safetensors"))


def stop_after(monkeypatch, iteration: int) -> None:
    """Kill the process when the metrics of an iteration are on disk and its checkpoint is not."""
    usual = RunDirectory.log

    def log(self, row):
        usual(self, row)
        if row["iteration"] == iteration:
            raise Killed

    monkeypatch.setattr(RunDirectory, "log", log)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config, quick_finish) -> Path:
    """Four iterations that nothing interrupted."""
    return engine.distill(tiny_config(tmp_path_factory.mktemp("whole") / "run", "iterations=4")).output_dir


@pytest.fixture(scope="module")
def rising(tmp_path_factory, tiny_config, quick_finish) -> Path:
    """The same, but each iteration is the best one so far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate_held_out", held_out(0.1, 0.2, 0.3, 0.4))
        return engine.distill(tiny_config(tmp_path_factory.mktemp("rising") / "run", "iterations=4")).output_dir


def held_out(*rewards: float):
    return lambda self: {"reward/held_out_eta0": rewards[self.iteration - 1]}


@pytest.fixture
def held_out_rewards(monkeypatch):
    """`held_out_rewards(...)`: what the held-out conditions say of iterations 1, 2, ..."""
    return lambda *rewards: monkeypatch.setattr(Trainer, "evaluate_held_out", held_out(*rewards))


# ---------------------------------------------------------------------- exact resume

VARIANTS = {
    "grpo with accumulation": ["train.micro_batch=6"],
    "ppo": ["objective.kind=ppo", "objective.baseline_decay=0.7"],
    "the reference, a moving window and a falling rate": [
        "objective.kl_coef=0.1",
        "policy.window=1",
        "optimizer.schedule=cosine",
        "rollout.pairing=prompt",
        "train.inner_epochs=2",
    ],
    "ZeRO stage 2": ["zero.stage=2"],
    "8-bit optimizer states": ["optimizer.kind=adamw8bit"],
    "bf16 with fp32 weights": ["precision=bf16", "zero.stage=1", "train.ratio_tolerance=0.05"],
    "adapters": ["lora.rank=2", "lora.target=.*time_emb_proj", "objective.kl_coef=0.1"],
    "a part of the weights": ["student.trainable=up_blocks", "zero.stage=2"],
    "a cloned student of another architecture": [
        "student.architecture={layers_per_block: 2}",
        "cloning.iterations=3",
        "objective.kl_coef=0.1",
    ],
    "standardised terms and overlapping parts": [
        "reward.terms={feature: 1, pixel: 1}",
        "reward.standardize=true",
        "rollout.chunks=2",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, tiny_config, monkeypatch, variant):
    overrides = ["iterations=4", "checkpoint.every=2", *VARIANTS[variant]]
    engine.distill(tiny_config(tmp_path / "whole", *overrides))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            engine.distill(tiny_config(tmp_path / "stopped", *overrides))
    assert [row["iteration"] for row in rows(tmp_path / "stopped")] == [1, 2, 3]
    assert [path.name for path in checkpoint.existing(tmp_path / "stopped" / "checkpoints")] == ["iteration-000002"]
    engine.distill(tiny_config(tmp_path / "stopped", *overrides, "resume=auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_finished_run_goes_on_to_more_iterations_as_if_it_had_been_asked_for_them(tmp_path, tiny_config, whole):
    engine.distill(tiny_config(tmp_path / "run", "iterations=2"))
    before = load_file(tmp_path / "run" / "student" / UNET)
    result = engine.distill(tiny_config(tmp_path / "run", "iterations=4", "resume=auto"))
    assert_same_run(whole, tmp_path / "run")
    assert rows(whole, without=CLOCKS) == rows(tmp_path / "run", without=CLOCKS)
    student = dict(result.student.network.state_dict())
    exported = load_file(tmp_path / "run" / "student" / UNET)
    assert all(torch.equal(student[name], value) for name, value in exported.items())
    assert any(not torch.equal(before[name], value) for name, value in exported.items())


def test_resume_auto_starts_afresh_in_a_new_folder(tmp_path, tiny_config, whole):
    engine.distill(tiny_config(tmp_path / "run", "iterations=4", "resume=auto"))
    assert_same_run(whole, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing_but_its_clocks(tmp_path, tiny_config, whole):
    shutil.copytree(whole, tmp_path / "run")
    engine.distill(tiny_config(tmp_path / "run", "iterations=4", "resume=auto"))
    assert_same_run(whole, tmp_path / "run")
    assert names(tmp_path / "run") == names(whole)


@pytest.mark.parametrize("origin", ["run", "run/checkpoints/iteration-000002"])
def test_a_run_is_continued_in_a_new_folder_and_stays_as_it_was(tmp_path, tiny_config, whole, origin):
    engine.distill(tiny_config(tmp_path / "run", "iterations=2"))
    before = contents(tmp_path / "run")
    engine.distill(tiny_config(tmp_path / "new", "iterations=4", f"resume={tmp_path / origin}"))
    assert contents(tmp_path / "run") == before
    assert_same_run(whole, tmp_path / "new")


def test_the_best_student_comes_along_to_a_new_folder(tmp_path, tiny_config, held_out_rewards):
    held_out_rewards(0.9, 0.5, 0.4, 0.6)
    engine.distill(tiny_config(tmp_path / "run", "iterations=2"))
    engine.distill(tiny_config(tmp_path / "new", "iterations=4", f"resume={tmp_path / 'run'}"))
    best = tmp_path / "new" / "checkpoints" / "best"
    assert contents(best) == contents(tmp_path / "run" / "checkpoints" / "best")
    assert json.loads((best / "best.json").read_text()) == {"iteration": 1, "reward": 0.9}


def test_a_best_student_that_was_overwritten_is_not_claimed(tmp_path, tiny_config, held_out_rewards):
    """A later iteration took its place on disk: the run from an earlier checkpoint has the best of what it sees."""
    held_out_rewards(0.5, 0.4, 0.9, 0.3)
    engine.distill(tiny_config(tmp_path / "run", "iterations=3", "checkpoint.keep=9"))
    origin = tmp_path / "run" / "checkpoints" / "iteration-000002"
    held_out_rewards(0.5, 0.4, 0.2, 0.3)
    summary = engine.distill(tiny_config(tmp_path / "new", "iterations=4", f"resume={origin}")).metrics
    assert summary["best"] == {"iteration": 4, "reward": 0.3}
    best = tmp_path / "new" / "checkpoints" / "best"
    assert json.loads((best / "best.json").read_text()) == summary["best"]
    assert_best_is(tmp_path / "new", 4)


def test_resuming_drops_the_rows_beyond_the_checkpoint_and_a_cut_last_line(tmp_path, tiny_config, whole, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iteration-000004")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "reward/me')
    stop_after(monkeypatch, 4)
    with pytest.raises(Killed):
        engine.distill(tiny_config(tmp_path / "run", "iterations=5", "resume=auto"))
    assert rows(tmp_path / "run") == rows(whole)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["iteration"] for line in text.splitlines()] == [1, 2, 3, 4]


# ---------------------------------------------------------------------- killed at the worst moment


def killed_in_the_middle_of_a_checkpoint(monkeypatch):
    usual = Trainer.save

    def save(self, folder, fingerprint):
        usual(self, folder, fingerprint)
        if self.iteration == 3:
            (folder / "trainer.json").unlink()
            file = folder / "ema.safetensors"
            file.write_bytes(file.read_bytes()[:1000])
            raise Killed

    monkeypatch.setattr(Trainer, "save", save)


def killed_at_rename(monkeypatch, source: str, target: str, *, count: int, after: bool = False) -> None:
    """Kill the process at the count-th renaming of a folder to another, before or after it."""
    usual, seen = Path.rename, []

    def rename(self, other):
        match = self.name == source and other.name == target
        seen.extend([1] * match)
        stop = match and len(seen) == count
        if stop and not after:
            raise Killed
        result = usual(self, other)
        if stop:
            raise Killed
        return result

    monkeypatch.setattr(Path, "rename", rename)


KILLS = {
    "in the middle of a checkpoint": (killed_in_the_middle_of_a_checkpoint, {}),
    "before a checkpoint gets its name": (
        killed_at_rename,
        {"source": ".unfinished-iteration-000003", "target": "iteration-000003", "count": 1},
    ),
    "before the first checkpoint gets its name": (
        killed_at_rename,
        {"source": ".unfinished-iteration-000001", "target": "iteration-000001", "count": 1},
    ),
    "before the best student is moved aside": (
        killed_at_rename,
        {"source": "best", "target": ".former-best", "count": 1},
    ),
    "between the two renamings of the best student": (
        killed_at_rename,
        {"source": "best", "target": ".former-best", "count": 1, "after": True},
    ),
    "before the former best student is removed": (
        killed_at_rename,
        {"source": ".unfinished-best", "target": "best", "count": 2, "after": True},
    ),
    "before the student gets its name": (
        killed_at_rename,
        {"source": ".unfinished-student", "target": "student", "count": 1},
    ),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_at_any_moment_goes_on_and_ends_bit_equal(
    tmp_path, tiny_config, monkeypatch, held_out_rewards, rising, moment
):
    held_out_rewards(0.1, 0.2, 0.3, 0.4)
    kill, arguments = KILLS[moment]
    with monkeypatch.context() as patch:
        kill(patch, **arguments)
        with pytest.raises(Killed):
            engine.distill(tiny_config(tmp_path / "run", "iterations=4"))
    engine.distill(tiny_config(tmp_path / "run", "iterations=4", "resume=auto"))
    assert_same_run(rising, tmp_path / "run")
    assert names(tmp_path / "run") == ["best", "iteration-000003", "iteration-000004"]
    assert [path.name for path in (tmp_path / "run").iterdir() if "unfinished" in path.name] == []


def test_a_half_written_checkpoint_is_never_resumed_from(tmp_path, tiny_config, monkeypatch):
    with monkeypatch.context() as patch:
        killed_in_the_middle_of_a_checkpoint(patch)
        with pytest.raises(Killed):
            engine.distill(tiny_config(tmp_path / "run", "iterations=4"))
    assert names(tmp_path / "run") == [".unfinished-iteration-000003", "best", "iteration-000001", "iteration-000002"]
    assert checkpoint.locate("auto", tmp_path / "run").name == "iteration-000002"
    assert checkpoint.locate(str(tmp_path / "run"), None).name == "iteration-000002"


KILLER = """
import os, signal, sys
import engine
from engine.trainer import Trainer

usual = Trainer.save

def save(self, folder, fingerprint):
    usual(self, folder, fingerprint)
    if self.iteration == 3:
        os.truncate(folder / "ema.safetensors", 1000)
        os.kill(os.getpid(), signal.SIGKILL)

Trainer.save = save
engine.distill(sys.argv[1])
"""


def test_a_process_killed_in_the_middle_of_a_checkpoint_goes_on_from_the_one_before(tmp_path, tiny_config, whole):
    import yaml

    config = tiny_config(tmp_path / "run", "iterations=4")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_PORT")}
    result = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path / "config.yaml"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert names(tmp_path / "run") == [".unfinished-iteration-000003", "best", "iteration-000001", "iteration-000002"]
    engine.distill(tiny_config(tmp_path / "run", "iterations=4", "resume=auto"))
    assert names(tmp_path / "run") == names(whole)
    assert_same_run(whole, tmp_path / "run")
