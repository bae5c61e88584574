"""Random inputs of the operations, and the truth where it is not simply the eager formula in float64.

Inputs are made for the shape of a batch (B, ...) and the dtype of its latents, on the device of a random generator.
The entry "grads" are the gradients of the operation's first results.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from engine.kernels.noise import standard_normal_reference

from . import eager

Inputs = dict[str, Any]
Results = tuple[Tensor, ...]


def rewards(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """(B, group size) rewards, flattened."""
    return {"rewards": _normal(shape, generator, dtype).flatten(), "group_size": shape[1]}


def sample_from_seed(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    streams = {name: torch.tensor(n, device=generator.device) for name, n in (("seed", 1234), ("offset", 5678))}
    return _step(shape, dtype, generator) | streams


def sample_given_noise(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return _step(shape, dtype, generator) | {"noise": _normal(shape, generator)}


def log_prob(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    step = _step(shape, dtype, generator)
    step["x_next"] = _next(step, generator)
    return step | {"grads": (_grad(shape[0], math.prod(shape[1:]), generator),)}


def divergence(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    step = _step(shape, dtype, generator)
    step["pred_ref"] = _reference(step, generator)
    del step["x"], step["a"]
    return step | {"grads": (_grad(shape[0], math.prod(shape[1:]), generator),)}


def loss(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, guided: bool = False) -> Inputs:
    """pred_ref for ours; mean_ref, the mean that it makes, for the eager formula."""
    step = _step(shape, dtype, generator)
    if guided:
        step["pred_uncond"] = _normal(shape, generator, dtype)
    step["x_next"], step["pred_ref"] = _next(step, generator), _reference(step, generator)
    step["mean_ref"] = _mean_ref(step)
    # both signs of the advantage on both sides of the clip, far enough from it that rounding decides nothing
    row = torch.arange(shape[0], device=generator.device)
    shifts = torch.tensor([0.5, -2.0, 2.0, -0.5], device=generator.device) * eager.CLIP_RANGE
    magnitude = _uniform(shape[0], 0.5, 1.5, generator)
    step["advantage"] = torch.where(row % 8 // 2 == 3, -magnitude, magnitude)
    _, log_prob, *_ = eager.policy_loss(**step, old_log_prob=magnitude)
    step["old_log_prob"] = log_prob + shifts[row % 4]
    return step | {"grads": (_grad(1, math.prod(shape), generator)[0],)}


loss_guided = functools.partial(loss, guided=True)


def feature_map(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """x (B, C, H, W) and the parameters of a norm."""
    x, grad = (_normal(shape, generator, dtype) for _ in range(2))
    weight, bias = (_normal(shape[1:2], generator, dtype) for _ in range(2))
    return {"x": x, "weight": weight, "bias": bias, "grads": (grad,)}


def tokens(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, *, vectors: str, results: int = 1
) -> Inputs:
    """x, and branch where there is a gate, (B, L, D); the named ``vectors`` (B, D)."""
    names = vectors.split()
    made = {name: _normal(shape, generator, dtype) for name in ("x", "branch") if name == "x" or "gate" in names}
    made |= {name: _normal((shape[0], shape[2]), generator, dtype) for name in names}
    return made | {"grads": tuple(_normal(shape, generator, dtype) for _ in range(results))}


def projected(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Hidden and gate for results of (B, L, D)."""
    both = (*shape[:-1], 2 * shape[-1])
    return {"projected": _normal(both, generator, dtype), "grads": (_normal(shape, generator, dtype),)}


def sample_truth(inputs: Inputs, results: Results) -> Results:
    """The step from the inputs; its log-prob from the step as it was stored, which is what ours scores."""
    x, noise = inputs["x"], inputs.get("noise")
    if noise is None:
        noise = standard_normal_reference(inputs["seed"], inputs["offset"], x.shape[0], x[0].numel())
        noise = noise.double().view(x.shape)
    step = {name: inputs[name] for name in ("x", "pred", "a", "b", "std")}
    x_next, _ = eager.policy_sample(**step, noise=noise)
    return x_next, *eager.policy_log_prob(**step, x_next=results[0].double())


def loss_truth(inputs: Inputs, results: Results) -> Results:
    """From pred_ref: the mean_ref of the inputs is rounded."""
    return eager.policy_loss(**inputs | {"mean_ref": _mean_ref(inputs)})


def _normal(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype) * scale


def _uniform(rows: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(rows, generator=generator, device=generator.device)


def _grad(results: int, elements: int, generator: torch.Generator) -> Tensor:
    """Gradients of ``results`` means over ``elements``, scaled as a loss scaler does to keep fp16 from underflow."""
    return _uniform(results, 0.5, 1.5, generator) * elements


def _step(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    step = {name: _normal(shape, generator, dtype) for name in ("x", "pred")}
    for name, low, high in (("a", 0.5, 1.0), ("b", -1.0, -0.5), ("std", 0.5, 1.0)):
        step[name] = _uniform(shape[0], low, high, generator)
    return step


def _prediction(step: Inputs) -> Tensor:
    pred = eager.upcast(step["pred"])
    return eager.guided(pred, eager.upcast(step["pred_uncond"])) if "pred_uncond" in step else pred


def _next(step: Inputs, generator: torch.Generator) -> Tensor:
    """Where the policy steps to."""
    x = eager.upcast(step["x"])
    mean = eager.mean_of(x, _prediction(step), step["a"], step["b"])
    return (mean + eager.column(step["std"], x) * _normal(x.shape, generator)).to(step["x"].dtype)


def _reference(step: Inputs, generator: torch.Generator) -> Tensor:
    """The (guided) prediction of another policy."""
    prediction = _prediction(step)
    return (prediction + _normal(prediction.shape, generator, scale=0.3)).to(step["pred"].dtype)


def _mean_ref(step: Inputs) -> Tensor:
    return eager.mean_of(*(eager.upcast(step[name]) for name in ("x", "pred_ref", "a", "b")))
