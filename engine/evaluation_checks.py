"""What can be said of an evaluation without drawing: it cannot be made, or its figures should not be quoted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine import preflight
from engine.config import Config
from engine.encoders import load_encoders
from engine.errors import EngineError
from engine.image_store import image_files
from engine.models.pipelines import Pipeline

ENOUGH = 5000
"""Images below which a Frechet distance is mostly bias."""
FEWEST_REAL = 100


def check_evaluation(config: Config, pipeline: Pipeline) -> None:
    """Refuse, before a run, an evaluation that could not be made after it.

    Raises:
        EngineError: names the key: encoders that cannot be loaded, too few real images, or sizes that do not fit.
    """
    check_sizes(config, pipeline)
    load_encoders(config.evaluation.encoders, torch.device("cpu"), text=pipeline.denoiser.classes is None)


def check_sizes(config: Config, pipeline: Pipeline) -> None:
    """The part of `check_evaluation` that loads nothing."""
    settings = config.evaluation
    if settings.samples % settings.seeds_per_prompt:
        raise EngineError(
            f"evaluation.seeds_per_prompt={settings.seeds_per_prompt} does not divide "
            f"evaluation.samples={settings.samples}, the number of images"
        )
    if preflight.is_digits(pipeline.denoiser):
        for key, default in (("encoders", {}), ("real_images", None), ("store", None), ("seeds_per_prompt", 1)):
            if getattr(settings, key) != default:
                raise EngineError(
                    f"evaluation.{key}={getattr(settings, key)}: digits are evaluated by their own encoder against the "
                    "real digits; leave it out"
                )
    if settings.real_images is not None and len(image_files(Path(settings.real_images))) < FEWEST_REAL:
        raise EngineError(
            f"evaluation.real_images={settings.real_images} has fewer than {FEWEST_REAL} PNG and JPEG images, which "
            "cannot estimate a Frechet distance"
        )
    if settings.store is not None and Path(settings.store).is_file():
        raise EngineError(f"evaluation.store={settings.store} is a file; give a folder, new or of earlier evaluations")


def doubts(samples: int, real: Mapping[str, Tensor]) -> list[str]:
    """Why figures of this evaluation should not be quoted, one line a reason.

    Args:
        samples: images of a row.
        real: name of an encoder -> features (M, D) of the reference.
    """
    fewest = min(samples, *(len(features) for features in real.values()))
    reasons = []
    if fewest < ENOUGH:
        reasons.append(
            f"figures of {fewest} images: below {ENOUGH} a Frechet distance is mostly bias. Compare it between the "
            "rows of one evaluation only (kid is not biased), or raise evaluation.samples"
        )
    for name, features in real.items():
        if fewest <= features.shape[1]:
            reasons.append(
                f"{name}: {fewest} images do not span {features.shape[1]} features, so the covariance that fd is made "
                "of is singular; raise evaluation.samples above that"
            )
    return reasons
