"""docs/results.md from its template and the committed result files.

    python -m bench.results [--check]

The template, docs/results.md.in, is Markdown with placeholders `{{name argument ...}}`; arguments with spaces stand in
quotes, and a FILE is the name of a file in bench/results without `.json`:

    {{table FILE}}                      table of a comparison (engine.compare)
    {{figure FILE METHOD NAME [BUDGET]}}    mean ± deviation of one figure; METHOD may be one of the teacher's rows
    {{gain FILE METHOD OTHER NAME}}     by how many percent METHOD is below OTHER
    {{reached FILE METHOD OTHER}}       how soon METHOD's mean FD is where OTHER's ends; needs compare.every
    {{stability FILE}}                  table of bench.stability
    {{mixture FILE [METHOD NAME]}}      table of bench.mixture, or mean ± deviation of one figure
    {{source FILE}}                     the command, the machine and the versions

What is not there yet reads "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.record import ROOT
from engine.comparing.result import COLUMNS, TEACHERS, markdown
from engine.run_directory import write_atomically

TEMPLATE, PAGE, RESULTS = ROOT / "docs" / "results.md.in", ROOT / "docs" / "results.md", ROOT / "bench" / "results"
MISSING = "not measured"
STABILITY = {
    "last": "FD after the last iteration",
    "lowest": "lowest FD on the way",
    "rise": "rise since",
    "early_stop": "FD at the best held-out reward",
    "early_stop_iteration": "its iteration",
    "training_reward": "reward of the last rollouts",
    "reward": "held-out reward at the end",
}


def page(template: str, results: Path) -> str:
    """The page that a template and the files in a folder give.

    Raises:
        ValueError: a placeholder that is not one of the above, or names what its file has not.
    """

    def fill(match: re.Match) -> str:
        name, *arguments = shlex.split(match[1])
        if name not in PLACEHOLDERS or not arguments:
            raise ValueError(f"{match[0]} is no placeholder; there are {', '.join(PLACEHOLDERS)}, each with a FILE")
        path = results / f"{arguments[0]}.json"
        if not path.is_file():
            return MISSING
        try:
            return PLACEHOLDERS[name](json.loads(path.read_text()), *arguments[1:])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{match[0]} asks for what {path.name} has not: {error}") from None

    return re.sub(r"\{\{(.+?)\}\}", fill, template)


def _figure(result: Mapping[str, Any], method: str, figure: str, budget: str = "1") -> str:
    if method in TEACHERS:
        return f"{result['teacher'][method][figure]:.{COLUMNS[figure][1]}f}"
    row = _row(result, method, float(budget))
    return _spread({"mean": row["mean"][figure], "std": row["std"][figure]}, COLUMNS[figure][1])


def _gain(result: Mapping[str, Any], method: str, other: str, figure: str) -> str:
    ours, theirs = (_row(result, name, 1.0)["mean"][figure] for name in (method, other))
    return f"{(theirs - ours) / theirs:.1%}"


def _reached(result: Mapping[str, Any], method: str, other: str) -> str:
    goal = _row(result, other, 1.0)["mean"]["fd"]
    end = _costs([run["curve"][-1] for run in _runs(result, other)])
    for points in zip(*(run["curve"] for run in _runs(result, method)), strict=True):
        if statistics.mean(point["student"]["fd"] for point in points) <= goal:
            shares = {name: cost / end[name] for name, cost in _costs(points).items()}
            told = ", ".join(f"{share:.1%} of its {name}" for name, share in shares.items())
            return f"after {points[0]['iteration']} iterations, {told}"
    return f"not within {result['methods'][method]['iterations']} iterations"


def _costs(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "generator sample-steps": statistics.mean(point["passes"]["student_backward"] for point in points),
        "operations": statistics.mean(point["flops"] for point in points),
        "seconds": statistics.mean(point["seconds"] for point in points),
    }


def _stability(result: Mapping[str, Any]) -> str:
    places = {"early_stop_iteration": 0, "training_reward": 4, "reward": 4}
    lines = [_line(["", *STABILITY.values()]), "|---" * (len(STABILITY) + 1) + "|"]
    for row in result["stability"]:
        lines.append(_line([row["method"], *(_spread(row[name], places.get(name, 3)) for name in STABILITY)]))
    return "\n".join(lines)


def _mixture(result: Mapping[str, Any], method: str | None = None, name: str | None = None) -> str:
    def figure(row: Mapping[str, Any], name: str) -> str:
        return _spread({"mean": row[name], "std": row[f"{name}_sd"]}, 1 if name == "modes" else 3)

    rows = {row["method"]: row for row in result["summary"]}
    if method is not None:
        return figure(rows[method], name)
    floors = [f"{result['floors'][name]:.3f}" for name in ("log_density", "log_mmd")]
    lines = [_line(["", "mean log-density", "log-MMD", "modes", "seeds", "seconds"]), "|---" * 6 + "|"]
    lines.append(_line(["samples of the target", *floors, "", "", ""]))
    for method, row in rows.items():
        figures = [figure(row, name) for name in ("log_density", "log_mmd", "modes")]
        lines.append(_line([method, *figures, str(len(row["seeds"])), f"{row['seconds']:.0f}"]))
    return "\n".join(lines)


def _source(result: Mapping[str, Any]) -> str:
    result = result.get("machine", result)
    versions = result.get("versions", result)
    cores = f", {result['cores']} cores" if "cores" in result else ""
    return (
        f"`{result['command']}`; {result['date']}, {result['processor']}{cores}, Python {versions['python']}, "
        f"torch {versions['torch']}"
    )


def _row(result: Mapping[str, Any], method: str, budget: float) -> Mapping[str, Any]:
    for row in result["rows"]:
        if (row["method"], row["budget"]) == (method, budget):
            return row
    raise KeyError(f"{method} at budget {budget:g}")


def _runs(result: Mapping[str, Any], method: str) -> list[Mapping[str, Any]]:
    return [run for run in result["runs"] if (run["method"], run["budget"]) == (method, 1.0)]


def _spread(value: Mapping[str, float | None], places: int) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.{places}f}" + ("" if value["std"] is None else f" ± {value['std']:.{places}f}")


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


PLACEHOLDERS: dict[str, Callable[..., str]] = {
    "table": markdown,
    "figure": _figure,
    "gain": _gain,
    "reached": _reached,
    "stability": _stability,
    "mixture": _mixture,
    "source": _source,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not what it should be")
    options = parser.parse_args(arguments)
    text = page(TEMPLATE.read_text(), RESULTS)
    if not options.check:
        write_atomically(PAGE, text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        print(f"{PAGE.name} is not what its template and results give; run python -m bench.results", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
