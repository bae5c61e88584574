"""Pictures of the comparison: samples over the target's density, and the figures over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from .target import Mixture

matplotlib.use("Agg")
from matplotlib import pyplot

EDGE = 48.0


def write_samples(path: Path, target: Mixture, samples: Mapping[str, Tensor]) -> None:
    """One panel for each name: its samples (N, 2) over contours of the target's log-density."""
    axis = torch.linspace(-EDGE, EDGE, 200)
    points = torch.cartesian_prod(axis, axis)
    density = target.log_prob(points).view(200, 200).T
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(3 * columns, 3.2 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, (name, values) in zip(panels.flat, samples.items(), strict=False):
        panel.contour(axis, axis, density.clamp(min=-20), levels=6, linewidths=0.5, cmap="Greys")
        panel.scatter(values[:, 0], values[:, 1], s=0.5, color="tab:blue")
        panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal")
        panel.set_title(name, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]], floors: Mapping[str, float]) -> None:
    """Mean over seeds of both figures over the generator's steps, with their floors."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for panel, key in zip(panels, ("log_density", "log_mmd"), strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            curves = [row["curve"] for row in rows if row["method"] == name]
            steps = [point["step"] for point in curves[0]]
            values = torch.tensor([[point[key] for point in curve] for curve in curves])
            panel.plot(steps, values.mean(0), label=name)
            panel.fill_between(steps, values.amin(0), values.amax(0), alpha=0.15)
        panel.axhline(floors[key], color="black", linewidth=0.8, linestyle="--", label="samples of the target")
        panel.set(
            xlabel="steps of the generator", ylabel={"log_density": "mean log-density", "log_mmd": "log-MMD"}[key]
        )
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
