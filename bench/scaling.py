"""How an iteration's cost grows: predicted from the costs of its parts, and measured.

    python -m bench.scaling [--json FILE] [--sweep NAME ...]

The prediction is that of docs/scaling.md: the calls of bench/cost_model.py, each at what it costs alone (a network call
on n latents, forward or with its gradient; a reward; the noise of a step; an optimizer step). The parts are timed apart
from any iteration, so what the model leaves out shows as its error. One rank's times are the processor's seconds of one
thread, the least of several, which neighbours lengthen less than a clock's. Two ranks wait for each other, so a clock
times theirs; their collectives are counted, and a byte and a call take what they take in collectives alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter as Tally
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cost_model import Job, as_job, messages, passes, wire_bytes
from bench.profile import make_trainer, phased
from bench.record import ROOT, machine, write_json
from bench.scaling_parts import Parts
from bench.scaling_ranks import rank_job
from bench.watch import Clock, Phases
from engine import Config, load_config
from engine.chatter import silence
from engine.models.digits import TEACHER_DIR
from engine.models.pipelines import load_pipeline
from engine.trainer import Trainer

BASE = ("rollout.conditions=16", "rollout.group_size=8", "student.steps=5", "teacher.steps=20", "train.threads=1")
SMALL = ("rollout.conditions=4", "rollout.group_size=4")
SWEEPS = {
    "batch": [(f"{n} conditions", 8, (f"rollout.conditions={n}",)) for n in (4, 8, 16, 32, 64)],
    "group size": [(f"groups of {n}", 8, (f"rollout.group_size={n}",)) for n in (2, 4, 16)],
    "steps": [(f"{n} steps", 8, (f"student.steps={n}",)) for n in (2, 10, 20)],
    "window": [("noise in all steps", 8, ("policy.window=null",))],
    "teacher": [("targets drawn anew", 8, ("rollout.pool=1024",))],
    "resolution": [(f"{n}x{n} latents", n, (*SMALL, "reward.terms={pixel: 1}")) for n in (8, 16, 32)],
}
"""Sweep -> its points: a name, the latents' side, and what differs from BASE. Targets are cached but where said."""
REPEATS = 3
PHASES = ("teacher", "rollout", "reward", "update")


def point_config(folder: Path, side: int, changes: Sequence[str]) -> Config:
    """The configuration of a point, its targets all cached after one visit unless its pool says otherwise."""
    config = load_config(None, [*BASE, *changes])
    pooled = any(change.startswith("rollout.pool") for change in changes)
    changes = [*changes, *([] if pooled else [f"rollout.pool={config.rollout.conditions}"])]
    if side != 8:
        # weights of another size's network are random, whose ratio may be off by more than the digits'
        changes += [f"teacher.path={resized_teacher(folder, side)}", "train.ratio_tolerance=1"]
    return load_config(None, [*BASE, *changes])


def resized_teacher(folder: Path, side: int) -> Path:
    """The digits' UNet with random weights for latents of another size."""
    directory = folder / f"teacher{side}"
    if not directory.exists():
        pipeline = load_pipeline(TEACHER_DIR)
        network = pipeline.denoiser.network
        pipeline.save_student(directory, type(network).from_config({**network.config, "sample_size": side}))
    return directory


