"""Several methods side by side: the same teacher, prompts and evaluation, and a budget that is measured.

python -m engine.compare [--config FILE] [--quick] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import preflight
from engine.chatter import silence
from engine.comparing.picture import write_picture
from engine.comparing.result import hold_to_budget, markdown, rows
from engine.comparing.runs import Runs, match
from engine.comparing.settings import TEACHER, Comparison, read
from engine.errors import EngineError
from engine.machine import processor
from engine.run_directory import write_atomically

RESULT, TABLE, PICTURE = "compare.json", "compare.md", "compare.png"


def compare(comparison: Comparison, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run what is not there yet, and write the table, the picture and all figures into output_dir.

    Every run is a job in a worker process and leaves one file below `jobs/`; a later call takes what is there and runs
    the rest, and what failed.

    Args:
        comparison: what is asked for.
        command: the words of the command, for the record.

    Returns:
        The content of compare.json: `runs` (one for each method, seed and budget), `rows` (mean and deviation over
        seeds), `teacher`, `methods` (their configurations), `failed` (name -> reason), `warnings`, and what it ran on.

    Raises:
        EngineError: output_dir holds something else, or runs of another configuration.
    """
    with Runs(comparison) as runs:
        for job in (comparison.teacher, *comparison.jobs({})):
            runs.finished(job)  # refuses what was asked for otherwise, before anything runs
        jobs = comparison.jobs(match(runs) if comparison.settings.match else {})
        runs.make([comparison.teacher, *jobs])
        records = {job.name: runs.finished(job) for job in (comparison.teacher, *jobs) if job.name not in runs.failed}
    return _write(comparison, records, runs.failed, command)


def _write(
    comparison: Comparison, records: Mapping[str, dict[str, Any]], failed: Mapping[str, str], command: Sequence[str]
) -> dict[str, Any]:
    folder, reference = comparison.output_dir, next(iter(comparison.methods))
    runs = [record for name, record in records.items() if name != TEACHER]
    table = rows(runs)
    warnings = hold_to_budget(table, reference)
    result = {
        "what": "engine.compare",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m engine.compare", *command]),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "workers": comparison.workers,
        "versions": preflight.versions(),
        "settings": comparison.settings.model_dump(mode="json"),
        "teacher": records[TEACHER]["rows"] if TEACHER in records else {},
        "rows": table,
        "failed": dict(failed),
        "warnings": warnings,
        "methods": {name: config.as_dict() for name, config in comparison.methods.items()},
        "runs": [{key: value for key, value in run.items() if key != "config"} for run in runs],
    }
    write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")
    if runs:
        notes = [f"- {line}" for line in (*warnings, *(f"{name} failed: {why}" for name, why in failed.items()))]
        write_atomically(folder / TABLE, "\n".join([markdown(result), "", *notes]).rstrip() + "\n")
        write_picture(folder / PICTURE, result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m engine.compare`; returns the exit status: 1 where runs failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m engine.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML: a section `compare`, and keys that all methods share")
    quick = "one seed, a quarter of iterations, conditions and critics' warm-up, 1000 images"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as compare.seeds=[0,1] iterations=10")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(words)
    silence()
    try:
        comparison = read(options.config, options.overrides, quick=options.quick)
        print(f"{len(comparison.jobs({}))} runs in {comparison.output_dir}", flush=True)
        result = compare(comparison, words)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result["runs"]:
        print((comparison.output_dir / TABLE).read_text())
    for name, reason in result["failed"].items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    print("  ".join(str(comparison.output_dir / name) for name in (TABLE, PICTURE, RESULT)))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
