"""Policy optimisation beyond the default job: reward, held-out reward and distance over the iterations, and cures.

    python -m bench.stability [--json FILE] [--picture FILE] [key=value ...]

Compares the variants of bench/comparisons/stability.yaml; `key=value` as for `python -m engine.compare`. Early stopping
is the iteration with the best reward on held-out conditions, which no update has seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.record import machine, write_json
from engine.compare import RESULT
from engine.comparing.picture import COLORS
from engine.comparing.settings import read
from engine.report import INK, write_figure

VARIANTS = Path(__file__).parent / "comparisons" / "stability.yaml"
PANELS = {"training_reward": "reward of the rollouts", "reward": "reward on held-out conditions", "fd": "FD"}


def value(point: Mapping[str, Any], name: str) -> float | None:
    """A figure of a point of a curve: one of its own, or of the student's evaluation."""
    return point[name] if name in point else point["student"][name]


def summary(curves: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """What the curves say of each method, mean and deviation over seeds.

    Args:
        curves: method -> seed -> points, as `engine.comparing.work.train` gives them.

    Returns:
        Rows of `method`, `seeds` and, each as {"mean", "std"}: `last` (FD after the last iteration), `early_stop` (FD
        at the best held-out reward) and `early_stop_iteration`, `lowest` (the lowest FD on the way), `rise` (last -
        lowest: what was optimised away again), and `training_reward` and `reward` after the last iteration.
    """
    return [
        {"method": method, "seeds": list(by_seed)} | _over([_of(points) for points in by_seed.values()])
        for method, by_seed in curves.items()
    ]


def _of(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    best = max(points, key=lambda point: point["reward"])
    lowest = min(value(point, "fd") for point in points)
    last = points[-1]
    return {
        "last": value(last, "fd"),
        "early_stop": value(best, "fd"),
        "early_stop_iteration": best["iteration"],
        "lowest": lowest,
        "rise": value(last, "fd") - lowest,
        "training_reward": last["training_reward"],
        "reward": last["reward"],
    }


def _over(by_seed: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    made = {}
    for name in by_seed[0]:
        values = [one[name] for one in by_seed]
        made[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
    return made


def picture(path: Path, curves: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> None:
    """Write the three curves of each method: each seed thin, the mean thick."""
    figure = Figure(figsize=(12, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for place, (name, title) in enumerate(PANELS.items()):
        for number, (method, by_seed) in enumerate(curves.items()):
            color = COLORS[number % len(COLORS)]
            lines = [[value(point, name) for point in points] for points in by_seed.values()]
            at = [point["iteration"] for point in next(iter(by_seed.values()))]
            for line in lines:
                axes[place].plot(at, line, color=color, linewidth=0.6, alpha=0.4)
            means = [statistics.mean(column) for column in zip(*lines, strict=True)]
            axes[place].plot(at, means, color=color, linewidth=1.8, label=method)
        axes[place].set_title(title, fontsize=10, color=INK, loc="left")
        axes[place].set_xlabel("iteration", fontsize=9)
        axes[place].grid(alpha=0.25)
        axes[place].spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    write_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--picture", type=Path, help="PNG of the curves")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    folder = read(VARIANTS, options.overrides).output_dir
    # A command of its own: its workers import what starts them, which this module, outside of the package, is not.
    words = ["--config", str(VARIANTS), *options.overrides, f"output_dir={folder}"]
    done = subprocess.run([sys.executable, "-m", "engine.compare", *words], check=False)
    if done.returncode == 2:
        return 2
    result = json.loads((folder / RESULT).read_text())
    curves: dict[str, dict[int, Any]] = {}
    for run in result["runs"]:
        curves.setdefault(run["method"], {})[run["seed"]] = run["curve"]
    record = {**result, **machine("cpu"), "what": "bench.stability", "stability": summary(curves)}
    for row in record["stability"]:
        print(
            f"{row['method']}: FD {row['last']['mean']:.3f} at the end, {row['early_stop']['mean']:.3f} stopped early"
        )
    if options.json is not None:
        write_json(options.json, record)
    if options.picture is not None:
        picture(options.picture, curves)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
