"""What leaves a run: a student that stock diffusers draws the same images with, and an evaluation of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
import engine.evaluate
import engine.export
from engine.conditions import ConditionPool
from engine.models.pipelines import load_pipeline
from engine.sampling import deterministic_policy, sample
from engine.sources import Classes

pytestmark = pytest.mark.usefixtures("quick_finish")

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
STEPS = 3
POOL = ConditionPool("train", 5, 20, Classes(10), (1, 8, 8))
INDICES = torch.tensor([0, 3, 11, 19])


@pytest.fixture(scope="module")
def result(tmp_path_factory, tiny_config, quick_finish):
    """A finished run whose student has moved; it is read only."""
    config = tiny_config(
        tmp_path_factory.mktemp("export") / "run", "iterations=4", "checkpoint.keep=9", "optimizer.lr=5e-3"
    )
    return engine.distill(config)


@pytest.fixture(scope="module")
def finished(result):
    return result.output_dir


@pytest.fixture
def run(tmp_path, finished):
    """A copy of it, without what is large and not read."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("deepspeed", "teacher_cache"))


def ours(student, guidance: float) -> torch.Tensor:
    policy = deterministic_policy(student, STEPS)
    return sample(student, policy, POOL, INDICES, guidance=guidance, device=CPU)[0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_stock_diffusers_draws_our_images_with_the_student(finished, result, stock_ddim, tiny_teacher, guidance):
    noise, labels = POOL.initial_noise(INDICES), INDICES % 10
    images = ours(result.student, guidance)
    drawn = stock_ddim(finished / "student", noise, labels, STEPS, guidance)
    torch.testing.assert_close(drawn, images, rtol=0, atol=1e-4)
    teachers = stock_ddim(tiny_teacher, noise, labels, STEPS, guidance)
    assert (teachers - images).abs().max() > 0.1, "the student is the teacher, so nothing was shown"


def test_a_student_is_a_pipeline_of_stock_diffusers(finished, result):
    from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

    pipeline = DiffusionPipeline.from_pretrained(finished / "student")
    assert type(pipeline) is DDIMPipeline
    assert type(pipeline.unet) is UNet2DModel
    assert type(pipeline.scheduler) is DDIMScheduler
    student = result.student.network.state_dict()
    assert all(torch.equal(student[name], value) for name, value in pipeline.unet.state_dict().items())


def test_a_student_keeps_the_schedule_of_its_teacher(finished, tiny_teacher):
    from diffusers import DDIMScheduler

    schedulers = [
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler") for folder in (finished / "student", tiny_teacher)
    ]
    assert dict(schedulers[0].config) == dict(schedulers[1].config)


def test_a_student_holds_no_more_than_a_diffusers_directory(finished):
    student = finished / "student"
    files = {str(path.relative_to(student)) for path in student.rglob("*") if path.is_file()}
    assert files == {"model_index.json", "unet/config.json", str(UNET), "scheduler/scheduler_config.json"}


def test_a_student_is_the_teacher_of_the_next_run(tmp_path, tiny_config, finished):
    student = finished / "student"
    config = tiny_config(tmp_path / "next", f"teacher.path={student}", f"student.init={student}", "iterations=1")
    assert engine.distill(config).metrics["iterations"] == 1


# ---------------------------------------------------------------------- python -m engine.export


@pytest.mark.parametrize(("which", "expected"), [("iteration-000002", 2), (None, 4), ("iteration-000004", 4)])
def test_export_takes_the_named_checkpoint_or_the_newest(tmp_path, finished, stock_ddim, which, expected):
    engine.export.export(finished, tmp_path / "out", which)
    weights = load_file(tmp_path / "out" / UNET)
    averaged = load_file(finished / "checkpoints" / f"iteration-{expected:06d}" / "ema.safetensors")
    assert sorted(weights) == sorted(averaged)
    assert all(torch.equal(weights[name], averaged[name]) for name in weights)
    drawn = stock_ddim(tmp_path / "out", POOL.initial_noise(INDICES), INDICES % 10, STEPS, 1.0)
    torch.testing.assert_close(drawn, ours(load_pipeline(tmp_path / "out").denoiser, 1.0), rtol=0, atol=1e-4)


def test_export_takes_the_best_student(tmp_path, finished):
    engine.export.export(finished, tmp_path / "out", "best")
    best = finished / "checkpoints" / "best" / "student"
    assert (tmp_path / "out" / UNET).read_bytes() == (best / UNET).read_bytes()
    load_pipeline(tmp_path / "out")


def test_the_newest_export_is_the_student_of_a_finished_run(tmp_path, finished):
    engine.export.export(finished, tmp_path / "out")
    assert (tmp_path / "out" / UNET).read_bytes() == (finished / "student" / UNET).read_bytes()


def test_a_run_that_was_stopped_can_be_exported(tmp_path, run):
    for name in ("student", "checkpoints/iteration-000004"):
        shutil.rmtree(run / name)
    engine.export.export(run, tmp_path / "out")
    averaged = load_file(run / "checkpoints" / "iteration-000003" / "ema.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in load_file(tmp_path / "out" / UNET).items())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "{new}", "--checkpoint", "iteration-000009"], ("no checkpoint iteration-000009", "000004, best")),
        (["{run}", "{run}/student"], ("{run}/student exists", "name another folder")),
        (["{run}/student", "{new}"], ("{run}/student is not a run directory", "config.yaml")),
    ],
)
def test_an_export_that_cannot_be_made_is_refused(run, tmp_path, arguments, expected):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    places = {"run": run, "new": tmp_path / "new"}
    with pytest.raises(SystemExit) as error:
        engine.export.main([argument.format(**places) for argument in arguments])
    message = str(error.value.code)
    assert message.startswith("error: ")
    assert all(part.format(**places) in message for part in expected), message
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_export_of_a_run_without_checkpoints_says_so(run, tmp_path):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(engine.EngineError, match="no checkpoint yet; it has: none"):
        engine.export.export(run, tmp_path / "new")


