"""Figures of a run as a table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.record import machine

from . import timing
from .operations import Row

IMPLEMENTATIONS = ("eager", "compile", "ours")
COLORS = {"eager": "#b0b0b0", "compile": "#6699cc", "ours": "#cc6633"}
METHOD = {
    "eager": "bench/kernels/eager.py; an operator is a launch, which reads its inputs and writes its outputs (a lower "
    "bound: group_norm is several launches on a GPU)",
    "compile": "torch.compile of eager; launches and bytes of the CUDA code that Inductor generates for sm_90",
    "ours": "launches, loads and stores of the kernels in Triton's interpreter, at counted_batch samples",
    "bytes_per_element": "per element of a latent, or per reward; a launch reads and writes an address once",
    "requested_bytes": "of ours, with all that a launch reads again and a cache will serve",
    "cold_us": "device time a call, inputs not in the L2 cache; median, spread is [20 %, 80 %]",
    "warm_us": "device time a call, the same inputs over and over",
    "launched_us": "time a call from Python, host work included, L2 cache flushed",
    "bandwidth_share": "bytes_per_element over cold_us, relative to copy_bandwidth; what a backward pass reads again "
    "may come from the L2 cache, and lift it beyond 1",
    "peak_bytes": "allocated at most during a call, beyond its inputs",
}
# column: (key, what it is multiplied by, format)
COLUMNS = {
    "launches": ("launches", 1, ".0f"),
    "bytes/element": ("bytes_per_element", 1, ".1f"),
    "cold us": ("cold_us", 1, ".1f"),
    "% of copy": ("bandwidth_share", 100, ".0f"),
    "warm us": ("warm_us", 1, ".1f"),
    "launched us": ("launched_us", 1, ".1f"),
    "peak MiB": ("peak_bytes", 2**-20, ".1f"),
}
REASONS = ("refused", "not counted", "not measured")


def head(device: str) -> dict[str, Any]:
    """Where, when and of what code the figures are, and how they come about."""
    gpu = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        gpu = {
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "copy_bandwidth": timing.copy_bandwidth(),
        }
    return {"machine": machine(device), "gpu": gpu, "method": METHOD}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned text: a line per row, in each cell eager / compile / ours; then why figures are missing."""
    shown = [
        name for name, (key, *_) in COLUMNS.items() if any(row[i].get(key) for row in rows for i in IMPLEMENTATIONS)
    ]
    lines = [["operation", "latent", "batch", "dtype", *shown]]
    for row in rows:
        cells = [" / ".join(_cell(row[i], name) for i in IMPLEMENTATIONS) for name in shown]
        lines.append([row["operation"], row["latent"], str(row["batch"]), row["dtype"], *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *_notes(rows)])


def _cell(figures: dict[str, Any], column: str) -> str:
    key, factor, form = COLUMNS[column]
    value = figures.get(key)
    return "-" if value is None else format(value * factor, form)


def _notes(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        for name in IMPLEMENTATIONS:
            for reason in REASONS:
                if reason in row[name]:
                    yield f"{Row(*(row[key] for key in Row._fields))}: {name} {reason}: {row[name][reason]}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Times over sizes where they were measured, else bars of the counts."""
    figure = Figure(layout="constrained")
    timed = [row for row in rows if any(row[name].get("cold_us") for name in IMPLEMENTATIONS)]
    if timed:
        _lines(figure, timed)
    else:
        _bars(figure, rows)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=120)


def _lines(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """A panel for each operation and dtype."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["elements"]):
        panels.setdefault((row["operation"], row["dtype"]), []).append(row)
    figure.set_size_inches(9, 2.6 * -(-len(panels) // 2))
    for number, (title, points) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number + 1)
        for name in IMPLEMENTATIONS:
            shown = [row for row in points if row[name].get("cold_us")]
            sizes, times = [row["elements"] for row in shown], [row[name]["cold_us"] for row in shown]
            axes.loglog(sizes, times, marker=".", color=COLORS[name], label=name)
        axes.set_title(", ".join(title), fontsize=9)
        axes.set_xlabel("elements", fontsize=8)
        axes.set_ylabel("cold, microseconds", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def _bars(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """A group of bars for the longest row of each operation and dtype: others hardly differ."""
    longest = {(row["operation"], row["dtype"]): row for row in sorted(rows, key=lambda row: row["elements"])}
    rows = [row for row in rows if row is longest[row["operation"], row["dtype"]]]
    figure.set_size_inches(9, 1 + 0.45 * len(rows))
    labels = [f"{row['operation']}\n{row['latent']} x {row['batch']}, {row['dtype']}" for row in rows]
    for number, key in enumerate(("launches", "bytes_per_element")):
        axes = figure.add_subplot(1, 2, number + 1)
        for i, name in enumerate(IMPLEMENTATIONS):
            values = [row[name].get(key, 0) for row in rows]
            places = [place + 0.27 * (i - 1) for place in range(len(rows))]
            bars = axes.barh(places, values, height=0.25, color=COLORS[name], label=name)
            axes.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=6, padding=2)
        axes.set_title(key.replace("_", " "), fontsize=9)
        axes.set_yticks(range(len(rows)), labels if number == 0 else [""] * len(rows), fontsize=7)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
