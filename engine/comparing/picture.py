"""The picture of a comparison: quality by method, and against cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.comparing.result import TEACHERS, figures
from engine.report import INK, write_figure

PANELS = {"fd": "FD (lower is better)", "recall": "recall (higher is better)"}
COSTS = {"tera_flops": "TFLOP of training", "seconds": "seconds of training"}
COLORS = ("#1f5fa8", "#d1662b", "#2f8f57", "#8a4fa3", "#b8a01e", "#c23a4b", "#3aa5b5", "#6b6b6b", "#7a4a21", "#e07fb0")
STYLES = {"teacher": "-", "teacher_few_steps": "--", "teacher_few_steps_dpm": ":"}


def write_picture(path: Path, result: Mapping[str, Any]) -> None:
    """Write quality by method, and FD against cost: operations where there are several budgets, else seconds.

    Every run is a dot, a mean a bar; the budgets of a method are joined.

    Args:
        path: PNG.
        result: the content of compare.json.
    """
    runs = [run | {"shown": figures(run)} for run in result["runs"]]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    budgets = sorted({run["budget"] for run in runs})
    cost = "tera_flops" if len(budgets) > 1 else "seconds"
    panels = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    axes = panels.subplots(1, len(PANELS) + 1)
    for place, name in enumerate((*PANELS, "fd")):
        by_method = place < len(PANELS)
        for number, method in enumerate(methods):
            groups = [[run for run in runs if (run["method"], run["budget"]) == (method, b)] for b in budgets]
            lines = [(number + 0.12 * turn, group) for turn, group in enumerate(groups) if group]
            _draw(axes[place], lines, name, None if by_method else cost, COLORS[number % len(COLORS)], method)
        for teacher in STYLES if result["teacher"] else ():
            row = result["teacher"][teacher]
            label = TEACHERS[teacher].format(steps=row["steps"])
            axes[place].axhline(row[name], color=INK, linewidth=0.9, linestyle=STYLES[teacher], label=label)
        axes[place].set_title(PANELS[name] if by_method else "FD against cost", fontsize=10, color=INK, loc="left")
        if by_method:
            axes[place].set_xticks(range(len(methods)), methods, rotation=40, ha="right")
        else:
            axes[place].set_xlabel(COSTS[cost], fontsize=9)
            axes[place].set_xscale("log" if len(budgets) > 1 else "linear")
        shown = [run["shown"][name] for run in runs]
        if name == "fd" and max(shown) > 10 * min(shown):  # one that failed would hide the others
            axes[place].set_yscale("log")
        axes[place].grid(alpha=0.25)
        axes[place].spines[["top", "right"]].set_visible(False)
        axes[place].tick_params(labelsize=8)
    panels.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    write_figure(panels, path)


def _draw(
    axes: Any,
    groups: Sequence[tuple[float, Sequence[Mapping[str, Any]]]],
    name: str,
    cost: str | None,
    color: str,
    label: str,
) -> None:
    """The runs of a method, one group a budget, at its place or at their cost."""
    means = []
    for place, group in groups:
        at = [place if cost is None else run["shown"][cost] for run in group]
        values = [run["shown"][name] for run in group]
        axes.scatter(at, values, s=16, color=color, alpha=0.55, linewidths=0)
        means.append((statistics.mean(at), statistics.mean(values)))
    line = {"marker": "_", "markersize": 13, "markeredgewidth": 2.2, "linewidth": 1.1}
    axes.plot(*zip(*means, strict=True), color=color, label=label, **line)
