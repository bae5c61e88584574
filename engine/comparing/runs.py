"""The runs of a comparison: finished ones from their files, the others in worker processes, at equal operations."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Any

from tqdm import tqdm

from engine.comparing import work
from engine.comparing.settings import Comparison, Job
from engine.config import Config
from engine.errors import EngineError
from engine.run_directory import write_atomically

FOLDER = "jobs"
MATCHED, ROUNDS = 0.025, 3
"""Share of the budget that matching leaves, and how often it tries."""


class Runs:
    """Runs of one comparison, each in a file below output_dir/jobs; leaving it ends the processes.

    Args:
        comparison: what is asked for.

    Attributes:
        failed: name -> reason.

    Raises:
        EngineError: output_dir holds something else.
    """

    def __init__(self, comparison: Comparison) -> None:
        folder = comparison.output_dir
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / FOLDER).is_dir()):
            raise EngineError(f"output_dir={folder} holds something else and is never overwritten; give a new folder")
        self.comparison = comparison
        self.folder = folder / FOLDER
        self.failed: dict[str, str] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def finished(self, job: Job) -> dict[str, Any] | None:
        """What a job left, or None.

        Raises:
            EngineError: its file is damaged, or of a run that was asked for otherwise.
        """
        path = self.folder / f"{job.name}.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError:
            raise EngineError(f"{path} is damaged; remove it, and the run is made again") from None
        changed = job.differences(record)
        if changed:
            raise EngineError(
                f"output_dir={self.folder.parent} holds {job.name} of another configuration: {'; '.join(changed)}. "
                "Ask for it as it was, or give a new folder"
            )
        return record

    def make(self, jobs: Sequence[Job]) -> None:
        """Run the jobs whose files are missing, or of another number of iterations than matching has found; not those
        that have failed."""
        jobs = [job for job in jobs if job.name not in self.failed]
        records = [self.finished(job) for job in jobs]
        missing = [
            job
            for job, record in zip(jobs, records, strict=True)
            if record is None or record["config"]["iterations"] != job.config.iterations
        ]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.comparison.workers, mp_context=context, initializer=work.start)
        with tqdm(total=len(missing), unit="run", dynamic_ncols=True) as progress:
            submitted = {self._pool.submit(work.run, job): job for job in missing}
            for future in as_completed(submitted):
                progress.write(self._keep(submitted[future], future.exception() or future.result()), file=sys.stderr)
                progress.update()

    def _keep(self, job: Job, outcome: dict[str, Any] | BaseException) -> str:
        """Write what a job gave, and say it."""
        if isinstance(outcome, BaseException):
            text = " ".join(str(outcome).split()) or "no message"
            self.failed[job.name] = text if isinstance(outcome, EngineError) else f"{type(outcome).__name__}: {text}"
            return f"{job.name} failed: {self.failed[job.name]}"
        record = {**job.asked, "config": job.config.as_dict(), **outcome}
        write_atomically(self.folder / f"{job.name}.json", json.dumps(record, indent=1) + "\n")
        if "rows" in outcome:
            return f"{job.name}: FD {outcome['rows']['teacher']['fd']:.3f}"
        return (
            f"{job.name}: FD {outcome['student']['fd']:.3f}, {outcome['flops'] / 1e12:.2f} TFLOP in "
            f"{outcome['iteration']} iterations and {outcome['seconds']:.0f} s"
        )


def match(runs: Runs) -> dict[tuple[str, float], int]:
    """Iterations of each method at each budget, at which its first seed costs what the first method's costs.

    What a run costs is not proportional to its iterations (the teacher's targets are drawn once). Its second half says
    what one more costs, and it is run again with others until it is within `MATCHED` of the budget, `ROUNDS` times at
    most. A method of phases stays as it is. What was found is kept in a file.

    Returns:
        (method, budget) -> iterations.
    """
    comparison, seed = runs.comparison, runs.comparison.settings.seeds[0]
    reference, *others = comparison.methods
    path = runs.folder.parent / "iterations.json"
    known = {(name, budget): count for name, budget, count in json.loads(path.read_text())} if path.is_file() else {}
    # A run that an interrupted search left is where it goes on.
    left = {(job.method, job.budget): runs.finished(job) for job in comparison.jobs({}) if job.config.seed == seed}
    iterations = {key: record["iteration"] for key, record in left.items() if record is not None} | known
    for _ in range(ROUNDS):
        jobs = {(job.method, job.budget): job for job in comparison.jobs(iterations) if job.config.seed == seed}
        runs.make([comparison.teacher, *jobs.values()])
        found = dict(known)
        for (method, budget), job in jobs.items():
            goal, record = runs.finished(jobs[reference, budget]), runs.finished(job)
            if goal is None or record is None or (method, budget) in known:
                continue
            missing, found[method, budget] = goal["flops"] - record["flops"], record["iteration"]
            if method in others and abs(missing) > MATCHED * goal["flops"] and not _phased(job.config):
                iteration, flops = record["halfway"]
                one = (record["flops"] - flops) / (record["iteration"] - iteration)
                found[method, budget] = max(1, round(record["iteration"] + missing / one))
        settled = all(count == iterations.get(key, jobs[key].iterations) for key, count in found.items())
        iterations = found
        if settled:
            break
    write_atomically(path, json.dumps([[*key, count] for key, count in iterations.items()]) + "\n")
    return iterations


def _phased(config: Config) -> bool:
    """Whether the turns of its objectives are one round: phases, to which other iterations would add another."""
    turns = config.objective.turns
    return turns is not None and sum(turns.values()) == config.iterations
