"""What a person sees of a run: the sample grid, the training curves and the table of the end.

Pictures are drawn without pyplot, so nothing here touches the caller's matplotlib backend or open figures, and are
written to a temporary name and renamed: a run that is stopped never leaves half a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

CURVES = (
    "reward/mean",
    "reward/held_out_eta0",
    "evaluation/fd",
    "loss/loss",
    "ratio/first_pass_error",
    "advantage/std",
    "reward/within_group_std",
    "loss/clip_fraction",
    "loss/kl",
    "grad_norm",
)
LOGARITHMIC = {"ratio/first_pass_error": 1e-9}
"""Curves on a logarithmic scale, with the value below which it turns linear: an exact 0 is a good value here."""

SUMMARY_ROWS = {
    "teacher": "teacher",
    "teacher_few_steps": "teacher, few steps",
    "teacher_few_steps_dpm": "teacher, DPM-Solver++",
    "student": "student",
    "student_training_eta": "student, training eta",
}
SUMMARY_COLUMNS = {
    "steps": ("steps", "{:d}"),
    "fd": ("FD", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.3f}"),
    "paired_cosine": ("paired cosine", "{:.4f}"),
}
FURTHER_COLUMNS = {
    "kid": ("KID", "{:.4f}"),
    "clip_score": ("CLIPScore", "{:.4f}"),
    "diversity": ("diversity", "{:.4f}"),
}
"""Shown where a row has them."""

CELL_PIXELS = 72  # small images are enlarged by the least whole factor that reaches this
LARGEST_CELL_PIXELS = 256  # larger images are reduced, or ten columns of them would be a file of 100 MB
GAP_PIXELS = 6
DPI = 100
INK = "#222222"
LINE = "#1f5fa8"


def write_samples(path: str | os.PathLike[str], rows: Mapping[str, Tensor], columns: Sequence[str]) -> None:
    """Writes a labelled grid of images as PNG: a row per model, a column per condition.

    Args:
        path: the file; its folder is made when it is missing.
        rows: label on the left -> images (len(columns), C, H, W) in [-1, 1], C = 1 (gray) or 3 (RGB), one shape for
            all rows. Values beyond [-1, 1] are clamped. Small images are enlarged without smoothing, large reduced.
        columns: the labels on top.

    Raises:
        ValueError: for no rows, shapes that differ or do not fit the columns, or images that are not finite.
    """
    _check_rows(rows, columns)
    strips = [_strip(images) for images in rows.values()]
    gap = np.ones((GAP_PIXELS, *strips[0].shape[1:]))
    grid = np.concatenate([part for strip in strips for part in (gap, strip)][1:])

    height, width = strips[0].shape[0], (strips[0].shape[1] + GAP_PIXELS) // len(columns) - GAP_PIXELS
    figure = Figure(figsize=(grid.shape[1] / DPI, grid.shape[0] / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid, interpolation="nearest", aspect="equal")
    axes.set_xticks([i * (width + GAP_PIXELS) + width / 2 for i in range(len(columns))], columns)
    axes.set_yticks([i * (height + GAP_PIXELS) + height / 2 for i in range(len(rows))], list(rows))
    axes.tick_params(length=0, labelsize=11, labelcolor=INK, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    write_figure(figure, path)


def write_curves(path: str | os.PathLike[str], metrics: Sequence[Mapping[str, float]]) -> None:
    """Writes one panel for each of `CURVES` that the metrics hold, over `iteration`, as PNG.

    Args:
        path: the file; its folder is made when it is missing.
        metrics: one mapping an iteration, as in metrics.jsonl: `iteration` and any of the curves; values that are
            missing, None or not finite are left out. Without any point the picture says so.

    Raises:
        ValueError: when a mapping has no `iteration`.
    """
    for index, row in enumerate(metrics):
        if "iteration" not in row:
            raise ValueError(f"metrics[{index}] has no 'iteration', only {', '.join(row) or 'nothing'}")
    points = {name: [(row["iteration"], row[name]) for row in metrics if _drawable(row.get(name))] for name in CURVES}
    points = {name: line for name, line in points.items() if line}
    columns = max(1, min(3, len(points)))
    lines = max(1, math.ceil(len(points) / columns))
    figure = Figure(figsize=(4.2 * columns, 2.7 * lines), dpi=DPI, layout="constrained")
    if not points:
        figure.text(0.5, 0.5, "no metrics recorded yet", ha="center", va="center", color=INK)
    for index, (name, line) in enumerate(points.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.plot(*zip(*line, strict=True), color=LINE, linewidth=1.3, marker="o" if len(line) <= 30 else None, ms=3)
        if name in LOGARITHMIC:
            axes.set_yscale("symlog", linthresh=LOGARITHMIC[name])
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if index >= len(points) - columns:  # nothing stands below these
            axes.set_xlabel("iteration", fontsize=9)
    write_figure(figure, path)


def summary_table(summary: Mapping) -> str:
    """The table printed at the end of a run, as aligned plain text.

    Args:
        summary: the content of summary.json: metrics under `teacher`, `teacher_few_steps`,
            `student` and optionally `student_training_eta`, then `gap_closed`, `passes` and `seconds`. Whatever is
            missing is shown as "-" or left out.

    Returns:
        Lines without a closing newline.

    Raises:
        ValueError: when the summary holds none of the models.
    """
    return "\n".join([*_aligned(_table(summary)), "", *_notes(summary)])


def steps_table(evaluation: Mapping) -> str:
    """The table printed by `python -m engine.evaluate`: the teacher, then teacher and student at each number of steps.

    Args:
        evaluation: the content of evaluation.json: metrics under `teacher`, and under `teacher` and `student` of each
            of `by_steps`.

    Returns:
        Lines without a closing newline.
    """
    rows = [("teacher", evaluation["teacher"])]
    names = {"teacher": "teacher", "teacher_dpm": SUMMARY_ROWS["teacher_few_steps_dpm"], "student": "student"}
    for entry in evaluation["by_steps"]:
        rows += [(name, entry[key]) for key, name in names.items() if key in entry]
    return "\n".join(_aligned(_cells(rows)))


def markdown_table(summary: Mapping) -> str:
    """The same table as `summary_table`, in Markdown.

    Args:
        summary: as for `summary_table`.

    Returns:
        Lines without a closing newline; the totals follow as a list.

    Raises:
        ValueError: when the summary holds none of the models.
    """
    header, *body = _table(summary)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *body)]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(summary))])


def _check_rows(rows: Mapping[str, Tensor], columns: Sequence[str]) -> None:
    if not rows or not columns:
        raise ValueError(f"a grid needs at least one row and one column, got {len(rows)} and {len(columns)}")
    shapes = {label: tuple(images.shape) for label, images in rows.items()}
    first = next(iter(shapes.values()))
    if len(set(shapes.values())) != 1 or len(first) != 4 or first[0] != len(columns) or first[1] not in (1, 3):
        raise ValueError(f"every row must be ({len(columns)}, 1 or 3, H, W) for {len(columns)} columns, got {shapes}")
    broken = [label for label, images in rows.items() if not bool(images.isfinite().all())]
    if broken:
        raise ValueError(f"images of {', '.join(broken)} are not finite")


def _strip(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> one row (H', W', 3) in [0, 1], enlarged or reduced, white gaps between the images."""
    images = images.detach().to("cpu", torch.float32).clamp(-1, 1)
    if max(images.shape[-2:]) > LARGEST_CELL_PIXELS:
        scale = LARGEST_CELL_PIXELS / max(images.shape[-2:])
        images = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
    factor = max(1, math.ceil(CELL_PIXELS / max(images.shape[-2:])))
    pixels = (images + 1) / 2
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3).permute(0, 2, 3, 1)
    cells = pixels.expand(*pixels.shape[:3], 3).numpy()
    gap = np.ones((cells.shape[1], GAP_PIXELS, 3))
    return np.concatenate([part for cell in cells for part in (gap, cell)][1:], axis=1)


