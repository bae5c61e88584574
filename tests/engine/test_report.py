"""Pictures and tables: what they show, and that a broken write leaves the old file in place."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from engine.report import CURVES, markdown_table, summary_table, write_curves, write_samples

METRICS = {"fd": 0.4, "precision": 0.91, "recall": 0.94, "density": 0.9, "coverage": 0.93, "class_accuracy": 0.98}
SUMMARY = {
    "teacher": {"steps": 50, **METRICS, "paired_cosine": 1.0},
    "teacher_few_steps": {"steps": 5, **METRICS, "fd": 0.9212, "paired_cosine": 0.97912},
    "student": {"steps": 5, **METRICS, "fd": 0.45, "paired_cosine": float("nan")},
    "gap_closed": 0.904,
    "evaluation_samples": 2000,
    "passes": {"teacher": 51200, "student_forward": 128000, "student_backward": 128000},
    "seconds": {"rollout": 12.34, "update": 60.0, "total": 1080.5},
}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_show_each_pixel_as_a_block_of_its_exact_colour(tmp_path, channels):
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.rand(4, channels, 8, 8, generator=generator) * 2 - 1 for name in ("teacher", "student")}
    write_samples(tmp_path / "new" / "samples.png", rows, ["0", "1", "2", "3"])
    picture = pixels(tmp_path / "new" / "samples.png")
    shown = {tuple(colour) for colour in picture.reshape(-1, 3)}
    for images in rows.values():
        levels = ((images + 1) / 2 * 255).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).reshape(-1, 3).round().int()
        for level in levels.tolist():
            assert any(max(abs(a - b) for a, b in zip(level, colour, strict=True)) <= 1 for colour in shown)
    assert picture.shape[0] > 2 * 72
    assert picture.shape[1] > 4 * 72


def test_large_samples_are_reduced_and_keep_their_colours(tmp_path):
    rows = {"student": torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 1024, 512)}
    write_samples(tmp_path / "samples.png", rows, ["0", "1", "2", "3"])
    picture = pixels(tmp_path / "samples.png")
    assert 256 < picture.shape[0] < 400
    assert 4 * 128 < picture.shape[1] < 1000
    for level in (0, 85, 170):
        assert (abs(picture - level) <= 1).all(-1).sum() > 256 * 128 * 0.9


def test_samples_beyond_the_range_are_clamped(tmp_path):
    write_samples(tmp_path / "a.png", {"student": torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1)}, ["dark", "bright"])
    write_samples(tmp_path / "b.png", {"student": torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)}, ["dark", "bright"])
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ({}, ["0"], r"at least one row and one column, got 0 and 1"),
        ({"a": torch.zeros(2, 1, 8, 8)}, ["0"], r"must be \(1, 1 or 3, H, W\) for 1 columns"),
        ({"a": torch.zeros(1, 2, 8, 8)}, ["0"], r"1 or 3"),
        ({"a": torch.zeros(1, 1, 8, 8), "b": torch.zeros(1, 3, 8, 8)}, ["0"], r"'b': \(1, 3, 8, 8\)"),
        (
            {"good": torch.zeros(1, 1, 2, 2), "bad": torch.full((1, 1, 2, 2), torch.nan)},
            ["0"],
            r"of bad are not finite",
        ),
    ],
)
def test_samples_that_make_no_grid_are_refused(tmp_path, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        write_samples(tmp_path / "samples.png", rows, columns)
    assert list(tmp_path.iterdir()) == []


def record_of(titles, monkeypatch):
    original = Figure.savefig

    def savefig(figure, *arguments, **options):
        titles.extend(axes.get_title(loc="left") for axes in figure.axes)
        return original(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)


def test_curves_draw_a_panel_for_each_metric_that_is_there(tmp_path, monkeypatch):
    titles = []
    record_of(titles, monkeypatch)
    write_curves(tmp_path / "all.png", [{"iteration": i, **dict.fromkeys(CURVES, 0.5 * i)} for i in range(3)])
    assert titles == list(CURVES)
    titles.clear()
    some = [{"iteration": 0, "reward/mean": 0.1, "loss/kl": None, "grad_norm": float("nan"), "time/total": 3.0}]
    write_curves(tmp_path / "some.png", some)
    assert titles == ["reward/mean"]


def test_curves_survive_zeros_on_the_logarithmic_scale_and_runs_without_metrics(tmp_path):
    write_curves(tmp_path / "zeros.png", [{"iteration": i, "ratio/first_pass_error": 0.0} for i in range(3)])
    write_curves(tmp_path / "empty.png", [])
    assert pixels(tmp_path / "zeros.png").min() < 255
    assert pixels(tmp_path / "empty.png").min() < 255
    with pytest.raises(ValueError, match=r"metrics\[1\] has no 'iteration', only reward/mean"):
        write_curves(tmp_path / "no.png", [{"iteration": 0}, {"reward/mean": 1.0}])


def test_a_write_that_fails_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    write_curves(tmp_path / "curves.png", [])
    before = (tmp_path / "curves.png").read_bytes()

    def savefig(figure, path, **options):
        path.write_bytes(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="disk full"):
        write_curves(tmp_path / "curves.png", [])
    assert (tmp_path / "curves.png").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]


def test_pictures_leave_the_callers_matplotlib_alone(tmp_path):
    before = matplotlib.rcParams["backend"]
    write_curves(tmp_path / "curves.png", [])
    assert matplotlib.rcParams["backend"] == before


def test_summary_table_is_aligned_and_complete():
    text = summary_table(SUMMARY)
    header, rule, *rest = text.splitlines()
    assert " ".join(header.split()) == "steps FD precision recall density coverage class accuracy paired cosine"
    assert set(rule) == {"-"}
    teacher, few, student = rest[:3]
    assert len({len(line) for line in (header, rule, teacher, few, student)}) == 1
    assert few.startswith("teacher, few steps")
    assert few.split()[-8:] == ["5", "0.921", "0.910", "0.940", "0.900", "0.930", "0.980", "0.9791"]
    assert student.split()[-1] == "-"
    assert "gap closed: 90%" in text
    assert "passes: teacher 51,200, student forward 128,000, student backward 128,000" in text
    assert "seconds: rollout 12.3, update 60.0, total 1,080.5" in text


def test_summary_table_shows_the_training_eta_when_it_was_evaluated():
    assert "student, training eta" not in summary_table(SUMMARY)
    assert "student, training eta" in summary_table(SUMMARY | {"student_training_eta": {"steps": 5}})


def test_summary_table_shows_further_figures_and_samplers_where_there_are_some():
    assert "KID" not in summary_table(SUMMARY)
    more = SUMMARY | {
        "teacher_few_steps_dpm": {**SUMMARY["teacher_few_steps"], "kid": 0.01234},
        "student": {**SUMMARY["student"], "kid": 0.5, "clip_score": 0.3},
    }
    header, _, *rows = summary_table(more).splitlines()[:6]
    assert header.split()[-2:] == ["KID", "CLIPScore"]
    assert rows[2].startswith("teacher, DPM-Solver++")
    assert [row.split()[-2:] for row in rows] == [["-", "-"], ["-", "-"], ["0.0123", "-"], ["0.5000", "0.3000"]]


def test_markdown_table_has_the_same_cells():
    lines = markdown_table(SUMMARY).splitlines()
    assert lines[0].startswith("|  | steps | FD |")
    assert lines[1] == "| --- |" + " ---: |" * 8
    assert lines[3] == "| teacher, few steps | 5 | 0.921 | 0.910 | 0.940 | 0.900 | 0.930 | 0.980 | 0.9791 |"
    assert "- gap closed: 90% of the FD between few and many steps" in lines


def test_a_summary_without_models_is_refused():
    with pytest.raises(ValueError, match=r"none of teacher, .*only seconds"):
        summary_table({"seconds": {}})
