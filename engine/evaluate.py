"""Evaluation on conditions that were never trained on, with encoders that are not the reward.

python -m engine.evaluate RUN [--steps 1,2,4,5,8] [--samples N] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import preflight, ranks, report
from engine.chatter import silence
from engine.conditions import ConditionPool
from engine.config import Config, load_config
from engine.drawing import BATCH, DPM, ODE, Drawing, Repeated, Sampler, compare
from engine.encoders import PooledPixels, load_encoders
from engine.errors import EngineError
from engine.evaluation_checks import check_sizes, doubts
from engine.image_store import ImageStore, image_batches, image_files
from engine.metrics import (
    class_accuracy,
    diversity,
    frechet_distance,
    kernel_distance,
    paired_cosine,
    precision_recall_density_coverage,
)
from engine.models.denoiser import Denoiser
from engine.models.digits import digits, load_evaluation_encoder
from engine.models.loading import fingerprint
from engine.models.pipelines import Pipeline
from engine.precision import DTYPES
from engine.roles import Roles, fit, load_exported, load_teacher
from engine.run_directory import write_atomically
from engine.settings import Student
from engine.sources import Source, encode_prompts, load_sources

SHOWN = 10
"""Images of a row of samples.png."""


@dataclass(frozen=True)
class Row:
    """One sampler's evaluation: its metrics, and its first images (K, C, H, W) in [-1, 1]."""

    metrics: dict[str, Any]
    images: Tensor


@dataclass(frozen=True)
class Drawn:
    """What is kept of the N images that a sampler drew.

    Attributes:
        features: name of an encoder -> (N, D) fp32 on the CPU.
        pairs: "psnr" and "ssim" -> (N,) float64 with the teacher's images; empty for the teacher's own.
        shown: the first K images (K, C, H, W) in [-1, 1].
    """

    features: dict[str, Tensor]
    pairs: dict[str, Tensor]
    shown: Tensor


