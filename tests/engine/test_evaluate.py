"""Rows of an evaluation: which images are drawn, kept and compared, and what is measured on them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import engine.evaluate
from engine import EngineError, load_config, ranks
from engine.dpm import dpm_sample, dpm_scheduler
from engine.evaluate import Evaluator
from engine.evaluation_checks import check_evaluation
from engine.image_store import to_uint8
from engine.metrics import diversity, kernel_distance, paired_cosine, psnr
from engine.models.loading import fingerprint
from engine.roles import load_teacher
from engine.sampling import deterministic_policy, sample
from engine.sources import encode_prompts, load_sources

CPU = torch.device("cpu")
WORDS = ("a red cat", "the blue dog", "a house on the tree", "two cats", "a photo of the dog", "the green house")
SAMPLES = 100
STEPS, FEW = 3, 2
KEYS = (
    "steps",
    "eta",
    "guidance",
    "fd",
    "precision",
    "recall",
    "density",
    "coverage",
    "class_accuracy",
    "paired_cosine",
)

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{words} {i}" for i in range(20) for words in WORDS))
    return path


@pytest.fixture
def start(tiny_pipeline, prompts, tmp_path):
    """`start("key=value", ...)`: the evaluator of a tiny Stable Diffusion, or another family's."""

    def make(*overrides: str, family: str = "sd") -> Evaluator:
        ranks.start(1)
        text = [] if family == "dit" else [f"prompts.path={prompts}", "prompts.held_out=0.6"]
        settings = [
            f"teacher.path={tiny_pipeline(family)}", "teacher.resolution=[16, 16]", f"teacher.steps={STEPS}",
            "teacher.guidance=2", "train.threads=1", f"student.steps={FEW}", f"evaluation.samples={SAMPLES}",
            "rollout.batch_size=32",
            f"policy.kind={'cps' if family in ('sd3', 'flux') else 'ddim'}", f"prompts.cache={tmp_path / 'prompts'}",
        ]  # fmt: skip
        config = load_config({}, [*settings, *text, *overrides])
        pipeline = load_teacher(config)
        sources = load_sources(config, pipeline, tmp_path)
        encode_prompts(config, sources, pipeline)
        check_evaluation(config, pipeline)
        evaluator = Evaluator(config, pipeline, CPU, sources["evaluation"], weights=fingerprint(pipeline.denoiser))
        evaluator.pipeline = pipeline
        return evaluator

    return make


def moved(denoiser, seed: int = 0):
    """A student: the teacher's network, its weights a little elsewhere."""
    network, generator = copy.deepcopy(denoiser.network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return denoiser.with_network(network)


def drawn(evaluator: Evaluator, denoiser, steps: int, *, split: str = "evaluation") -> torch.Tensor:
    """The 8-bit images of a row, drawn by the sampler's functions alone."""
    pool = evaluator._conditions(split, evaluator._pool.source)
    indices = torch.arange(SAMPLES)
    latents, _ = sample(denoiser, deterministic_policy(denoiser, steps), pool, indices, guidance=2, device=CPU)
    return to_uint8(evaluator.pipeline.decode(latents))


def pooled(images: torch.Tensor) -> torch.Tensor:
    return images.double().unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5)).flatten(1) / 255


# ---------------------------------------------------------------------- the figures


