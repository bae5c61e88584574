"""The forward process of a schedule, and what a prediction means in it: image, noise, score.

With alpha and sigma of a timestep, x = alpha image + sigma noise. Both kinds of schedule and all prediction types are
converted here and nowhere else. Tensors keep their dtype; the coefficients are float64 rounded to it.
"""

from __future__ import annotations

from torch import Tensor

from .schedules import DiffusionSchedule, Schedule

TRAINED = 1000.0  # flow networks are conditioned on sigma * 1000


def levels(schedule: Schedule, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of timesteps (B,), each (B,) float64 on their device.

    Args:
        timestep: what networks are conditioned on: int64 training timesteps of a diffusion, sigma * 1000 of a flow.
    """
    if isinstance(schedule, DiffusionSchedule):
        product = schedule.alphas_cumprod.to(timestep.device)[timestep]
        return product.sqrt(), (1 - product).sqrt()
    sigma = timestep.double() / TRAINED
    return 1 - sigma, sigma


def timestep_at(schedule: Schedule, level: Tensor) -> Tensor:
    """Timesteps (B,) of noise levels (B,) in [0, 1], the share of the way from the image to pure noise in the
    network's own time: training timesteps int64 of a diffusion, level * 1000 (fp32) of a flow."""
    if isinstance(schedule, DiffusionSchedule):
        last = len(schedule.alphas_cumprod) - 1
        return (level.double() * last).round().long().clamp(0, last)
    return (level.double() * TRAINED).float()


def level_of(schedule: Schedule, timestep: Tensor) -> Tensor:
    """The noise level (B,) float64 in [0, 1] of timesteps (B,): the inverse of `timestep_at`."""
    if isinstance(schedule, DiffusionSchedule):
        return timestep.double() / (len(schedule.alphas_cumprod) - 1)
    return timestep.double() / TRAINED


def diffuse(schedule: Schedule, image: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """alpha image + sigma noise.

    Args:
        image, noise: (B, C, H, W).
        timestep: (B,).
    """
    alpha, sigma = _like(levels(schedule, timestep), image)
    return alpha * image + sigma * noise


def to_image(schedule: Schedule, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
    """The image (B, C, H, W) that a prediction at (x, timestep) means."""
    alpha, sigma = _like(levels(schedule, timestep), x)
    kind = _kind(schedule)
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * x - sigma * prediction
    if kind == "flow":
        return x - sigma * prediction
    return prediction


def to_noise(schedule: Schedule, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
    """The noise (B, C, H, W) that a prediction at (x, timestep) means."""
    alpha, sigma = _like(levels(schedule, timestep), x)
    kind = _kind(schedule)
    if kind == "epsilon":
        return prediction
    if kind == "v_prediction":
        return sigma * x + alpha * prediction
    if kind == "flow":
        return x + alpha * prediction
    return (x - alpha * prediction) / sigma


def from_image(schedule: Schedule, x: Tensor, image: Tensor, timestep: Tensor) -> Tensor:
    """The prediction at (x, timestep) that means an image: the inverse of `to_image`."""
    alpha, sigma = _like(levels(schedule, timestep), x)
    kind = _kind(schedule)
    if kind == "epsilon":
        return (x - alpha * image) / sigma
    if kind == "v_prediction":
        return (alpha * x - image) / sigma
    if kind == "flow":
        return (x - image) / sigma
    return image


def target(schedule: Schedule, image: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """What a network is trained to predict at alpha image + sigma noise."""
    alpha, sigma = _like(levels(schedule, timestep), image)
    kind = _kind(schedule)
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return alpha * noise - sigma * image
    if kind == "flow":
        return noise - image
    return image


def score(schedule: Schedule, x: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
    """The gradient of the log-density at x that a prediction means: (alpha image - x) / sigma^2 = -noise / sigma."""
    _, sigma = _like(levels(schedule, timestep), x)
    return -to_noise(schedule, x, prediction, timestep) / sigma


def _kind(schedule: Schedule) -> str:
    return schedule.prediction_type if isinstance(schedule, DiffusionSchedule) else "flow"


def _like(values: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(value.to(x).view(-1, *[1] * (x.dim() - 1)) for value in values)
