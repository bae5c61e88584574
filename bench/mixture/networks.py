"""The networks in the plane: multilayer perceptrons of five layers with SiLU, as in VarDiU's code (2508.20646)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD = 23.0  # standard deviation of the target's coordinates, about; the scale of inputs and outputs
NOISE = 2  # elements of the generator's noise
SHARPNESS = 8.0  # factor on inputs, without which these networks are too smooth at first to tell 40 modes apart


def perceptron(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Five linear layers with SiLU between them."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.SiLU())]
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), *hidden, nn.Linear(width, outputs))


class Generator(nn.Module):
    """One step from noise (N, 2) to samples (N, 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = perceptron(NOISE, 2, width)

    def forward(self, z: Tensor) -> Tensor:
        return SPREAD * self.net(SHARPNESS * z)


class Denoiser(nn.Module):
    """Preconditioned as in EDM (Karras et al. 2022, arXiv 2206.00364): predicts samples (N, 2) from samples + sigma
    noise (N, 2), at sigma (N,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = perceptron(3, 2, width)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.unsqueeze(1)
        variance = sigma**2 + SPREAD**2
        return x * SPREAD**2 / variance + sigma * SPREAD / variance.sqrt() * self.net(_inputs(x, sigma))


class Posterior(nn.Module):
    """log q(z | x) (N,) of noise z (N, 2) at samples + sigma noise x (N, 2), by a density of models/posterior.py."""

    def __init__(self, head: nn.Module, width: int) -> None:
        super().__init__()
        self.head = head
        self.net = perceptron(3, head.parameters_per_position, width)

    def forward(self, z: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        share = sigma / (sigma**2 + SPREAD**2).sqrt()  # of noise; without it a mixture lost 14 modes of 40
        return self.head(z, self.net(_inputs(x, sigma.unsqueeze(1))), share)


def _inputs(x: Tensor, sigma: Tensor) -> Tensor:
    return SHARPNESS * torch.cat([x / (sigma**2 + SPREAD**2).sqrt(), sigma.log() / 4], 1)
