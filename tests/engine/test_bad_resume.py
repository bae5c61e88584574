"""Resuming what is not there, is broken or is another experiment is refused, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import engine

pytestmark = pytest.mark.usefixtures("quick_finish")

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config, quick_finish) -> Path:
    """A finished run of two iterations, to be copied before anything is done with it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return engine.distill(tiny_config(folder)).output_dir


@pytest.fixture
def run(tmp_path, finished) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_a_finished_run_is_refused_without_resume(refused, run):
    refused(output_dir=run, says=(f"output_dir={run}", "never overwritten", "resume=auto"))


def test_resume_from_a_run_without_a_checkpoint_is_refused(refused, run):
    shutil.rmtree(run / "checkpoints")
    refused(f"resume={run}", says=(f"resume={run}", "no complete checkpoint", "auto"))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("trainer.json", '{"iteration": 2', "cannot be read"),
        ("trainer.json", "[]", "has no"),
        ("trainer.json", "5", "cannot be read"),
        ("trainer.json", '{"iteration": 2}', "has no best, config"),
        ("trainer.json", "\udcff", "cannot be read"),
        ("ema.safetensors", "cut", "cannot be read"),
        ("grpo.safetensors", "cut", "cannot be read"),
        ("deepspeed/mp_rank_00_model_states.pt", "cut", "cannot be read"),
    ],
)
def test_resume_from_a_corrupt_checkpoint_is_refused_and_another_is_advised(refused, run, file, text, expected):
    checkpoint = run / "checkpoints" / "iteration-000002"
    (checkpoint / file).write_bytes(text.encode(errors="surrogateescape"))
    refused("resume=auto", "iterations=3", output_dir=run, says=(str(checkpoint), expected, "resume from another"))


def test_resume_without_deepspeed_state_is_refused(refused, run):
    shutil.rmtree(run / "checkpoints" / "iteration-000002" / "deepspeed")
    refused(
        "resume=auto",
        "iterations=3",
        output_dir=run,
        says=("iteration-000002", "DeepSpeed state", "resume from another"),
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.kind=ppo"], ("objective.kind was 'grpo' and is 'ppo'",)),
        (["seed=1"], ("seed was 0 and is 1",)),
        (["optimizer.lr=2e-3", "policy.eta=0.25"], ("lr was 0.001 and is 0.002", "policy.eta was 0.5 and is 0.25")),
        (["iterations=1"], ("it is at iteration 2, beyond iterations=1",)),
    ],
)  # fmt: skip
def test_resume_as_another_experiment_is_refused_with_both_values(refused, run, overrides, expected):
    refused(
        "resume=auto",
        *overrides,
        output_dir=run,
        says=("cannot resume", "iteration-000002", "start a new one", *expected),
    )


def test_resume_with_changed_teacher_weights_is_refused(tmp_path, refused, tiny_teacher, tiny_config):
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    engine.distill(tiny_config(tmp_path / "run", f"teacher.path={teacher}", "iterations=1"))
    weights = load_file(teacher / UNET)
    weights["conv_in.bias"][0] += 1e-3
    save_file(weights, teacher / UNET, metadata={"format": "pt"})
    refused(
        f"teacher.path={teacher}",
        "resume=auto",
        output_dir=tmp_path / "run",
        says=("cannot resume", "the teacher's weights have changed"),
    )


def test_resume_in_place_from_an_older_checkpoint_is_refused(refused, run):
    older = run / "checkpoints" / "iteration-000001"
    refused(
        f"resume={older}",
        output_dir=run,
        says=(f"resume={older}", "not the newest", "new output_dir", "iteration-000002"),
    )


def test_resume_of_the_beginning_of_another_run_is_refused(refused, run):
    shutil.rmtree(run / "checkpoints")
    refused(
        "resume=auto",
        "seed=5",
        output_dir=run,
        says=(f"output_dir={run}", "beginning of another run", "seed was 0 and is 5", "new folder"),
    )
