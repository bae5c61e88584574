"""Densities: against torch.distributions, numerical integrals and autograd's Jacobians, in float64."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F

from engine.models.posterior import ONE, FlowPosterior, GaussianPosterior, MixturePosterior


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def _flow(channels: int, *, image: bool = False) -> FlowPosterior:
    """With weights large enough that every layer bends."""
    flow = FlowPosterior(channels, layers=4, components=3, width=4, image=image).double()
    for layer in flow.layers:
        nn.init.normal_(layer[-1].weight, std=0.3)
        nn.init.normal_(layer[-1].bias, std=0.3)
    return flow


def _scale(count: int) -> torch.Tensor:
    return torch.linspace(0.1, 1, count, dtype=torch.float64)


def _std(raw: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (raw.dim() - 1)) * F.softplus(raw + ONE) + 1e-3


def _total(density: nn.Module, parameters: torch.Tensor, scale: torch.Tensor, channels: int) -> float:
    """The integral of a density of vectors with 1 or 2 elements, by the trapezoidal rule."""
    axis = torch.linspace(-14, 14, 1401, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * channels).view(-1, channels)
    with torch.no_grad():
        parts = [
            density(part, parameters.expand(len(part), -1), scale.expand(len(part))).exp().sum()
            for part in points.split(50_000)
        ]
    return float(sum(parts)) * float(axis[1] - axis[0]) ** channels


def test_the_gaussian_is_torchs():
    z, parameters = torch.randn(5, 3, 4, 4).double(), torch.randn(5, 6, 4, 4).double()
    mean, raw = parameters.chunk(2, 1)
    expected = Independent(Normal(mean, _std(raw, _scale(5))), 3).log_prob(z)
    torch.testing.assert_close(GaussianPosterior(3)(z, parameters, _scale(5)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (4, 4)])
def test_the_mixture_is_torchs(shape):
    z, parameters = torch.randn(5, 2, *shape).double(), torch.randn(5, 15, *shape).double()
    weights, means, raw = parameters.split([3, 6, 6], 1)
    components = Normal(means.reshape(5, 3, 2, *shape), _std(raw, _scale(5)).reshape(5, 3, 2, *shape))
    chosen = Categorical(logits=weights.reshape(5, 3, -1).mean(2))
    expected = MixtureSameFamily(chosen, Independent(components, 1 + len(shape))).log_prob(z)
    torch.testing.assert_close(MixturePosterior(2, 3)(z, parameters, _scale(5)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [GaussianPosterior, lambda channels: MixturePosterior(channels, 3), _flow])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_every_density_integrates_to_one(make, channels, scale):
    density = make(channels)
    parameters = 0.5 * torch.randn(1, density.parameters_per_position).double()
    assert abs(_total(density, parameters, torch.tensor([scale]).double(), channels) - 1) < 1e-6


@pytest.mark.parametrize(("shape", "image"), [((3,), False), ((2, 4, 4), True)])
def test_the_flows_jacobian_is_autograds(shape, image):
    flow = _flow(shape[0], image=image)
    z = torch.randn(1, *shape).double()
    parameters = torch.randn(1, flow.parameters_per_position, *shape[1:]).double()
    scale = torch.tensor([0.3]).double()
    _, log_jacobian = flow.to_base(z, parameters, scale)
    matrix = torch.autograd.functional.jacobian(lambda z: flow.to_base(z, parameters, scale)[0].flatten(), z)
    expected = torch.linalg.slogdet(matrix.view(z.numel(), z.numel()))[1]
    torch.testing.assert_close(log_jacobian[0], expected, rtol=1e-10, atol=1e-10)


def test_a_layer_of_the_flow_is_increasing_and_reaches_every_number():
    """So that bisection inverts it, in the second of two elements: the first is given to a first layer."""
    flow = FlowPosterior(2, layers=1, components=3, width=4, image=False).double()
    nn.init.normal_(flow.layers[0][-1].bias)
    wanted, parameters = 3 * torch.randn(50, 2).double(), torch.randn(50, flow.parameters_per_position).double()
    mean, raw, _ = parameters.tensor_split([2, 4], 1)
    scale = _scale(50)
    low, high = torch.full((50,), -200.0).double(), torch.full((50,), 200.0).double()
    with torch.no_grad():
        for _ in range(80):
            middle = (low + high) / 2
            z = torch.stack([wanted[:, 0] * _std(raw, scale)[:, 0] + mean[:, 0], middle], 1)
            reached, _ = flow.to_base(z, parameters, scale)
            below = reached[:, 1] < wanted[:, 1]
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    torch.testing.assert_close(reached, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [GaussianPosterior, lambda channels: MixturePosterior(channels, 3), _flow])
def test_gradients_reach_latent_and_parameters(make):
    density = make(2)
    z = torch.randn(2, 2).double().requires_grad_()
    parameters = torch.randn(2, density.parameters_per_position).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *values: density(*values, _scale(2)), (z, parameters))