def test_the_command_prints_where_the_export_is(run, tmp_path, capsys):
    engine.export.main([str(run), str(tmp_path / "new"), "--checkpoint", "best"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "new")]
    assert (tmp_path / "new" / UNET).is_file()


# ---------------------------------------------------------------------- python -m engine.evaluate


def test_evaluate_sweeps_steps_and_writes_them_once(run, capsys):
    engine.evaluate.main([str(run), "--steps", "2,3,6"])
    path = run / "evaluation.json"
    evaluation = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert str(path) in printed
    lines = [line.split()[:2] for line in printed.splitlines() if line.startswith(("teacher", "student"))]
    pairs = [[name, str(steps)] for steps in (2, 3, 6) for name in ("teacher", "student")]
    assert lines == [["teacher", "6"], *pairs]
    assert [row["steps"] for row in evaluation["by_steps"]] == [2, 3, 6]
    summary = json.loads((run / "summary.json").read_text())
    assert evaluation["teacher"] == summary["teacher"]
    assert evaluation["by_steps"][1]["student"] == summary["student"]
    assert evaluation["by_steps"][1]["teacher"] == summary["teacher_few_steps"]
    assert evaluation["by_steps"][2]["teacher"] == summary["teacher"]
    assert evaluation["evaluation_samples"] == summary["evaluation_samples"]
    written = path.read_bytes()
    with pytest.raises(SystemExit) as error:
        engine.evaluate.main([str(run)])
    assert str(error.value.code) == f"error: {path} exists and is not overwritten; name another file with --output"
    assert path.read_bytes() == written


def test_evaluate_takes_the_steps_of_the_run_and_another_output(run, tmp_path):
    engine.evaluate.main([str(run), "--samples", "120", "--output", str(tmp_path / "mine.json")])
    evaluation = json.loads((tmp_path / "mine.json").read_text())
    assert [row["steps"] for row in evaluation["by_steps"]] == [STEPS]
    assert evaluation["evaluation_samples"] == 120
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "--samples", "5"], "evaluation.samples=5"),
        (["{run}", "--steps", "1001"], "between 1 and 1000"),
        (["{run}/checkpoints"], "is not a finished run"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(run, arguments, expected):
    with pytest.raises(SystemExit) as error:
        engine.evaluate.main([argument.format(run=run) for argument in arguments])
    assert str(error.value.code).startswith("error: ")
    assert expected in str(error.value.code)
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize("steps", ["0", "2,x", ""])
def test_steps_that_are_no_numbers_from_1_are_refused(run, capsys, steps):
    with pytest.raises(SystemExit) as error:
        engine.evaluate.main([str(run), "--steps", steps])
    assert error.value.code == 2
    assert "--steps" in capsys.readouterr().err


# ---------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("kind", ["cps", "flow_sde", "dance_sde"])
def test_a_flow_teacher_is_distilled_and_its_student_draws_alike_in_stock_diffusers(
    tmp_path, tiny_config, tiny_flow_teacher, kind
):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    config = tiny_config(
        tmp_path / "run", f"teacher.path={tiny_flow_teacher}", f"policy.kind={kind}", "policy.eta=0.3", "iterations=1"
    )
    result = engine.distill(config)
    assert result.metrics["student"]["steps"] == STEPS
    assert result.metrics["teacher"]["paired_cosine"] == pytest.approx(1)
    unet = UNet2DModel.from_pretrained(tmp_path / "run" / "student", subfolder="unet").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "run" / "student", subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    x = POOL.initial_noise(INDICES)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(unet(x, timestep, class_labels=INDICES % 10).sample, timestep, x).prev_sample
    torch.testing.assert_close(x, ours(result.student, 1.0), rtol=0, atol=1e-4)
