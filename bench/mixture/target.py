"""The target: a mixture of 40 Gaussians in the plane, with its exact density, score and denoiser at any noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Equal weights, isotropic components.

    Attributes:
        means: (M, 2).
        std: of every component.
    """

    means: Tensor
    std: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2) independent samples."""
        component = torch.randint(len(self.means), (count,), generator=generator)
        return self.means[component] + self.std * torch.randn(count, 2, generator=generator)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log-density (N,) of sample + sigma noise at x (N, 2); sigma (N,) or a number."""
        variance = torch.as_tensor(self.std**2 + sigma**2)
        log_components = -(torch.cdist(x, self.means) ** 2) / (2 * variance.view(-1, 1))
        return torch.logsumexp(log_components, 1) - (2 * math.pi * variance).log() - math.log(len(self.means))

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gradient (N, 2) of `log_prob` at x (N, 2), for sigma (N,)."""
        variance = (self.std**2 + sigma**2).view(-1, 1)
        weights = (-(torch.cdist(x, self.means) ** 2) / (2 * variance)).softmax(1)
        return (weights @ self.means - x) / variance

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The mean (N, 2) of the sample given sample + sigma noise = x, by Tweedie's formula."""
        return x + sigma.view(-1, 1) ** 2 * self.score(x, sigma)


def mixture_of_40(seed: int = 0) -> Mixture:
    """The layout of FAB (Midgley et al. 2023, arXiv 2208.01893): means uniform in [-40, 40]^2, std softplus(1)."""
    places = torch.rand(40, 2, generator=torch.Generator().manual_seed(seed))
    return Mixture((places - 0.5) * 80, math.log1p(math.e))
