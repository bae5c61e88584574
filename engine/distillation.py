"""The main job: a configuration in, a finished run directory out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine import checkpoint, preflight, ranks, report
from engine.config import Config, load_config
from engine.errors import EngineError
from engine.evaluate import Evaluator, gap_closed
from engine.kernels import patch
from engine.kernels.backend import runs_triton
from engine.models.denoiser import Denoiser
from engine.models.digits import TEACHER_DIR
from engine.models.loading import LoadingError, fingerprint, load_denoiser, save_denoiser
from engine.run_directory import RunDirectory, resolve, write_atomically
from engine.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        student: the averaged student of the last iteration, a denoiser whose network is a diffusers model.
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
    teacher_dir = teacher_directory(config)
    teacher = load(teacher_dir, "teacher.path")
    student = load(teacher_dir if config.student.init == "teacher" else Path(config.student.init), "student.init")
    reward = preflight.check(config, teacher, student, ranks.world_size())
    weights = fingerprint(teacher)
    if origin is not None:
        state = checkpoint.read_state(origin)
        checkpoint.check_compatible(state, config, teacher=weights, world_size=ranks.world_size(), origin=origin)
    device = ranks.device()
    for network in (teacher.network, student.network):
        fuse_kernels(network.to(device), config.model.fused_kernels)
    cache = Path(config.teacher.cache) if config.teacher.cache else folder / "teacher_cache"
    trainer = Trainer(config, teacher, student, reward, cache)
    if origin is not None:
        trainer.restore(origin)
    run = None
    if ranks.is_first():
        run = RunDirectory(
            folder, config, iteration=trainer.iteration, origin=None if origin is None else origin.parent.parent
        )
        checkpoint.remove_unfinished(folder / "checkpoints")
        print(f"run directory: {folder}", flush=True)
    ranks.barrier()
    if origin is not None and not checkpoint.carry_best(origin.parent, folder / "checkpoints", trainer.best):
        trainer.forget_best()
    trainer.account.seconds["total"] += time.perf_counter() - started
    _train(trainer, run, folder, teacher_dir, weights)
    summary = _finish(trainer, run, folder, teacher_dir, teacher)
    return Result(trainer.averaged, summary, folder)


def teacher_directory(config: Config) -> Path:
    """The diffusers directory that teacher.path means."""
    return TEACHER_DIR if config.teacher.path == "digits" else Path(config.teacher.path)


def load(directory: Path, key: str) -> Denoiser:
    """A denoiser, or an error that names the configuration key."""
    try:
        return load_denoiser(directory)
    except LoadingError as error:
        raise EngineError(f"{key}: {error}") from None


def fuse_kernels(network: nn.Module, choice: str) -> None:
    """Put the fused kernels into a network that is on its device, as model.fused_kernels says.

    Raises:
        EngineError: "on", but the network has nothing that they replace.
    """
    if choice == "off" or (choice == "auto" and not runs_triton(next(network.parameters()))):
        return
    if not patch(network) and choice == "on":
        raise EngineError(
            f"model.fused_kernels=on, but nothing in a {type(network).__name__} can be replaced; use auto or off"
        )


def _train(trainer: Trainer, run: RunDirectory | None, folder: Path, teacher_dir: Path, weights: str) -> None:
    config, checkpoints = trainer.config, folder / "checkpoints"
    samples = config.rollout.conditions * config.rollout.group_size
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
                        checkpoints, trainer.best, lambda path: _export(trainer, path / "student", teacher_dir)
                    )
            if run is not None:
                run.log(row)
            progress.set_postfix(
                reward=f"{row['reward/mean']:.4f}",
                ratio_error=f"{row['ratio/first_pass_error']:.1e}",
                samples_per_s=f"{samples / row['time/iteration']:.0f}",
                refresh=False,
            )
            progress.update()
            trainer.account.seconds["total"] += time.perf_counter() - clock
            if last or (config.checkpoint.every and trainer.iteration % config.checkpoint.every == 0):
                checkpoint.write(
                    checkpoints, trainer.iteration, config.checkpoint.keep, lambda path: trainer.save(path, weights)
                )


def _finish(
    trainer: Trainer, run: RunDirectory | None, folder: Path, teacher_dir: Path, teacher: Denoiser
) -> dict[str, Any] | None:
    config = trainer.config
    clock = time.perf_counter()
    evaluator = Evaluator(config, teacher, trainer.device)
    teacher_row = evaluator.row(teacher, config.teacher.steps, guidance=config.teacher.guidance)
    few_row = evaluator.row(teacher, config.student.steps, guidance=config.teacher.guidance)
    guidance = config.student.guidance
    student_row = evaluator.row(trainer.averaged, config.student.steps, guidance=guidance)
    noisy_row = evaluator.row(trainer.averaged, config.student.steps, guidance=guidance, eta=config.policy.eta)
    seconds = dict(trainer.account.seconds)
    seconds["evaluation"] = time.perf_counter() - clock
    seconds["total"] += seconds["evaluation"]
    summary = {
        "teacher": teacher_row.metrics,
        "teacher_few_steps": few_row.metrics,
        "student": student_row.metrics,
        "student_training_eta": noisy_row.metrics,
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
    checkpoint.replace(folder / "student", lambda path: _export(trainer, path, teacher_dir))
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
        [str(label) for label in evaluator.shown_labels],
    )
    report.write_curves(folder / "curves.png", run.metrics)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.close()
    print(report.summary_table(summary), f"\n{folder}/samples.png  curves.png  summary.json  student/", flush=True)
    ranks.barrier()
    return summary


def _export(trainer: Trainer, directory: Path, schedule_of: Path) -> None:
    if ranks.is_first():
        save_denoiser(directory, trainer.averaged.network, schedule_of)
