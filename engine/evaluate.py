"""Evaluation on conditions that were never trained on, with encoders that are not the reward.

python -m engine.evaluate RUN [--steps 1,2,4,5,8] [--samples N] [--output FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import preflight, ranks, report
from engine.chatter import silence
from engine.conditions import ConditionPool
from engine.config import Config, load_config
from engine.errors import EngineError
from engine.metrics import class_accuracy, frechet_distance, paired_cosine, precision_recall_density_coverage
from engine.models.denoiser import Denoiser
from engine.models.digits import digits, load_evaluation_encoder
from engine.run_directory import write_atomically
from engine.sampling import make_policy, sample, to_images


@dataclasses.dataclass(frozen=True)
class Row:
    """One sampler's evaluation: its metrics, and its first images (K, C, H, W) in [-1, 1]."""

    metrics: dict[str, Any]
    images: Tensor


class Evaluator:
    """Draws the same held-out conditions and noise with any denoiser, and measures the images.

    For digits, features are the evaluation encoder's and the reference is all real digits. Other teachers are measured
    on pixels pooled to at most 8x8, against teacher images of other conditions; they have no class accuracy.

    Args:
        config: of the run.
        teacher: draws the paired targets.
        device: of this rank.
    """

    def __init__(self, config: Config, teacher: Denoiser, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.passes = 0
        self._teacher = teacher
        self._drawn: dict[tuple, Tensor] = {}
        self._pool = self._conditions(teacher, "evaluation")
        self._indices = torch.arange(self._pool.size)
        self._mine = self._indices[ranks.share(self._pool.size)]
        self._encode, self._real = self._judge(teacher)
        self.shown_labels = (self._indices[: min(10, self._pool.size)] % teacher.classes).tolist()

    def row(self, denoiser: Denoiser, steps: int, *, guidance: float, eta: float = 0.0) -> Row:
        """Evaluate one denoiser at a number of steps; every rank calls it, each draws its share.

        Returns:
            Row with `steps`, `eta`, `guidance`, `fd`, `precision`, `recall`, `density`, `coverage`, `class_accuracy`
            (None without digit classes) and `paired_cosine` (with the teacher's image of the same condition and noise).
        """
        images = self._draw(denoiser, self._pool, steps, guidance, eta)
        features, logits = self._encode(images)
        own = self.config.teacher
        target, _ = self._encode(self._draw(self._teacher, self._pool, own.steps, own.guidance, 0.0))
        metrics = {
            "steps": steps,
            "eta": eta,
            "guidance": guidance,
            "fd": frechet_distance(self._real, features),
            **precision_recall_density_coverage(self._real, features),
            "class_accuracy": None,
            "paired_cosine": paired_cosine(features, target),
        }
        if logits is not None:
            metrics["class_accuracy"] = class_accuracy(logits, self._indices % denoiser.classes)
        return Row(metrics, images[: len(self.shown_labels)].cpu() * 2 - 1)

    def _draw(self, denoiser: Denoiser, pool: ConditionPool, steps: int, guidance: float, eta: float) -> Tensor:
        what = (id(denoiser.network), pool, steps, guidance, eta)
        if what in self._drawn:
            return self._drawn[what]
        policy = make_policy(denoiser, self.config.policy.kind, steps, eta)
        final, passes = sample(
            denoiser,
            policy,
            pool,
            self._mine,
            guidance=guidance,
            device=self.device,
            batch_size=self.config.rollout.batch_size,
        )
        self.passes += int(ranks.gather(torch.tensor([passes])).sum())
        self._drawn[what] = ranks.gather(to_images(final))
        return self._drawn[what]

    def _conditions(self, teacher: Denoiser, split: str) -> ConditionPool:
        settings = self.config.evaluation
        return ConditionPool(split, settings.seed, settings.samples, teacher.classes, teacher.latent_shape)

    def _judge(self, teacher: Denoiser) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor | None]], Tensor]:
        if preflight.is_digits(teacher):
            encoder = load_evaluation_encoder().to(self.device)

            @torch.no_grad()
            def encode(images: Tensor) -> tuple[Tensor, Tensor | None]:
                encoding = encoder(images)
                return encoding.features.cpu(), encoding.logits.cpu()

            real, _ = digits("all")
            return encode, encode(to_images(real).to(self.device))[0]

        def pool_pixels(images: Tensor) -> tuple[Tensor, Tensor | None]:
            size = [min(8, side) for side in images.shape[-2:]]
            return F.adaptive_avg_pool2d(images, size).flatten(1).cpu(), None

        settings = self.config.teacher
        other = self._conditions(teacher, "evaluation reference")
        return pool_pixels, pool_pixels(self._draw(teacher, other, settings.steps, settings.guidance, 0.0))[0]