def _drawable(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all; its folder is made when it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.12, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(summary: Mapping) -> list[list[str]]:
    models = [key for key in SUMMARY_ROWS if key in summary]
    if not models:
        raise ValueError(f"the summary has none of {', '.join(SUMMARY_ROWS)}, only {', '.join(summary) or 'nothing'}")
    return _cells([(SUMMARY_ROWS[model], summary[model]) for model in models])


def _cells(rows: Sequence[tuple[str, Mapping]]) -> list[list[str]]:
    further = {key: column for key, column in FURTHER_COLUMNS.items() if any(key in metrics for _, metrics in rows)}
    columns = SUMMARY_COLUMNS | further
    header = ["", *(title for title, _ in columns.values())]
    return [
        header,
        *([name, *(_format(metrics.get(key), form) for key, (_, form) in columns.items())] for name, metrics in rows),
    ]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _notes(summary: Mapping) -> list[str]:
    notes = []
    if "gap_closed" in summary:
        notes.append(f"gap closed: {_format(summary['gap_closed'], '{:.0%}')} of the FD between few and many steps")
    for key, form in (("passes", "{:,.0f}"), ("seconds", "{:,.1f}")):
        if summary.get(key):
            parts = ", ".join(f"{name.replace('_', ' ')} {_format(v, form)}" for name, v in summary[key].items())
            notes.append(f"{key}: {parts}")
    return notes


def _format(value: float | None, form: str) -> str:
    return form.format(value) if _drawable(value) else "-"
