"""The main job: a configuration in, a finished run directory out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine import checkpoint, cloning, preflight, ranks, report
from engine.building import build
from engine.conditions import Source
from engine.config import Config, load_config
from engine.drawing import DPM
from engine.errors import EngineError
from engine.evaluate import Evaluator, gap_closed
from engine.models.denoiser import Denoiser
from engine.models.loading import fingerprint
from engine.plan import plan
from engine.roles import Roles, load_exported, load_student, save_student
from engine.run_directory import RunDirectory, resolve, write_atomically
from engine.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        student: the averaged student of the last iteration, loaded from `student/` of the run directory.
        metrics: the content of `summary.json`; None on ranks other than the first.
        output_dir: the run directory.
    """

    student: Denoiser
    metrics: dict[str, Any] | None
    output_dir: Path


def distill(config: str | Path | Mapping[str, Any] | Config | None = None) -> Result:
    """Distill a many-step teacher into a few-step student by policy optimisation (ReDiF, arXiv 2512.22802).

    Args:
        config: path of a YAML file, a mapping, a `Config`, or None for the embedded digits.

    Returns:
        Result with the student, the evaluation and the run directory.

    Raises:
        EngineError: for bad input, before anything is written, and for a run that must not go on (a ratio that is not 1
            before the first update, a reward or loss that is not finite).
    """
    config = load_config(config)
    started = time.perf_counter()
    ranks.start(config.train.threads)
    origin = checkpoint.locate(config.resume, None if config.output_dir is None else Path(config.output_dir))
    folder = Path(ranks.broadcast(str(resolve(config, origin))))
    preflight.check_machine(config)
    _plan_memory(config)
    built = build(config, folder, origin=origin, say=_say)
    trainer, roles, sources = built.trainer, built.roles, built.sources
    run = None
    if ranks.is_first():
        run = RunDirectory(
            folder, config, iteration=trainer.iteration, origin=None if origin is None else origin.parent.parent
        )
        checkpoint.remove_unfinished(folder / "checkpoints")
        _say(f"run directory: {folder}")
    ranks.barrier()
    if origin is not None and not checkpoint.carry_best(origin.parent, folder / "checkpoints", trainer.best):
        trainer.forget_best()
    if config.cloning.iterations and trainer.iteration == 0:
        losses = cloning.clone(trainer, roles.teacher)
        _say(f"cloning: loss {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps")
    trainer.account.seconds["total"] += time.perf_counter() - started
    _train(trainer, run, folder, roles)
    summary = _finish(trainer, run, folder, roles, sources)
    return Result(load_exported(config, folder / "student"), summary, folder)


def _plan_memory(config: Config) -> None:
    device = ranks.device()
    if device.type != "cuda" or not ranks.is_first():
        return
    size = torch.cuda.get_device_properties(device).total_memory
    try:
        made = plan(config, gpu_bytes=size, ranks=ranks.world_size())
    except EngineError as error:  # what is wrong with the configuration is said by all ranks, when they load it
        _say(f"no memory plan: {error}")
        return
    _say(made.table())
    if not made.fits:
        _say(
            "warning: this run will probably end for want of GPU memory. What would make it fit: "
            "python -m engine.plan, with the same configuration and the size of your GPU as --gpu"
        )


def _train(trainer: Trainer, run: RunDirectory | None, folder: Path, roles: Roles) -> None:
    config, checkpoints = trainer.config, folder / "checkpoints"
    with tqdm(
        total=config.iterations, initial=trainer.iteration, disable=run is None, unit="iteration", dynamic_ncols=True
    ) as progress:
        while trainer.iteration < config.iterations:
            clock = time.perf_counter()
            row = trainer.train_iteration()
            last = trainer.iteration == config.iterations
            if config.evaluation.every and (trainer.iteration % config.evaluation.every == 0 or last):
                row |= trainer.evaluate_held_out()
                if row["reward/held_out_eta0"] > trainer.best["reward"]:
                    trainer.best = {"iteration": trainer.iteration, "reward": row["reward/held_out_eta0"]}
                    checkpoint.write_best(
                        checkpoints, trainer.best, lambda path: _export(trainer, path / "student", roles)
                    )
            if run is not None:
                run.log(row)
            progress.set_postfix(_shown(row), refresh=False)
            progress.update()
            trainer.account.seconds["total"] += time.perf_counter() - clock
            if last or (config.checkpoint.every and trainer.iteration % config.checkpoint.every == 0):
                checkpoint.write(
                    checkpoints,
                    trainer.iteration,
                    config.checkpoint.keep,
                    lambda path: trainer.save(path, roles.weights),
                )