def measure_point(trainer: Trainer) -> dict[str, Any]:
    """Measured and predicted seconds of an iteration: the mean over the first, the middle and the last window."""
    config, cycle = trainer.config, len(trainer.objective.policies)
    teacher_steps = config.teacher.steps if config.rollout.pool > config.rollout.conditions else 0
    trainer.train_iteration()
    places = sorted({0, cycle // 2, cycle - 1})
    jobs = [_job(trainer, place) for place in places]
    measured = [_iteration(trainer, place, job) for place, job in zip(places, jobs, strict=True)]
    parts = Parts(trainer, jobs, time.process_time)
    predicted = [parts.predict(job, teacher_steps) for job in jobs]
    network = [passes(job)["student_forward"] + 2 * passes(job)["student_backward"] for job in jobs]
    return {
        "passes": _mean(network) + config.rollout.conditions * teacher_steps,
        "measured": _total({name: _mean([row[name] for row in measured]) for name in (*PHASES, "other")}),
        "predicted": _total({name: _mean([row[name] for row in predicted]) for name in PHASES}),
        "parts": parts.as_dict(),
    }


def _job(trainer: Trainer, place: int) -> Job:
    noisy = trainer.objective.policies[place].stochastic
    return as_job(trainer.config, prefix=int(noisy.int().argmax()), window=int(noisy.sum()))


def _iteration(trainer: Trainer, place: int, job: Job) -> dict[str, float]:
    """Processor seconds by phase of the fastest of several iterations with the same window."""
    fastest = None
    for repeat in range(1, REPEATS + 1):
        trainer.iteration = place + repeat * len(trainer.objective.policies)
        clock = Clock(lambda: None, time.process_time)
        phases = Phases(clock)
        with phased(trainer, phases, Tally()):
            row = trainer.train_iteration()
        clock(phases.current, phases.current)
        counted = {role: row[f"passes/{role}"] for role in ("student_forward", "student_backward")}
        if counted != passes(job):
            raise AssertionError(f"{counted} passes were counted and {passes(job)} predicted")
        if fastest is None or sum(clock.seconds.values()) < sum(fastest.values()):
            fastest = clock.seconds
    apart = {phase: fastest[phase] for phase in ("teacher", "rollout", "reward", "other")}
    return apart | {"update": sum(fastest.values()) - sum(apart.values())}


def _total(phases: dict[str, float]) -> dict[str, float]:
    return {"iteration": sum(phases.values()), **phases}


def sweep(names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """A row for every point."""
    rows = []
    for name in names:
        for point, side, changes in SWEEPS[name]:
            trainer = make_trainer(point_config(folder, side, changes), folder / f"cache{len(rows)}")
            rows.append({"sweep": name, "point": point, **measure_point(trainer)})
            print(line(f"{name}: {point}", rows[-1]), flush=True)
    return rows


def measure_ranks(folder: Path) -> dict[str, Any]:
    """Two ranks by the launcher (see scaling_ranks.py), and what the model says of them."""
    file = folder / "ranks.json"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [*launcher, "--master_port", port, "--module", "bench.scaling_ranks", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    result = json.loads(file.read_text())
    for row in result["rows"]:
        row |= predict_ranks(row, result["links"], result["ranks"])
        print(line(f"2 ranks: stage {row['stage']}, {row['micro_batches']} micro-batches", row), flush=True)
    return result


def predict_ranks(row: dict[str, Any], links: dict[str, float], ranks: int) -> dict[str, Any]:
    """Seconds and payloads of a row of scaling_ranks.py by the model.

    The number of calls is the measured one: it depends on how a network's tensors fill DeepSpeed's buckets.
    """
    job = rank_job(row["stage"], row["micro_batches"], ranks)
    talk = messages(job, row["parameters"])
    whole = row["parameters"] * 4
    bandwidth = whole * 2 * (ranks - 1) / ranks / (links["weights"] - links["allreduce"])
    gathers = {"reward", "update", "other"}  # figures of all ranks: pickled objects, two calls each
    calls = sum(part["calls"] * links[part["name"]] for part in row["collectives"] if part["phase"] not in gathers)
    objects = sum(part["calls"] for part in row["collectives"] if part["phase"] in gathers) / 2
    compute = row["compute"]
    sent = sum(wire_bytes(message, ranks) for message in talk) / bandwidth
    waiting = calls + objects * links["figures"]
    return {
        "measured": {"iteration": row.pop("seconds")},
        "predicted": {"iteration": compute + sent + waiting, "compute": compute, "bytes": sent, "calls": waiting},
        "payloads": [
            {
                "phase": message.phase,
                "name": message.name,
                "predicted": message.payload,
                "measured": sum(
                    part["payload"]
                    for part in row["collectives"]
                    if (part["phase"], part["name"]) == (message.phase, message.name)
                ),
            }
            for message in talk
        ],
    }


def line(name: str, row: dict[str, Any]) -> str:
    """Name, measured and predicted milliseconds, and the model's error."""
    measured, predicted = (row[key]["iteration"] for key in ("measured", "predicted"))
    return f"{name:38}{measured * 1e3:10.1f}{predicted * 1e3:10.1f}{predicted / measured - 1:+9.0%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with --json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--sweep", nargs="+", choices=[*SWEEPS, "ranks"], default=[*SWEEPS, "ranks"])
    options = parser.parse_args(arguments)
    silence()
    print(f"{'milliseconds of an iteration':38}{'measured':>10}{'predicted':>10}{'error':>9}")
    with tempfile.TemporaryDirectory() as folder:
        result = {"rows": sweep([name for name in options.sweep if name != "ranks"], Path(folder))}
        if "ranks" in options.sweep:
            result["ranks"] = measure_ranks(Path(folder))
    if options.json:
        write_json(options.json, {"machine": machine("cpu") | {"threads": torch.get_num_threads()}, **result})


if __name__ == "__main__":
    main()
