"""Linear layers in 8 and 4 bits as bitsandbytes 0.50 computes them: how many bytes they store, keep and allocate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NF4_BLOCK, NESTED_BLOCK = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)  # the sixteen values, those of the nested scales, and their offset


def weight_bytes(kind: str, weight: Tensor) -> int:
    """Bytes of a linear layer's weight (out, in) with its scales: "int8" has one for each row, "nf4" one for each block
    of 64, in 8 bits themselves, with one in fp32 for each 256 of those."""
    if kind == "int8":
        return weight.numel() + 4 * weight.shape[0]
    blocks = math.ceil(weight.numel() / NF4_BLOCK)
    return math.ceil(weight.numel() / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + NF4_TABLES


def imitate(network: nn.Module, kind: str) -> None:
    """Let a network's frozen linear layers keep and allocate what quantised ones do, in place; for tracing only."""
    for module in network.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = {"int8": _Int8, "nf4": _Nf4}[kind]


class _Nf4(nn.Linear):
    """Dequantised as a whole in both passes; the input is not kept."""

    def forward(self, input: Tensor) -> Tensor:
        return _Frozen.apply(input, self.weight, self.bias, False)


class _Int8(nn.Linear):
    """The input is kept, and quantised through fp16; the weight is dequantised in the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return _Frozen.apply(input, self.weight, self.bias, True)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(weight, *([input] if keeps_input else []))
        if keeps_input:
            half = input.to(torch.float16)
            half.to(torch.int8)
            return F.linear(input, weight, bias)
        return F.linear(input, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ torch.empty_like(ctx.saved_tensors[0]), None, None, None