def _shown(row: dict[str, float]) -> dict[str, str]:
    """What the progress bar says of an iteration."""
    shown = {"loss": f"{row['loss/loss']:.3g}"}
    if "reward/mean" in row:
        shown = {"reward": f"{row['reward/mean']:.4f}", "ratio_error": f"{row['ratio/first_pass_error']:.1e}"}
    return shown


def _finish(
    trainer: Trainer, run: RunDirectory | None, folder: Path, roles: Roles, sources: Mapping[str, Source]
) -> dict[str, Any] | None:
    config = trainer.config
    clock = time.perf_counter()
    evaluator = Evaluator(config, roles.pipeline, trainer.device, sources["evaluation"], weights=roles.weights)
    teacher, guidance = roles.teacher, config.student.guidance
    teacher_row = evaluator.row(teacher, config.teacher.steps, guidance=config.teacher.guidance)
    few_row = evaluator.row(teacher, config.student.steps, guidance=config.teacher.guidance)
    dpm_row = None
    if config.evaluation.dpm:
        dpm_row = evaluator.row(teacher, config.student.steps, guidance=config.teacher.guidance, kind=DPM)
    with trainer.averaged.installed():
        own = student_fingerprint(trainer) if config.evaluation.store else None
        student_row = evaluator.student_row(trainer.student, weights=own)
        noisy_row = None
        if config.objective.rewarded:
            noisy_row = evaluator.row(
                trainer.student, config.student.steps, guidance=guidance, kind=config.policy.kind,
                eta=config.policy.eta, weights=own,
            )  # fmt: skip
    seconds = dict(trainer.account.seconds)
    seconds["evaluation"] = time.perf_counter() - clock
    seconds["total"] += seconds["evaluation"]
    summary = {
        "teacher": teacher_row.metrics,
        "teacher_few_steps": few_row.metrics,
        "student": student_row.metrics,
        **({} if noisy_row is None else {"student_training_eta": noisy_row.metrics}),
        **({} if dpm_row is None else {"teacher_few_steps_dpm": dpm_row.metrics}),
        "gap_closed": gap_closed(teacher_row.metrics, few_row.metrics, student_row.metrics),
        "evaluation_samples": config.evaluation.samples,
        "evaluation_seed": config.evaluation.seed,
        "seed": config.seed,
        "iterations": trainer.iteration,
        "best": trainer.best if trainer.best["iteration"] else None,
        "ratio_first_pass_error": trainer.worst_ratio_error,
        "passes": {**trainer.account.passes, "final_evaluation": evaluator.passes},
        "seconds": seconds,
        "world_size": ranks.world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "versions": preflight.versions(),
    }
    checkpoint.replace(folder / "student", lambda path: _export(trainer, path, roles))
    if run is None:
        ranks.barrier()
        return None
    report.write_samples(
        folder / "samples.png",
        {
            f"teacher, {config.teacher.steps} steps": teacher_row.images,
            f"teacher, {config.student.steps} steps": few_row.images,
            f"student, {config.student.steps} steps": student_row.images,
        },
        evaluator.captions,
    )
    report.write_curves(folder / "curves.png", run.metrics)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.close()
    _say(report.summary_table(summary) + f"\n{folder}/samples.png  curves.png  summary.json  student/")
    ranks.barrier()
    return summary


def student_fingerprint(trainer: Trainer) -> str:
    """SHA-256 of all weights that the averaged student computes with, for evaluation.store."""
    own = trainer.averaged.fingerprint()
    if trainer.config.student.trainable is None:
        return own
    return f"{own} {fingerprint(load_student(trainer.config))}"  # the part that is not trained


def _export(trainer: Trainer, directory: Path, roles: Roles) -> None:
    if ranks.is_first():
        save_student(trainer.config, roles.pipeline, trainer.averaged.values, directory)


def _say(text: str) -> None:
    if ranks.is_first():
        print(text, flush=True)