@pytest.mark.parametrize("family", ["sd", "sd3", "dit"])
def test_without_encoders_the_figures_are_those_of_pooled_pixels(start, family):
    evaluator = start(family=family)
    teacher = evaluator.pipeline.denoiser
    row = evaluator.row(teacher, FEW, guidance=2.0).metrics
    assert tuple(row)[: len(KEYS)] == KEYS
    ours, full = pooled(drawn(evaluator, teacher, FEW)), pooled(drawn(evaluator, teacher, STEPS))
    real = pooled(drawn(evaluator, teacher, STEPS, split="evaluation reference"))
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (ours, real)]
    # the trace of the root of a product is the sum of the roots of its eigenvalues
    root = np.sqrt(np.maximum(scipy.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    expected = float((ours.mean(0) - real.mean(0)).square().sum()) + np.trace(sum(covariances)) - 2 * root
    assert row["fd"] == pytest.approx(expected, rel=1e-3)
    assert row["kid"] == pytest.approx(kernel_distance(real, ours, subset_size=50).mean, rel=1e-3, abs=1e-6)
    assert row["paired_cosine"] == pytest.approx(paired_cosine(ours, full), rel=1e-5)
    assert row["class_accuracy"] is None
    assert row["encoders"] == {"pixels": {key: row[key] for key in row["encoders"]["pixels"]}}
    assert json.loads(json.dumps(row)) == row


def test_pairs_are_compared_with_the_teacher_s_image_of_the_same_noise(start):
    evaluator = start()
    teacher = evaluator.pipeline.denoiser
    student = moved(teacher)
    row = evaluator.row(student, FEW, guidance=2.0).metrics
    pair = [drawn(evaluator, denoiser, steps) / 255 for denoiser, steps in ((student, FEW), (teacher, STEPS))]
    assert row["paired_psnr"] == pytest.approx(float(psnr(*pair).mean()), rel=1e-3)
    assert 0 < row["paired_ssim"] < 1
    own = evaluator.row(teacher, STEPS, guidance=2.0).metrics
    assert own["paired_cosine"] == pytest.approx(1.0)
    assert "paired_psnr" not in own  # with itself; an infinite figure says nothing


def test_the_dpm_row_is_drawn_by_dpm_solver_from_the_same_noise(start):
    evaluator = start()
    teacher = evaluator.pipeline.denoiser
    row = evaluator.row(teacher, FEW, guidance=2.0, kind="dpmsolver++")
    pool = evaluator._pool
    indices = torch.arange(10)
    latents, _ = dpm_sample(
        teacher, dpm_scheduler(evaluator.pipeline, FEW), pool.initial_noise(indices), pool.condition(indices),
        steps=FEW, guidance=2.0,
    )  # fmt: skip
    expected = evaluator.pipeline.decode(latents) * 2 - 1
    torch.testing.assert_close(row.images, expected, rtol=0, atol=2 / 255)
    assert row.metrics["sampler"] == "dpmsolver++"
    assert evaluator.row(teacher, FEW, guidance=2.0).metrics["sampler"] == "ode"


def test_several_seeds_of_a_prompt_are_its_images_in_turn_and_have_a_diversity(start):
    evaluator = start("evaluation.seeds_per_prompt=4")
    asked = evaluator._pool.asked(torch.arange(SAMPLES))["prompt"]
    assert all(asked[i] == asked[i - i % 4] for i in range(SAMPLES))
    assert len(set(asked)) == 25
    noise = evaluator._pool.initial_noise(torch.arange(8))
    assert len({float(x.sum()) for x in noise}) == 8
    teacher = evaluator.pipeline.denoiser
    row = evaluator.row(teacher, FEW, guidance=2.0).metrics
    features = pooled(drawn(evaluator, teacher, FEW))
    assert row["diversity"] == pytest.approx(diversity(features, 4), rel=1e-2)
    assert "diversity" not in start().row(teacher, FEW, guidance=2.0).metrics


def test_real_images_are_the_reference_when_given(start, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    evaluator = start()
    teacher = evaluator.pipeline.denoiser
    for i, image in enumerate(drawn(evaluator, teacher, FEW)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    row = start(f"evaluation.real_images={folder}").row(teacher, FEW, guidance=2.0).metrics
    assert row["fd"] == pytest.approx(0, abs=1e-6)
    assert (row["precision"], row["recall"], row["coverage"]) == (1, 1, 1)
    assert evaluator.row(teacher, FEW, guidance=2.0).metrics["fd"] > 1e-3


def test_figures_do_not_depend_on_the_batches(start):
    rows = [
        start(f"rollout.batch_size={size}").row(start().pipeline.denoiser, FEW, guidance=2.0).metrics
        for size in (100, 7)
    ]
    for key in ("fd", "kid", "paired_cosine", "paired_psnr", "density"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=0.02, abs=1e-6), key


def test_the_pictures_and_captions_are_of_the_first_conditions(start):
    evaluator = start()
    teacher = evaluator.pipeline.denoiser
    row = evaluator.row(teacher, STEPS, guidance=2.0)
    assert row.images.shape == (10, 3, 16, 16)
    torch.testing.assert_close(row.images, drawn(evaluator, teacher, STEPS)[:10] / 127.5 - 1, rtol=0, atol=2 / 127)
    assert evaluator.captions == evaluator._pool.asked(torch.arange(10))["prompt"]
    assert start(family="dit").captions[3] == "class 3, number 3"


def test_passes_count_every_drawing_once(start):
    evaluator = start()
    teacher, guided = evaluator.pipeline.denoiser, 2
    assert evaluator.passes == SAMPLES * STEPS * guided  # the reference
    evaluator.row(teacher, FEW, guidance=2.0)
    assert evaluator.passes == SAMPLES * (2 * STEPS + FEW) * guided
    evaluator.row(teacher, STEPS, guidance=2.0)
    evaluator.row(teacher, FEW, guidance=2.0)
    assert evaluator.passes == SAMPLES * (2 * STEPS + FEW) * guided
    evaluator.row(teacher, FEW, guidance=1.0)
    evaluator.row(moved(teacher), FEW, guidance=2.0, kind="dpmsolver++")
    assert evaluator.passes == SAMPLES * (2 * STEPS + 2 * FEW) * guided + SAMPLES * FEW


def test_no_more_than_a_batch_of_images_is_in_memory(start, monkeypatch):
    evaluator = start("rollout.batch_size=9")
    sizes, decode = [], type(evaluator.pipeline).decode
    monkeypatch.setattr(
        type(evaluator.pipeline), "decode", lambda self, x, **how: (sizes.append(len(x)), decode(self, x, **how))[1]
    )
    evaluator.row(moved(evaluator.pipeline.denoiser), FEW, guidance=2.0)
    assert max(sizes) == 9
    assert sum(sizes) == 2 * SAMPLES


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_ranks_draw_shares_of_one_size_that_make_up_the_pool(start, monkeypatch, world_size):
    """A network whose weights are partitioned needs all ranks in each of its passes."""
    evaluator = start()
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: world_size)
        shares.append(evaluator._drawing.share(evaluator._pool))
    assert len({len(share) for share in shares}) == 1
    monkeypatch.setattr(ranks, "gather", torch.clone)
    assert torch.equal(evaluator._drawing.gather(evaluator._pool, torch.cat(shares)), torch.arange(SAMPLES))


# ---------------------------------------------------------------------- the store


def images_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.png")}


def test_images_are_written_once_and_read_by_the_next_evaluation(start, tmp_path):
    store = f"evaluation.store={tmp_path / 'store'}"
    first = start(store)
    teacher = first.pipeline.denoiser
    student = moved(teacher)
    rows = [e.row(d, FEW, guidance=2.0).metrics for e in (first,) for d in (teacher, student)]
    kept = images_in(tmp_path / "store")
    assert len(kept) == 4 * SAMPLES  # the reference, the target, and the two rows
    again = start(store)
    assert [again.row(d, FEW, guidance=2.0).metrics for d in (again.pipeline.denoiser, student)] == rows
    assert again.passes == 0
    assert images_in(tmp_path / "store") == kept
    plain = start()
    without = plain.row(plain.pipeline.denoiser, FEW, guidance=2.0).metrics
    assert without == rows[0]  # figures are of the 8-bit images, kept or not


@pytest.mark.parametrize(
    "change",
    ["teacher.guidance=3", "evaluation.seed=5", "prompts.negative=blurry", "evaluation.samples=104", "teacher.steps=4"],
)
def test_images_of_other_settings_are_never_reused(start, tmp_path, change):
    store = f"evaluation.store={tmp_path / 'store'}"
    first = start(store)
    first.row(first.pipeline.denoiser, STEPS, guidance=2.0)
    kept = images_in(tmp_path / "store")
    other = start(store, change)
    config = other.config.teacher
    other.row(other.pipeline.denoiser, config.steps, guidance=config.guidance)
    samples = other.config.evaluation.samples
    assert other.passes == 2 * samples * config.steps * 2
    after = images_in(tmp_path / "store")
    assert len(after) == len(kept) + 2 * samples
    assert {path: after[path] for path in kept} == kept


def test_images_of_other_weights_are_never_reused(start, tmp_path):
    evaluator = start(f"evaluation.store={tmp_path / 'store'}")
    students = [moved(evaluator.pipeline.denoiser, seed) for seed in (0, 1)]
    rows = [evaluator.row(student, FEW, guidance=2.0).metrics["fd"] for student in students]
    assert rows[0] != rows[1]
    named = [evaluator.row(students[0], FEW, guidance=2.0, weights=name).metrics["fd"] for name in ("a", "a", "b")]
    assert named == [rows[0]] * 3
    assert len(images_in(tmp_path / "store")) == (2 + 2 + 2) * SAMPLES


def test_an_incomplete_folder_is_completed_not_trusted(start, tmp_path):
    store = f"evaluation.store={tmp_path / 'store'}"
    first = start(store)
    expected = first.row(first.pipeline.denoiser, FEW, guidance=2.0).metrics
    kept = images_in(tmp_path / "store")
    for number, path in enumerate(sorted(kept)):
        if number % 40 == 0:
            path.unlink() if number % 80 else path.write_bytes(kept[path][:20])
    again = start(store)
    assert again.row(again.pipeline.denoiser, FEW, guidance=2.0).metrics == expected
    assert 0 < again.passes < first.passes
    assert images_in(tmp_path / "store") == kept


def test_without_a_store_nothing_is_left_behind(start, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    evaluator = start()
    evaluator.row(evaluator.pipeline.denoiser, FEW, guidance=2.0)
    assert len(images_in(tmp_path / "temporary")) == SAMPLES  # the teacher's, which pairs are compared with
    del evaluator
    assert list((tmp_path / "temporary").iterdir()) == []


# ---------------------------------------------------------------------- the command


def test_a_finished_text_run_is_evaluated_from_its_directory(start, tmp_path, capsys):
    evaluator = start("evaluation.dpm=true", "evaluation.store=null")
    run, pipeline = tmp_path / "run", evaluator.pipeline
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(evaluator.config.as_dict()))
    student = moved(pipeline.denoiser)
    pipeline.save_student(run / "student", student.network)
    engine.evaluate.main([str(run), "--steps", "1,2"])
    result = json.loads((run / "evaluation.json").read_text())
    assert [entry["steps"] for entry in result["by_steps"]] == [1, 2]
    config, teacher = evaluator.config, pipeline.denoiser
    rows = {
        "student": evaluator.row(student, FEW, guidance=config.student.guidance),
        "teacher": evaluator.row(teacher, FEW, guidance=config.teacher.guidance),
        "teacher_dpm": evaluator.row(teacher, FEW, guidance=config.teacher.guidance, kind="dpmsolver++"),
    }
    for name, row in rows.items():
        assert result["by_steps"][1][name]["fd"] == pytest.approx(row.metrics["fd"], rel=1e-4), name
    assert result["warnings"] == evaluator.warnings


# ---------------------------------------------------------------------- warnings and refusals


def test_too_few_images_are_warned_of(start, capsys):
    evaluator = start()
    assert "figures of 100 images: below 5000 a Frechet distance is mostly bias" in evaluator.warnings[0]
    assert "pixels: 100 images do not span 192 features, so the covariance" in evaluator.warnings[1]
    assert capsys.readouterr().out.count("warning: ") == 2
    evaluator = start("evaluation.samples=200")
    assert len(evaluator.warnings) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.seeds_per_prompt=3", r"evaluation\.seeds_per_prompt=3 does not divide evaluation\.samples=100"),
        ("evaluation.encoders={a: {kind: vgg, path: x}}", r"evaluation\.encoders\.a\.kind"),
        ("evaluation.real_images={tmp}/none", r"none is not a folder; one of PNG or JPEG images is needed"),
        ("evaluation.real_images={tmp}", r"evaluation\.real_images=.* has fewer than 100 PNG and JPEG images"),
        ("evaluation.store={tmp}/file", r"evaluation\.store=.*file is a file; give a folder"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_before_the_run(start, tmp_path, override, expected):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=expected):
        start(override.replace("{tmp}", str(tmp_path)))


@pytest.mark.parametrize(
    "override",
    ["evaluation.encoders={a: {kind: clip, path: x}}", "evaluation.store=x", "evaluation.seeds_per_prompt=2"],
)
def test_what_digits_do_not_read_is_refused(override):
    config = load_config({}, [override])
    with pytest.raises(EngineError, match=r"digits are evaluated by their own encoder against the real digits"):
        check_evaluation(config, load_teacher(config))
