"""How close samples are to the target: the two figures of VarDiU's code (arXiv 2508.20646)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDEST, HALVINGS = 4.0, 4  # Gaussian kernels of the bandwidths 4, 2, 1, 1/2 and 1/4


def log_mmd(x: Tensor, y: Tensor) -> float:
    """log of the squared maximum mean discrepancy of x (N, 2) and y (M, 2), averaged over Gaussian kernels
    exp(-d^2 / (2 bandwidth^2)) of the five bandwidths; the biased estimate, pairs with themselves included, so it is
    positive."""
    return math.log(_kernel_mean(x, x) + _kernel_mean(y, y) - 2 * _kernel_mean(x, y))


def _kernel_mean(x: Tensor, y: Tensor, rows: int = 500) -> float:
    total = 0.0
    for part in x.split(rows):
        squared = (part[:, :1] - y[:, 0]).square() + (part[:, 1:] - y[:, 1]).square()
        kernel = (squared / (-2 * WIDEST**2)).exp()
        total += float(kernel.sum(dtype=torch.float64))
        for _ in range(HALVINGS):
            kernel = kernel.square_().square_()  # half the bandwidth
            total += float(kernel.sum(dtype=torch.float64))
    return total / (len(x) * len(y) * (HALVINGS + 1))