def gap_closed(teacher: dict[str, Any], few: dict[str, Any], student: dict[str, Any]) -> float | None:
    """Share of the Frechet distance between the teacher at few and at all steps that the student closes.

    None where the teacher loses nothing at few steps, so there is no gap.
    """
    gap = few["fd"] - teacher["fd"]
    return (few["fd"] - student["fd"]) / gap if gap > 0 else None


def evaluate_run(folder: Path, steps: list[int], samples: int | None) -> dict[str, Any]:
    """Evaluate a finished run's student, and its teacher, at each of `steps`.

    Raises:
        EngineError: when the folder is not a finished run, or steps or samples are out of range.
    """
    from engine.distillation import load, teacher_directory

    if not (folder / "config.yaml").is_file() or not (folder / "student").is_dir():
        raise EngineError(f"{folder} is not a finished run; a run directory with config.yaml and student/ is needed")
    overrides = [] if samples is None else [f"evaluation.samples={samples}"]
    config = load_config(folder / "config.yaml", overrides)
    ranks.start(config.train.threads)
    teacher, student = load(teacher_directory(config), "teacher.path"), load(folder / "student", "student")
    device = ranks.device()
    for denoiser in (teacher, student):
        denoiser.network.to(device)
    evaluator = Evaluator(config, teacher, device)
    wanted = steps or [config.student.steps]
    rows = [evaluator.row(teacher, config.teacher.steps, guidance=config.teacher.guidance).metrics]
    result: dict[str, Any] = {"run": str(folder), "teacher": rows[0], "by_steps": []}
    for count in wanted:
        few = evaluator.row(teacher, count, guidance=config.teacher.guidance).metrics
        own = evaluator.row(student, count, guidance=config.student.guidance).metrics
        result["by_steps"].append(
            {"steps": count, "teacher": few, "student": own, "gap_closed": gap_closed(rows[0], few, own)}
        )
    return {**result, "evaluation_samples": config.evaluation.samples, "versions": preflight.versions()}


def main(arguments: list[str] | None = None) -> None:
    """Command line of `python -m engine.evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m engine.evaluate", description="Evaluate a finished run.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--steps", type=_steps, default=[], help="step counts, such as 1,2,4,5,8; default: the run's")
    parser.add_argument("--samples", type=int, help="images per row; default: evaluation.samples of the run")
    parser.add_argument("--output", type=Path, help="JSON file; default: RUN/evaluation.json")
    options = parser.parse_args(arguments)
    silence()
    output = options.output or options.run / "evaluation.json"
    try:
        if output.exists():
            raise EngineError(f"{output} exists and is not overwritten; name another file with --output")
        result = evaluate_run(options.run, options.steps, options.samples)
    except EngineError as error:
        sys.exit(f"error: {error}")
    if ranks.is_first():
        write_atomically(output, json.dumps(result, indent=2) + "\n")
        print(report.steps_table(result))
        print(output)


def _steps(text: str) -> list[int]:
    steps = [int(part) for part in text.split(",")]
    if any(count < 1 for count in steps):
        raise argparse.ArgumentTypeError(f"{text}: every number of steps is at least 1")
    return steps


if __name__ == "__main__":
    main()