class Evaluator:
    """Draws the same held-out conditions and noise with any denoiser, and measures the images.

    For digits, features are the embedded evaluation encoder's and the reference is all real digits. For other teachers,
    features are those of evaluation.encoders, or without any the pixels pooled to at most 8x8; the reference is the
    folder evaluation.real_images, or without it the teacher's images from other noise.

    Args:
        config: of the run.
        pipeline: of the teacher, which draws the paired targets.
        device: of this rank.
        source: what the evaluated conditions ask for.
        weights: fingerprint of the teacher's weights, for evaluation.store.

    Attributes:
        captions: what is asked for in a row's first images.
        warnings: why some figures should not be quoted; printed at once.

    Raises:
        EngineError: as `check_evaluation`.
    """

    def __init__(
        self, config: Config, pipeline: Pipeline, device: torch.device, source: Source, *, weights: str
    ) -> None:
        check_sizes(config, pipeline)
        settings = config.evaluation
        self.config, self.device, self._weights = config, device, weights
        self._digits = preflight.is_digits(pipeline.denoiser)
        self._digit_encoder = load_evaluation_encoder().to(device) if self._digits else None
        self._decode = pipeline.decode
        self._drawing = Drawing(config, pipeline, device, exact=self._digits)
        self._target = Sampler(pipeline.denoiser, config.teacher.steps, config.teacher.guidance)
        self._targets: ImageStore | None = None
        self._known: dict[tuple, Drawn] = {}
        seeds = settings.seeds_per_prompt
        self._pool = self._conditions("evaluation", source if seeds == 1 else Repeated(source, seeds))
        first = torch.arange(min(SHOWN, self._pool.size))
        self.captions = [textwrap.shorten(text, 28, placeholder=" ...") for text in self._pool.captions(first)]
        self._encoders, self._text = self._load_encoders()
        self._real = self._reference(source)
        self.warnings = [] if self._digits else doubts(self._pool.size, self._real)
        if ranks.is_first():
            for warning in self.warnings:
                print(f"warning: {warning}", flush=True)

    @property
    def teacher(self) -> Denoiser:
        """Who draws the paired targets; its other rows are kept, too."""
        return self._target.denoiser

    @property
    def passes(self) -> int:
        """Network evaluations of one latent so far, over all ranks."""
        return self._drawing.passes

    def row(
        self,
        denoiser: Denoiser,
        steps: int,
        *,
        guidance: float,
        kind: str = ODE,
        eta: float = 0.0,
        weights: str | None = None,
    ) -> Row:
        """Evaluate one denoiser at a number of steps; every rank calls it, each draws its share.

        Args:
            denoiser: the teacher, or a student of it.
            steps: number of steps.
            guidance: weight of guidance.
            kind: of the sampler: `ODE`, `DPM` (DPM-Solver++), or a policy's.
            eta: noise of the policy.
            weights: fingerprint of a student's weights, read where evaluation.store is set; None: that of its network.

        Returns:
            Row with `steps`, `eta`, `guidance`, `fd`, `precision`, `recall`, `density`, `coverage`, `class_accuracy`
            (None without digit classes) and `paired_cosine` (with the teacher's image of the same condition and noise).
            Other teachers than digits have more, and under `encoders` the figures of each encoder; those of the first
            stand at the top (docs/evaluation.md).
        """
        target = self._drawn(self._target, None)
        drawn = self._drawn(Sampler(denoiser, steps, guidance, kind, eta), weights)
        metrics: dict[str, Any] = {"steps": steps, "eta": eta, "guidance": guidance}
        by_encoder = {name: self._figures(name, drawn, target) for name in self._encoders}
        metrics |= next(iter(by_encoder.values()))
        if not self._digits:
            clip = [figures for figures in by_encoder.values() if "clip_score" in figures]
            metrics |= {name: clip[0][name] for name in ("clip_score", "clip_score_01") if clip}
            metrics |= {f"paired_{name}": _mean(values) for name, values in drawn.pairs.items()}
            metrics |= {"sampler": kind, "encoders": by_encoder}
        return Row(metrics, drawn.shown)

    def student_row(
        self,
        student: Denoiser,
        steps: int | None = None,
        *,
        settings: Student | None = None,
        weights: str | None = None,
    ) -> Row:
        """Evaluate a student with its own sampler, as student.sampler and student.guidance have it.

        Args:
            steps: None: student.steps.
            settings: of a student of another run; None: of the configuration.
            weights: as for `row`.
        """
        settings = settings or self.config.student
        kind, eta = ("renoise", 1.0) if settings.sampler == "renoise" else (ODE, 0.0)
        steps = steps or settings.steps
        return self.row(student, steps, guidance=settings.guidance, kind=kind, eta=eta, weights=weights)

    def _figures(self, name: str, drawn: Drawn, target: Drawn) -> dict[str, Any]:
        """The figures of one encoder."""
        # digits stay on the CPU, where their figures are the same on any machine
        device = torch.device("cpu") if self._digits else self.device
        features, real = drawn.features[name].to(device), self._real[name].to(device)
        common = {
            "fd": frechet_distance(real, features),
            **precision_recall_density_coverage(real, features),
            "class_accuracy": None,
            "paired_cosine": paired_cosine(features, target.features[name].to(device)),
        }
        if self._digits:
            labels = self._pool.asked(torch.arange(self._pool.size))["class_labels"]
            logits = self._digit_encoder.classify(features.to(self.device)).cpu()
            return {**common, "class_accuracy": class_accuracy(logits, labels)}
        kernel = kernel_distance(real, features, subset_size=min(1000, len(real) // 2, len(features) // 2))
        figures = {**common, "kid": kernel.mean, "kid_std": kernel.std}
        if name in self._text:
            figures["clip_score"] = paired_cosine(features, self._text[name].to(device))
            figures["clip_score_01"] = (figures["clip_score"] + 1) / 2
        seeds = self.config.evaluation.seeds_per_prompt
        if seeds > 1:
            figures["diversity"] = diversity(features, seeds)
        return figures

    # ------------------------------------------------------------------ images to features

    def _drawn(self, sampler: Sampler, weights: str | None) -> Drawn:
        """The features of a sampler's images; the teacher's are kept, as rows are paired with one of them."""
        teacher = self._target.denoiser
        if sampler.denoiser.network is not teacher.network or sampler.denoiser.adapter != teacher.adapter:
            return self._measure(sampler, self._pool, self._store(sampler, self._pool, weights), self._targets)
        if sampler.settings not in self._known:
            is_target = sampler.settings == self._target.settings
            store = self._store(sampler, self._pool, self._weights, keep=is_target)
            self._known[sampler.settings] = self._measure(sampler, self._pool, store, self._targets)
            if is_target:
                self._targets = store
        return self._known[sampler.settings]

    def _measure(
        self, sampler: Sampler, pool: ConditionPool, store: ImageStore | None, partners: ImageStore | None
    ) -> Drawn:
        """Draw and encode a pool's images, batch by batch.

        Args:
            store: where they are kept, if anywhere.
            partners: the teacher's images of the same pool, if they are to be compared.
        """
        features: dict[str, list[Tensor]] = {name: [] for name in self._encoders}
        pairs: dict[str, list[Tensor]] = {}
        shown = []
        for rows, images in self._drawing.batches(sampler, pool, store):
            for name, encode in self._encoders.items():
                features[name].append(encode(images))
            if partners is not None:
                for name, values in compare(images, partners, rows, self.device).items():
                    pairs.setdefault(name, []).append(values)
            shown.append(images[rows < len(self.captions)].cpu())
        pictures = ranks.gather(torch.cat(shown))[: len(self.captions)]
        return Drawn(
            {name: self._drawing.gather(pool, torch.cat(parts)) for name, parts in features.items()},
            {name: self._drawing.gather(pool, torch.cat(parts)) for name, parts in pairs.items()},
            pictures * 2 - 1 if self._digits else pictures / 127.5 - 1,
        )

    def _store(
        self, sampler: Sampler, pool: ConditionPool, weights: str | None, *, keep: bool = False
    ) -> ImageStore | None:
        """Where a sampler's images are kept: in evaluation.store, or if they must be, in a folder that goes with us."""
        folder = self.config.evaluation.store
        if folder is not None:
            return self._drawing.store(
                Path(folder), sampler, pool, teacher=self._weights, weights=weights or fingerprint(sampler.denoiser)
            )
        if self._digits or not keep:
            return None
        self._temporary = tempfile.TemporaryDirectory(prefix="redif-evaluation-", ignore_cleanup_errors=True)
        return ImageStore(Path(self._temporary.name), {"images": "the teacher's, of one evaluation"})

    def _conditions(self, split: str, source: Source) -> ConditionPool:
        settings, shape = self.config.evaluation, self._target.denoiser.latent_shape
        return ConditionPool(split, settings.seed, settings.samples, source, shape)

    # ------------------------------------------------------------------ what images are held against

    def _load_encoders(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The encoders of images; and of those that read text, the features of the prompts that are asked for."""
        if self._digits:
            return {"digits": self._encode_digits}, {}
        if not self.config.evaluation.encoders:
            return {"pixels": PooledPixels()}, {}
        prompts = self._pool.asked(torch.arange(self._pool.size)).get("prompt")
        encoders = load_encoders(self.config.evaluation.encoders, self.device, text=prompts is not None)
        return encoders, {name: encoder.embed(prompts) for name, encoder in encoders.items() if encoder.reads_text}

    @torch.no_grad()
    def _encode_digits(self, images: Tensor) -> Tensor:
        return self._digit_encoder(images).features.cpu()

    def _reference(self, source: Source) -> dict[str, Tensor]:
        """Features of the set that distances are measured to."""
        if self._digits:
            return {"digits": self._encode_digits(self._decode(digits("all")[0]).to(self.device))}
        if self.config.evaluation.real_images is not None:
            return self._encode_real(Path(self.config.evaluation.real_images))
        pool = self._conditions("evaluation reference", source)
        return self._measure(self._target, pool, self._store(self._target, pool, self._weights), None).features

    def _encode_real(self, folder: Path) -> dict[str, Tensor]:
        files, gray = image_files(folder), self._target.denoiser.latent_shape[0] == 1
        features: dict[str, list[Tensor]] = {name: [] for name in self._encoders}
        for images in image_batches(files[ranks.share(len(files))], gray=gray, batch_size=BATCH):
            for name, encode in self._encoders.items():
                features[name].append(encode(images))
        return {name: ranks.gather(torch.cat(parts)) for name, parts in features.items()}


def _mean(values: Tensor) -> float | None:
    mean = float(values.mean())
    return mean if math.isfinite(mean) else None  # JSON has no infinity: the PSNR of equal images


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
    if not (folder / "config.yaml").is_file() or not (folder / "student").is_dir():
        raise EngineError(f"{folder} is not a finished run; a run directory with config.yaml and student/ is needed")
    overrides = [] if samples is None else [f"evaluation.samples={samples}"]
    config = load_config(folder / "config.yaml", overrides)
    ranks.start(config.train.threads)
    pipeline, student = load_teacher(config), load_exported(config, folder / "student")
    teacher, weights = pipeline.denoiser, fingerprint(pipeline.denoiser)
    sources = load_sources(config, pipeline, folder)
    encode_prompts(config, sources, pipeline)
    decode = partial(pipeline.decode, batch_size=config.vae.batch_size)
    fit(Roles(pipeline, teacher, student, None, weights, decode), config)
    student.network.to(ranks.device(), DTYPES[config.precision])
    evaluator = Evaluator(config, pipeline, ranks.device(), sources["evaluation"], weights=weights)
    wanted = steps or [config.student.steps]
    rows = [evaluator.row(teacher, config.teacher.steps, guidance=config.teacher.guidance).metrics]
    result: dict[str, Any] = {"run": str(folder), "teacher": rows[0], "by_steps": []}
    for count in wanted:
        few = evaluator.row(teacher, count, guidance=config.teacher.guidance).metrics
        own = evaluator.student_row(student, count).metrics
        entry = {"steps": count, "teacher": few, "student": own, "gap_closed": gap_closed(rows[0], few, own)}
        if config.evaluation.dpm:
            entry["teacher_dpm"] = evaluator.row(teacher, count, guidance=config.teacher.guidance, kind=DPM).metrics
        result["by_steps"].append(entry)
    return {
        **result,
        "evaluation_samples": config.evaluation.samples,
        "warnings": evaluator.warnings,
        "versions": preflight.versions(),
    }


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
