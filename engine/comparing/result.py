"""What a comparison says: means and deviations over seeds, who missed the budget, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TOLERANCE = 0.05
"""Share of the budget that a row may miss it by."""
FIGURES = ("fd", "recall", "precision", "density", "coverage", "class_accuracy", "paired_cosine")
COLUMNS = {
    "fd": ("FD", 3),
    "recall": ("recall", 3),
    "precision": ("precision", 3),
    "density": ("density", 3),
    "coverage": ("coverage", 3),
    "class_accuracy": ("class accuracy", 3),
    "paired_cosine": ("paired cosine", 4),
    "reward": ("reward", 4),
    "tera_flops": ("TFLOP", 2),
    "kilo_passes": ("1000 passes", 0),
    "seconds": ("seconds", 0),
    "peak_gigabytes": ("peak GB", 2),
}
"""Figure -> its column and its decimal places."""
TEACHERS = {
    "teacher": "teacher, {steps} steps",
    "teacher_few_steps": "teacher, {steps} steps",
    "teacher_few_steps_dpm": "teacher, {steps} steps of DPM-Solver++",
}


def figures(run: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of `COLUMNS` of one run, and "reward: TERM" for each term of a reward that has several. A backward
    pass counts as two forward ones."""
    passes = sum(count * (2 if role.endswith("_backward") else 1) for role, count in run["passes"].items())
    return {
        **{name: run["student"][name] for name in FIGURES},
        "reward": run["reward"],
        **{f"reward: {name}": value for name, value in run.get("reward_terms", {}).items()},
        "tera_flops": run["flops"] / 1e12,
        "kilo_passes": passes / 1e3,
        "seconds": run["seconds"],
        "peak_gigabytes": None if run["peak_bytes"] is None else run["peak_bytes"] / 1e9,
    }


def rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and budget, in the order of the runs.

    Args:
        runs: finished ones, each with `method`, `budget`, `seed` and what `comparing.work.train` returns.

    Returns:
        Rows with `method`, `budget`, `seeds`, `iterations`, `mean` and `std` (figure -> value; the deviation is None of
        one seed), and `budget_share`: the operations over those of the first method at that budget, None if it failed.
    """
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["budget"], run["method"]), []).append(run)
    made = [_row(budget, method, group) for (budget, method), group in groups.items()]
    made.sort(key=lambda row: row["budget"])
    return made


def hold_to_budget(table: Iterable[dict[str, Any]], reference: str) -> list[str]:
    """Set `budget_share` of each row: its operations over the reference's at the same budget; None without a reference.

    Returns:
        A warning for each row that is off by more than `TOLERANCE`.
    """
    table = list(table)
    budgets = {row["budget"]: row["mean"]["tera_flops"] for row in table if row["method"] == reference}
    warnings = [f"{reference} has no finished run, so nothing says what the budget is"] if table and not budgets else []
    for row in table:
        budget = budgets.get(row["budget"])
        row["budget_share"] = None if budget is None else row["mean"]["tera_flops"] / budget
        if missed(row):
            fitting = max(1, round(row["iterations"] / row["budget_share"]))
            warnings.append(
                f"{row['method']} took {row['budget_share']:.0%} of {reference}'s operations in {row['iterations']} "
                f"iterations; about {fitting} would meet the budget"
            )
    return warnings


def missed(row: Mapping[str, Any]) -> bool:
    """Whether a row is off the budget."""
    return row["budget_share"] is not None and abs(row["budget_share"] - 1) > TOLERANCE


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a comparison: the teacher's rows, then each method's, mean and deviation over seeds."""
    names = dict.fromkeys(name for row in result["rows"] for name in row["mean"])
    shown = [name for name in names if any(row["mean"][name] is not None for row in result["rows"])]
    lines = ["| | " + " | ".join(_column(name)[0] for name in shown) + " |", "|---|" + "---|" * len(shown)]
    for name, row in result["teacher"].items():
        cells = [_cell(row.get(column), None, column) for column in shown]
        lines.append(f"| {TEACHERS[name].format(steps=row['steps'])} | " + " | ".join(cells) + " |")
    several = len({row["budget"] for row in result["rows"]}) > 1
    for row in result["rows"]:
        label = row["method"] + (f", {row['budget']:g} x" if several else "") + (" (off budget)" if missed(row) else "")
        cells = [_cell(row["mean"][column], row["std"][column], column) for column in shown]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(budget: float, method: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_seed = [figures(run) for run in group]
    return {
        "method": method,
        "budget": budget,
        "seeds": [run["seed"] for run in group],
        "iterations": group[0]["iteration"],
        "mean": {name: _over(statistics.mean, [one[name] for one in by_seed]) for name in by_seed[0]},
        "std": {
            name: _over(statistics.stdev, [one[name] for one in by_seed]) if len(group) > 1 else None
            for name in by_seed[0]
        },
    }


def _column(name: str) -> tuple[str, int]:
    return COLUMNS.get(name, (name, COLUMNS["reward"][1]))


def _over(what: Any, values: Sequence[float | None]) -> float | None:
    return None if None in values else what(values)


def _cell(mean: float | None, deviation: float | None, column: str) -> str:
    if mean is None:
        return "-"
    places = _column(column)[1]
    return f"{mean:,.{places}f}" + ("" if deviation is None else f" ± {deviation:,.{places}f}")
