"""Densities of a latent given what was made of it: q(z | features), each with its normalisation.

A density is a head: it reads parameters that a network computed and gives log q(z). Latents are vectors (B, C) or
images (B, C, H, W), and parameters have the latents' positions. Computation keeps the latents' dtype.

`scale` (B,), if given, multiplies every standard deviation. With the share of noise in what the network saw, it says
from the start that z is known the better, the less noise there is (as in VarDiU's code, arXiv 2508.20646). So it is
where all of z shows in what was made of it, and not in images, of whose noise much is lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NARROWEST = 1e-3  # standard deviation that a density cannot fall below, so that log q stays bounded
ONE = math.log(math.e - 1 - NARROWEST)  # softplus(ONE) + NARROWEST is about 1


class GaussianPosterior(nn.Module):
    """Independent Gaussians: mean and standard deviation of every element.

    Args:
        channels: C of the latents.

    Attributes:
        parameters_per_position: channels of the parameters that `forward` reads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parameters_per_position = 2 * channels

    def forward(self, z: Tensor, parameters: Tensor, scale: Tensor | None = None) -> Tensor:
        """log q(z): (B,).

        Args:
            z: (B, C, ...).
            parameters: (B, 2 C, ...); at 0 the density is the standard normal's, as wide as `scale`.
            scale: (B,).
        """
        mean, raw = parameters.chunk(2, dim=1)
        return _log_normal(z, mean, _std(raw, scale)).flatten(1).sum(1)


class MixturePosterior(nn.Module):
    """A mixture over whole latents of K components, each of independent Gaussians (Bishop 1994, mixture density
    networks); the weights are the average of their parameters over the positions.

    Args:
        channels: C of the latents.
        components: K.
    """

    def __init__(self, channels: int, components: int) -> None:
        super().__init__()
        self.components = components
        self.parameters_per_position = components * (2 * channels + 1)

    def forward(self, z: Tensor, parameters: Tensor, scale: Tensor | None = None) -> Tensor:
        """log q(z): (B,).

        Args:
            z: (B, C, ...).
            parameters: (B, K (2 C + 1), ...): K weights, then K C means, then K C standard deviations.
            scale: (B,).
        """
        sizes = [self.components, *[self.components * z.shape[1]] * 2]
        weights, means, raw = parameters.split(sizes, dim=1)
        shape = (len(z), self.components, *z.shape[1:])
        log_weights = weights.flatten(2).mean(2).log_softmax(1) if weights.dim() > 2 else weights.log_softmax(1)
        densities = _log_normal(z.unsqueeze(1), means.reshape(shape), _std(raw, scale).reshape(shape))
        return torch.logsumexp(log_weights + densities.flatten(2).sum(2), dim=1)


class FlowPosterior(nn.Module):
    """Conditional coupling layers on top of independent Gaussians; each element goes through the logit of a mixture of
    logistic distributions (Flow++, Ho et al. 2019, arXiv 1902.00275), which is increasing, smooth and onto.

    The latents are normalised by the mean and standard deviation of the parameters, as in GaussianPosterior. Then each
    layer transforms half of the elements (channels of a vector, a checkerboard of an image) given the other half and
    the parameters' remaining channels. All Jacobians are in log q.

    Args:
        channels: C of the latents, at least 2 for vectors.
        layers: of coupling; an even number treats both halves alike.
        components: logistic distributions of an element.
        width: of the layers' networks, and channels of the context that they read.
        image: latents are images.
    """

    def __init__(self, channels: int, *, layers: int, components: int, width: int, image: bool) -> None:
        super().__init__()
        self.channels, self.components, self.image = channels, components, image
        self.parameters_per_position = 2 * channels + width
        self.layers = nn.ModuleList()
        for _ in range(layers):
            outputs = channels * 3 * components
            first, last = (
                (nn.Conv2d(channels + width, width, 3, padding=1), nn.Conv2d(width, outputs, 1))
                if image
                else (nn.Linear(channels + width, width), nn.Linear(width, outputs))
            )
            nn.init.normal_(last.weight, std=0.01)  # near the identity, but not alike, or the components stay alike
            nn.init.normal_(last.bias, std=0.1)
            self.layers.append(nn.Sequential(first, nn.SiLU(), last))

    def forward(self, z: Tensor, parameters: Tensor, scale: Tensor | None = None) -> Tensor:
        """log q(z): (B,).

        Args:
            z: (B, C, ...).
            parameters: (B, 2 C + width, ...).
            scale: (B,).
        """
        base, log_jacobian = self.to_base(z, parameters, scale)
        return _log_normal(base, torch.zeros_like(base), torch.ones_like(base)).flatten(1).sum(1) + log_jacobian

    def to_base(self, z: Tensor, parameters: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The standard normal latent (B, C, ...) that a latent is mapped to, and log |d base / d z| (B,)."""
        mean, raw, context = parameters.tensor_split([self.channels, 2 * self.channels], dim=1)
        std = _std(raw, scale)
        x = (z - mean) / std
        log_jacobian = -std.log().flatten(1).sum(1)
        for index, layer in enumerate(self.layers):
            given = self._given(x, index)
            seen = torch.cat([x * given, context], 1).to(layer[0].weight.dtype)
            x_new, log_slope = _mixture_logit(x, layer(seen).to(x.dtype), self.components)
            x = torch.where(given, x, x_new)
            log_jacobian = log_jacobian + (log_slope * ~given).flatten(1).sum(1)
        return x, log_jacobian

    def _given(self, x: Tensor, index: int) -> Tensor:
        """The elements that a layer leaves as they are: bool, broadcasts to x."""
        if not self.image:
            return (torch.arange(x.shape[1], device=x.device) + index) % 2 == 0
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
        return (rows[:, None] + columns + index) % 2 == 0


def _mixture_logit(x: Tensor, parameters: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """logit of the mixture's distribution function at x, and its log-slope, both (B, C, ...)."""
    weights, shifts, log_scales = parameters.reshape(len(x), x.shape[1], 3, components, *x.shape[2:]).unbind(2)
    log_weights = weights.log_softmax(2)
    scaled = (x.unsqueeze(2) - shifts) * log_scales.exp()
    below, above = F.logsigmoid(scaled), F.logsigmoid(-scaled)
    log_below, log_above = torch.logsumexp(log_weights + below, 2), torch.logsumexp(log_weights + above, 2)
    log_density = torch.logsumexp(log_weights + below + above + log_scales, 2)
    return log_below - log_above, log_density - log_below - log_above


def _log_normal(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((z - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def _std(raw: Tensor, scale: Tensor | None) -> Tensor:
    std = F.softplus(raw + ONE)
    return (std if scale is None else scale.view(-1, *[1] * (raw.dim() - 1)) * std) + NARROWEST
