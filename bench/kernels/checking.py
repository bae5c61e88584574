"""Whether an operation computes what it should: without that, no figure of it is reported."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import Results
from .operations import Case

# fp32 rounds a mean and a difference to 6e-8 of |x| ~ 4 std, and sums in blocks: a few 1e-6 of the largest element
TOLERANCE = 5e-6


class WrongResult(Exception):
    """An operation failed its check."""


class Check(NamedTuple):
    """How far our results and gradients are from the float64 truth."""

    error: float
    """the largest difference, relative to the largest element of its tensor, in units of what is tolerated"""
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= 1  # nan is not

    def __str__(self) -> str:
        return f"{self.where} is off by {self.error:.2g} times what is tolerated"


def check(case: Case, results: Results) -> Check:
    """Compare ``results``, those of ``case.run(case.operation.ours)``, with the truth.

    Tolerated is ``TOLERANCE``, and for half precision one unit in the last place beyond it (a GPU rounds to nearest,
    Triton's interpreter truncates).
    """
    operation = case.operation
    given = {name: _double(value) for name, value in case.inputs.items()}
    for name in operation.gradients:
        given[name].requires_grad_()
    expected = operation.eager(**given) if operation.truth is None else operation.truth(given, results)
    names = [f"result {i}" for i in range(len(expected))]
    if operation.gradients:
        wrt = [given[name] for name in operation.gradients]
        grads = [_double(grad) for grad in case.grads]
        expected = *expected, *torch.autograd.grad(expected[: len(grads)], wrt, grads)
        names += [f"the gradient of {name}" for name in operation.gradients]
    if len(results) != len(expected):
        return Check(math.inf, f"the number of results, {len(results)} for {len(expected)},")
    errors = map(_error, results, expected)
    return max(map(Check, errors, names), key=lambda one: math.inf if math.isnan(one.error) else one.error)


def _double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    tolerance = TOLERANCE
    if actual.dtype in (torch.bfloat16, torch.float16):
        tolerance += torch.finfo(actual.dtype).eps
    actual, expected = actual.detach().double(), expected.detach()
    size = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((actual - expected).abs().max() / size / tolerance).item()
