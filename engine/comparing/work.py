"""One run of a comparison, in a process of its own that stays for the next: train, count, evaluate."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from engine import cloning, preflight, ranks
from engine.building import Built, build
from engine.chatter import silence
from engine.comparing.flops import FlopCounter
from engine.comparing.settings import TEACHER, Job
from engine.config import Config
from engine.distillation import student_fingerprint
from engine.drawing import DPM
from engine.evaluate import Evaluator
from engine.machine import forget_peak_memory, peak_memory
from engine.trainer import Trainer

_evaluators: dict[str, Evaluator] = {}
"""Kept in a process: the teacher's images, of tens of steps each, are drawn once."""


def start() -> None:
    """Prepare a process for jobs of one thread."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        os.environ.pop(name, None)  # a launcher's; this process is a group of one
    end_with_parent()
    silence()
    ranks.start(1)


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone: nobody would take the results of its jobs."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def run(job: Job) -> dict[str, Any]:
    """The result of a job, as `teacher_rows` or `train` gives it."""
    return teacher_rows(job.config) if job.method == TEACHER else train(job)


def teacher_rows(config: Config) -> dict[str, Any]:
    """`rows`: the evaluation of the teacher at its own steps and, by two samplers, at the student's."""
    with tempfile.TemporaryDirectory() as folder:
        evaluator = _evaluator(build(config, Path(folder), say=_quiet))
        teacher, guidance = evaluator.teacher, config.teacher.guidance
        rows = {
            "teacher": evaluator.row(teacher, config.teacher.steps, guidance=guidance),
            "teacher_few_steps": evaluator.row(teacher, config.student.steps, guidance=guidance),
            "teacher_few_steps_dpm": evaluator.row(teacher, config.student.steps, guidance=guidance, kind=DPM),
        }
        return {"rows": {name: row.metrics for name, row in rows.items()}}


def train(job: Job) -> dict[str, Any]:
    """Train one student and evaluate the last of its iterations.

    The operations are those of training: student, teacher (its targets are drawn anew in each run), other roles and
    reward, without what only judges.

    Returns:
        `student` (its evaluation), `reward` (of held-out conditions, by the student's own sampler),
        `reward_terms` (each of it, where there are several), `training_reward`
        (of the last rollout, if there is one), `flops`, `passes` (role -> network evaluations of one latent), `seconds`
        (of training), `peak_bytes` (of the process), `iteration`, `halfway` ([iterations, flops] at half of them), and
        `curve`: the same at every job.every iterations.

    Raises:
        EngineError: for what cannot work or must not go on.
    """
    config = job.config
    preflight.check_machine(config)
    gc.collect()  # of the networks of the job before, which hold each other
    with tempfile.TemporaryDirectory() as folder:
        built = build(config, Path(folder), say=_quiet)
        trainer, counter, seconds, curve = built.trainer, FlopCounter(), 0.0, []
        halfway = [0, 0]
        forget_peak_memory()
        started = time.perf_counter()
        if config.cloning.iterations:
            with counter:
                cloning.clone(trainer, built.roles.teacher)
        while trainer.iteration < config.iterations:
            with counter:
                row = trainer.train_iteration()
            if trainer.iteration == config.iterations // 2:
                halfway = [trainer.iteration, counter.total]
            last = trainer.iteration == config.iterations
            if last or (job.every and trainer.iteration % job.every == 0):
                seconds += time.perf_counter() - started
                point = {"iteration": trainer.iteration, "flops": counter.total, "seconds": seconds}
                point |= {"passes": _training_passes(trainer), "peak_bytes": peak_memory()}
                curve.append(point | _judged(built, config) | {"training_reward": row.get("reward/mean")})
                started = time.perf_counter()
    return {**curve[-1], "halfway": halfway, "curve": curve if job.every else []}


def _training_passes(trainer: Trainer) -> dict[str, int]:
    return {role: count for role, count in trainer.account.passes.items() if role != "evaluation"}


def _judged(built: Built, config: Config) -> dict[str, Any]:
    trainer = built.trainer
    total, *terms = trainer.evaluate_held_out().items()
    with trainer.averaged.installed():
        weights = student_fingerprint(trainer) if config.evaluation.store else None
        row = _evaluator(built).student_row(trainer.student, settings=config.student, weights=weights)
    return {
        "student": row.metrics,
        "reward": total[1],
        "reward_terms": {name.rpartition("/")[2]: value for name, value in terms},
    }


def _evaluator(built: Built) -> Evaluator:
    config, roles = built.trainer.config, built.roles
    of = config.model_dump(mode="json", include={"teacher", "prompts", "evaluation", "vae"})
    key = json.dumps([of, config.rollout.batch_size], sort_keys=True)
    if key not in _evaluators:
        _evaluators[key] = Evaluator(
            config, roles.pipeline, ranks.device(), built.sources["evaluation"], weights=roles.weights
        )
    return _evaluators[key]


def _quiet(line: str) -> None:
    """What a network runs on is not said for each of many runs."""
