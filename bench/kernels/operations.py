"""The operations that are measured, and the batches that they are measured on.

To add an operation: its formula in `eager.py`, its inputs in `inputs.py`, an entry in OPERATIONS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import kernels
from engine.kernels.gated_residual import gated_residual
from engine.kernels.geglu import geglu
from engine.kernels.group_norm_silu import group_norm_silu
from engine.kernels.modulate import norm_modulate, residual_norm_modulate

from . import eager, inputs
from .inputs import Inputs, Results

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# name: shape of one sample
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "sd3": (16, 128, 128), "video": (16, 21, 60, 104)}
REWARDS = {"rewards": (8,)}
# in front of the first convolutions; tokens and width; in the middle of the UNet
FEATURE_MAPS = {"sd15": (320, 64, 64), "sdxl": (320, 128, 128)}
TOKENS = {"dit": (256, 1152), "sd3": (4096, 1536)}
FEED_FORWARDS = {"sd15": (64, 5120), "sdxl": (1024, 5120)}


@dataclass(frozen=True)
class Operation:
    """What is run, with what, and beside what."""

    inputs: Callable[[tuple[int, ...], torch.dtype, torch.Generator], Inputs]
    """see `inputs.py`"""
    ours: Callable[..., Results]
    """takes the inputs; its first results, as many as have "grads", are differentiated"""
    eager: Callable[..., Results]
    """the published formula: the same inputs and results"""
    gradients: tuple[str, ...] = ()
    """inputs whose gradients are computed too"""
    truth: Callable[[Inputs, Results], Results] | None = None
    """expected results from float64 inputs; it is shown our results, too. None: those of the eager formula"""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: LATENTS)
    """name: shape of one sample"""
    dtypes: tuple[str, ...] = tuple(DTYPES)


class Row(NamedTuple):
    """A line of the benchmark: an operation on a batch."""

    operation: str
    latent: str
    batch: int
    dtype: str

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return OPERATIONS[self.operation].shapes[self.latent]

    def __str__(self) -> str:
        return f"{self.operation}, {self.latent}, batch {self.batch}, {self.dtype}"


class Case(NamedTuple):
    """An operation with its inputs."""

    operation: Operation
    inputs: Inputs
    grads: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of all inputs."""
        return sum(value.numel() * value.element_size() for value in self.inputs.values() if isinstance(value, Tensor))

    def forward(self, function: Callable[..., Results]) -> Results:
        """Results of ``function``, which is the operation's ours or eager."""
        return function(**self.inputs)

    def backward(self, results: Results) -> Results:
        """Gradients of what it returned."""
        if not self.grads:
            return ()
        wrt = [self.inputs[name] for name in self.operation.gradients]
        return torch.autograd.grad(results[: len(self.grads)], wrt, self.grads)

    def run(self, function: Callable[..., Results]) -> Results:
        """Results, then gradients."""
        results = self.forward(function)
        return *results, *self.backward(results)


def prepare(row: Row, *, batch: int | None = None, device: str = "cpu", seed: int = 0) -> Case:
    """The operation of ``row`` on random inputs: its batch, or ``batch`` samples."""
    operation = OPERATIONS[row.operation]
    shape = (row.batch if batch is None else batch, *row.sample)
    made = operation.inputs(shape, DTYPES[row.dtype], torch.Generator(device).manual_seed(seed))
    grads = made.pop("grads", ())
    for name in operation.gradients:
        made[name].requires_grad_()
    return Case(operation, made, grads)


def _loss(mean_ref: Tensor, **given: Any) -> Results:
    numbers = {"guidance": eager.GUIDANCE, "kl_coef": eager.KL_COEF, "clip_range": eager.CLIP_RANGE}
    return kernels.policy_loss(**given, **numbers)


OPERATIONS: dict[str, Operation] = {
    "group_advantage": Operation(
        inputs=inputs.rewards,
        ours=lambda **given: (kernels.group_advantage(**given, eps=eager.EPS),),
        eager=eager.group_advantage,
        shapes=REWARDS,
        dtypes=("fp32",),
    ),
    "policy_sample": Operation(
        inputs=inputs.sample_from_seed,
        ours=kernels.policy_sample,
        eager=eager.policy_sample,
        truth=inputs.sample_truth,
    ),
    "policy_sample_given_noise": Operation(
        inputs=inputs.sample_given_noise,
        ours=kernels.policy_sample,
        eager=eager.policy_sample,
        truth=inputs.sample_truth,
    ),
    "policy_log_prob": Operation(
        inputs=inputs.log_prob,
        ours=lambda **given: (kernels.policy_log_prob(**given),),
        eager=eager.policy_log_prob,
        gradients=("pred",),
    ),
    "policy_divergence": Operation(
        inputs=inputs.divergence,
        ours=lambda **given: (kernels.policy_divergence(**given),),
        eager=eager.policy_divergence,
        gradients=("pred",),
    ),
    "policy_loss": Operation(
        inputs=inputs.loss,
        ours=_loss,
        eager=eager.policy_loss,
        gradients=("pred",),
        truth=inputs.loss_truth,
    ),
    "policy_loss_guided": Operation(
        inputs=inputs.loss_guided,
        ours=_loss,
        eager=eager.policy_loss,
        gradients=("pred", "pred_uncond"),
        truth=inputs.loss_truth,
    ),
    "group_norm_silu": Operation(
        inputs=inputs.feature_map,
        ours=lambda **given: (group_norm_silu(**given, num_groups=eager.GROUPS, eps=eager.EPS),),
        eager=eager.group_norm_silu,
        gradients=("x", "weight", "bias"),
        shapes=FEATURE_MAPS,
    ),
    "norm_modulate": Operation(
        inputs=functools.partial(inputs.tokens, vectors="shift scale"),
        ours=lambda **given: (norm_modulate(**given, eps=eager.EPS),),
        eager=eager.norm_modulate,
        gradients=("x", "shift", "scale"),
        shapes=TOKENS,
    ),
    "gated_residual": Operation(
        inputs=functools.partial(inputs.tokens, vectors="gate"),
        ours=lambda **given: (gated_residual(**given),),
        eager=eager.gated_residual,
        gradients=("x", "gate", "branch"),
        shapes=TOKENS,
    ),
    "residual_norm_modulate": Operation(
        inputs=functools.partial(inputs.tokens, vectors="gate shift scale", results=2),
        ours=lambda **given: residual_norm_modulate(**given, eps=eager.EPS),
        eager=eager.residual_norm_modulate,
        gradients=("x", "gate", "branch", "shift", "scale"),
        shapes=TOKENS,
    ),
    "geglu": Operation(
        inputs=inputs.projected,
        ours=lambda **given: (geglu(**given),),
        eager=eager.geglu,
        gradients=("projected",),
        shapes=FEED_FORWARDS,
    ),
}
