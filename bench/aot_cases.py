"""What `bench.aot` compiles: the operations on tensors that they launch differently for, and each kernel's budget.

A new kernel takes a line in ``OPERATIONS``, and one in ``CASES`` for every way in which it is launched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import (
    gated_residual,
    geglu,
    group_advantage,
    group_norm_silu,
    norm_modulate,
    policy_divergence,
    policy_log_prob,
    policy_loss,
    policy_sample,
    residual_norm_modulate,
)


class Rows(NamedTuple):
    """A batch in memory."""

    name: str
    shape: tuple[int, ...]
    """of a sample"""
    batch: int = 2
    offset: int = 0
    """elements between a multiple of 16 bytes and the first one"""

    @property
    def aligned(self) -> bool:
        """Whether every sample begins at a multiple of 16 bytes, which 128-bit loads need."""
        return self.offset == 0 and math.prod(self.shape) % 16 == 0

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """(batch, *shape), uninitialised, a leaf that requires a gradient."""
        memory = torch.empty(self.offset + self.batch * math.prod(self.shape), dtype=dtype)
        return memory[self.offset :].view(self.batch, *self.shape).requires_grad_()


DIGITS = Rows("digits", (1, 8, 8))
SDXL = Rows("SDXL", (4, 128, 128))
VIDEO = Rows("video", (16, 21, 60, 104))  # the only latents of which a program sums several blocks
UNET_WIDE = Rows("UNet 64x64", (320, 64, 64))  # groups of 40960 elements are split, those of 10240 are not
UNET_DEEP = Rows("UNet 16x16", (1280, 16, 16))
SD3 = Rows("SD3", (1024, 1536))
FLUX = Rows("FLUX", (1024, 3072))
GROUP = Rows("group", (64,))
LARGE_GROUP = Rows("large group", (2000,))
ODD = Rows("odd", (3, 33, 37))
ODD_TOKENS = Rows("odd tokens", (77, 1155))
SHIFTED = Rows("shifted", SDXL.shape, offset=1)
ONE = Rows("one element", (1, 1), batch=1)  # sizes are 1, of which Triton makes constants

GUIDANCE = 7.5


def _loss(latents: Tensor, pred: Tensor, s: Tensor) -> None:
    result = policy_loss(
        latents, latents, pred, s, s, s, s, s, pred_uncond=pred, guidance=GUIDANCE, pred_ref=pred, kl_coef=0.1,
        kl_kind="chi2", weight=s,
    )  # fmt: skip
    result.loss.backward()


def _group_norm(x: Tensor, s: Tensor) -> None:
    channels = x.shape[1]
    weight = s.new_empty(channels, requires_grad=True)
    group_norm_silu(x, weight, weight, 32 if channels % 32 == 0 else channels).sum().backward()


def _residual_norm_modulate(x: Tensor, s: Tensor) -> None:
    vector, weight = x[:, 0], x[0, 0]
    residual, y = residual_norm_modulate(x, vector, x, vector, vector, weight=weight, bias=weight)
    (residual + y).sum().backward()


# Called with a batch x (B, ...) and one number a sample, s (B,) fp32. Whatever they hold, launches are the same.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sample": lambda x, s: policy_sample(x, x, s, s, s, pred_uncond=x, guidance=GUIDANCE),
    "sample, drawn": lambda x, s: policy_sample(
        x, x, s, s, s, pred_uncond=x, guidance=GUIDANCE, seed=s.long(), offset=s.long()
    ),
    "log_prob": lambda x, s: policy_log_prob(x, x, x, s, s, s).backward(s),
    "divergence": lambda x, s: policy_divergence(x, x, s, s, kind="chi2").sum().backward(),
    "loss": lambda x, s: _loss(x, x, s),
    "loss, mixed": lambda x, s: _loss(x.detach().float(), x, s),
    "advantage": lambda x, s: group_advantage(x.flatten(), x[0].numel(), scale="global_std"),
    "group_norm": _group_norm,
    "group_norm, NHWC": lambda x, s: _group_norm(x.to(memory_format=torch.channels_last), s),
    "modulate": lambda x, s: norm_modulate(x, x[:, 0], x[:, 0]).sum().backward(),
    "modulate, gated": _residual_norm_modulate,
    "gated_residual": lambda x, s: gated_residual(x, x[:, 0], x).sum().backward(),
    "geglu": lambda x, s: geglu(torch.cat([x, x], -1)).sum().backward(),
}


class Case(NamedTuple):
    """A kernel as an operation launches it on some rows, and its budget on any of the targets.

    Budgets are the most that Triton 3.6 and 3.7 were seen to use, rounded up to 8: registers are allotted by the eight.
    """

    kernel: str
    """module.name"""
    operation: str
    rows: Rows
    registers: int
    """at most, a thread of an NVIDIA GPU"""
    vgprs: int
    """at most, a thread of an AMD GPU"""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    vectors: bool = True
    """whether blocks must be read and written in vectors where rows are aligned"""
    stack: int = 0
    """bytes at most"""


ALL = (torch.float16, torch.bfloat16, torch.float32)
MIXED = (torch.bfloat16,)
SUMS = (torch.float32,)  # sums are fp32 whatever was summed

CASES = (
    Case("rows.row_sums", "sample", SDXL, 56, 32, ALL),
    Case("rows.row_sums", "sample", ODD, 64, 32),
    Case("rows.row_sums", "sample", SHIFTED, 56, 24),
    Case("rows.row_sums", "sample, drawn", SDXL, 64, 24, ALL),
    Case("rows.row_sums", "sample, drawn", ODD, 72, 40),
    Case("rows.row_sums", "sample, drawn", ONE, 40, 24),
    Case("rows.row_sums", "log_prob", SDXL, 40, 24),
    Case("rows.row_sums", "divergence", SDXL, 32, 24),
    Case("rows.row_sums", "loss", DIGITS, 40, 16),
    Case("rows.row_sums", "loss", VIDEO, 64, 32),
    Case("rows.row_sums", "loss, mixed", SDXL, 48, 24, MIXED),
    Case("rows.row_sums", "loss", ODD, 64, 32),
    Case("rows.row_sums", "loss", SHIFTED, 64, 32),
    Case("rows.row_sums", "loss", ONE, 32, 16),
    Case("gaussian_policy.score", "log_prob", VIDEO, 32, 32, SUMS),
    Case("gaussian_policy.score", "log_prob", ONE, 16, 16, SUMS),
    Case("policy_divergence.divergence", "divergence", VIDEO, 32, 32, SUMS),
    Case("policy_divergence.divergence", "divergence", ONE, 16, 16, SUMS),
    Case("policy_loss.loss", "loss", VIDEO, 56, 40, SUMS),
    Case("policy_loss.loss", "loss", ODD, 32, 32, SUMS),
    Case("policy_loss.loss", "loss", ONE, 32, 24, SUMS),
    Case("policy_backward.backward", "log_prob", SDXL, 40, 16),
    Case("policy_backward.backward", "loss", SDXL, 56, 32, ALL),
    Case("policy_backward.backward", "loss, mixed", SDXL, 48, 32, MIXED),
    Case("policy_backward.backward", "loss", ODD, 64, 32),
    Case("policy_backward.backward", "loss", SHIFTED, 56, 32),
    Case("policy_backward.backward", "loss", ONE, 32, 24),
    Case("group_advantage.advantage", "advantage", GROUP, 40, 16),
    Case("group_advantage.advantage", "advantage", LARGE_GROUP, 96, 48, SUMS),
    Case("group_advantage.advantage", "advantage", ONE, 24, 16, SUMS),
    Case("group_norm.forward", "group_norm", UNET_DEEP, 64, 48),
    Case("group_norm.forward", "group_norm, NHWC", UNET_DEEP, 88, 56),
    Case("group_norm.forward", "group_norm", ODD, 64, 32),
    Case("group_norm.forward", "group_norm", ONE, 24, 8),
    Case("group_norm.moments", "group_norm", UNET_WIDE, 56, 32),
    Case("group_norm.moments", "group_norm, NHWC", UNET_WIDE, 64, 40),
    # the partial sums of a group or a channel begin anywhere
    Case("group_norm.statistics", "group_norm", UNET_WIDE, 24, 16, SUMS, vectors=False),
    Case("group_norm.apply", "group_norm", UNET_WIDE, 80, 48),
    Case("group_norm.apply", "group_norm, NHWC", UNET_WIDE, 80, 56),
    Case("group_norm.backward", "group_norm", UNET_DEEP, 128, 80),
    Case("group_norm.backward", "group_norm", UNET_WIDE, 112, 88),
    Case("group_norm.backward", "group_norm, NHWC", UNET_WIDE, 120, 96),
    Case("group_norm.backward", "group_norm", ODD, 80, 48),
    Case("group_norm.backward", "group_norm", ONE, 24, 16),
    # as above
    Case("group_norm.totals", "group_norm", UNET_WIDE, 56, 24, SUMS, vectors=False),
    Case("group_norm.totals", "group_norm", ONE, 48, 24, SUMS),
    Case("group_norm.input_gradient", "group_norm", UNET_WIDE, 80, 72),
    Case("group_norm.input_gradient", "group_norm, NHWC", UNET_WIDE, 152, 80),
    Case("modulate.forward", "modulate", SD3, 40, 24),
    Case("modulate.forward", "modulate, gated", FLUX, 64, 32),
    Case("modulate.forward", "modulate, gated", ODD_TOKENS, 80, 40),
    Case("modulate.forward", "modulate, gated", ONE, 40, 24),
    Case("modulate.backward", "modulate", SD3, 64, 40),
    # NVIDIA's assembler stops short of registers that would keep a second program off the multiprocessor
    Case("modulate.backward", "modulate, gated", FLUX, 112, 56, stack=16),
    Case("modulate.backward", "modulate, gated", ODD_TOKENS, 152, 72, stack=8),
    Case("modulate.backward", "modulate, gated", ONE, 48, 24),
    Case("modulate.total", "modulate, gated", FLUX, 72, 64),
    Case("modulate.total", "modulate, gated", ONE, 24, 16),
    Case("gated_residual.forward", "gated_residual", FLUX, 40, 24),
    Case("gated_residual.forward", "gated_residual", ODD_TOKENS, 48, 32),
    Case("gated_residual.forward", "gated_residual", ONE, 24, 16),
    Case("gated_residual.backward", "gated_residual", FLUX, 64, 32),
    Case("gated_residual.backward", "gated_residual", ODD_TOKENS, 48, 40),
    Case("gated_residual.backward", "gated_residual", ONE, 24, 16),
    Case("gated_residual.total", "gated_residual", FLUX, 56, 24),
    Case("gated_residual.total", "gated_residual", ONE, 16, 8),
    Case("geglu.forward", "geglu", SD3, 48, 24),
    Case("geglu.forward", "geglu", ODD_TOKENS, 40, 32),
    Case("geglu.forward", "geglu", ONE, 16, 16),
    Case("geglu.backward", "geglu", SD3, 56, 32),
    Case("geglu.backward", "geglu", ODD_TOKENS, 64, 48),
    Case("geglu.backward", "geglu", ONE, 40, 32),
)
