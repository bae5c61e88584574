"""VarDiU: its gradient against closed forms of linear Gaussian students, its law of noise levels, and that it trains.

For x0 = A z + b and x = alpha x0 + sigma noise all distributions are Gaussian. Expectations are taken by Gauss-Hermite
quadrature, which is exact for the polynomials that occur, so tolerances are those of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from engine.errors import EngineError
from engine.models.posterior import ONE, GaussianPosterior
from engine.models.process import levels
from engine.objectives.score_matching import matching_gradient
from engine.objectives.vardiu import POSTERIOR, annealed_level, bound_loss, level_weight

KIND = "objective.kind=vardiu"
HEAD = "objective.vardiu.posterior.head"
DIT = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}", "rollout.conditions=2", "train.batch_size=4")


def _quadrature(dimensions: int, nodes: int = 4) -> tuple[Tensor, Tensor]:
    """Points (N, dimensions) and weights (N,) that integrate polynomials of degree 2 nodes - 1 over N(0, I)."""
    points, weights = (torch.from_numpy(values) for values in numpy.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(*[points] * dimensions).view(-1, dimensions)
    return grid, torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * dimensions).view(-1, dimensions).prod(1)


# ---------------------------------------------------------------- one dimension

A, B, SIGMA, MEAN, VARIANCE = 0.8, 0.3, 0.6, -0.4, 0.5  # student a z + b, noise, teacher N(mean, variance)
SLOPE, POSTERIOR_VARIANCE = A / (A**2 + SIGMA**2), SIGMA**2 / (A**2 + SIGMA**2)
KL_GRADIENT = (
    A / (VARIANCE + SIGMA**2) - A / (A**2 + SIGMA**2),
    (B - MEAN) / (VARIANCE + SIGMA**2),
)


def _gradients(
    slope: float, offset: float, variance: float, *, control_variate: bool = True, sign: float = 1.0
) -> Tensor:
    """Every node's gradient (N, 2) in (a, b), for the posterior N(slope x + offset, variance); sign of the noise."""
    points, _ = _quadrature(2)
    z, noise = points[:, 0], sign * points[:, 1]
    student = torch.tensor([A, B], dtype=torch.float64).repeat(len(z), 1).requires_grad_()
    image = (student[:, 0] * z + student[:, 1]).unsqueeze(1)
    x = image + SIGMA * noise.unsqueeze(1)
    log_posterior = -((z.unsqueeze(1) - slope * x - offset) ** 2).sum(1) / (2 * variance)
    teacher_score = (MEAN - x) / (VARIANCE + SIGMA**2)
    one = torch.ones_like(z)
    loss = bound_loss(
        log_posterior, teacher_score, image, noise.unsqueeze(1), one, SIGMA * one, control_variate=control_variate
    )
    return torch.autograd.grad(loss.sum(), student)[0]


def _mean(gradients: Tensor) -> Tensor:
    return (_quadrature(2)[1].unsqueeze(1) * gradients).sum(0)


def _std(gradients: Tensor) -> Tensor:
    return (_mean(gradients.square()) - _mean(gradients).square()).clamp(min=0).sqrt()


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize(
    ("slope", "offset", "variance", "expected"),
    [
        (SLOPE, -SLOPE * B, POSTERIOR_VARIANCE, (0.1302, 0.8140)),
        (SLOPE, -SLOPE * B, 1.3 * POSTERIOR_VARIANCE, (0.3148, 0.8140)),
        (SLOPE + 0.1, 0.2 - SLOPE * B, 1.3 * POSTERIOR_VARIANCE, (0.3918, 1.2563)),
    ],
)
def test_the_mean_gradient_is_that_of_the_bound(slope, offset, variance, expected, control_variate):
    """-E log r is (Var + mean^2) / (2 variance) of z - slope x - offset, and -E log p likewise of x - MEAN."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    rest = (1 - slope * a) ** 2 + (slope * SIGMA) ** 2 + (slope * b + offset) ** 2
    bound = rest / (2 * variance) + (a**2 + SIGMA**2 + (b - MEAN) ** 2) / (2 * (VARIANCE + SIGMA**2))
    closed = torch.stack(torch.autograd.grad(bound, (a, b)))
    found = _mean(_gradients(slope, offset, variance, control_variate=control_variate))
    torch.testing.assert_close(found, closed, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-5)


def test_with_the_exact_posterior_the_bounds_gradient_is_the_kls():
    found = _mean(_gradients(SLOPE, -SLOPE * B, POSTERIOR_VARIANCE))
    torch.testing.assert_close(found, torch.tensor(KL_GRADIENT, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_control_variate_and_antithetic_pairs_lower_the_variance():
    exact = (SLOPE, -SLOPE * B, POSTERIOR_VARIANCE)
    plain = _gradients(*exact, control_variate=False)
    pairs = (plain + _gradients(*exact, control_variate=False, sign=-1)) / 2
    controlled = _gradients(*exact)
    expected = {"plain": (1.95, 1.77), "pairs": (0.84, 0.13), "controlled": (0.84, 0.16)}
    for name, gradients in {"plain": plain, "pairs": pairs, "controlled": controlled}.items():
        assert _std(gradients).tolist() == pytest.approx(expected[name], abs=6e-3), name


# ---------------------------------------------------------------- more dimensions


class Linear:
    """Students R^k -> R^d at alpha x0 + sigma noise, and a Gaussian teacher."""

    def __init__(self, k: int, d: int, alpha: float = 0.9, sigma: float = 0.6) -> None:
        generator = torch.Generator().manual_seed(10 * k + d)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.k, self.d, self.alpha, self.sigma = k, d, alpha, sigma
        self.matrix, self.offset, self.teacher_mean = draw(d, k).requires_grad_(), draw(d).requires_grad_(), draw(d)
        root = draw(d, d)
        noise = sigma**2 * torch.eye(d, dtype=torch.float64)
        self.teacher = MultivariateNormal(alpha * self.teacher_mean, alpha**2 * (root @ root.T + 0.3) + noise)
        points, self.weights = _quadrature(k + d, nodes=3)
        self.z, self.noise = points.split([k, d], 1)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.matrix, self.offset

    def student(self) -> MultivariateNormal:
        noise = self.sigma**2 * torch.eye(self.d, dtype=torch.float64)
        return MultivariateNormal(self.alpha * self.offset, self.alpha**2 * self.matrix @ self.matrix.T + noise)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """The student's own, of z given x (N, d)."""
        scaled = self.alpha * self.matrix
        precision = torch.eye(self.k, dtype=torch.float64) + scaled.T @ scaled / self.sigma**2
        mean = torch.linalg.solve(precision, scaled.T @ (x - self.alpha * self.offset).T / self.sigma**2).T
        return MultivariateNormal(mean, precision_matrix=precision)

    def images(self) -> tuple[Tensor, Tensor]:
        image = self.z @ self.matrix.T + self.offset
        return image, self.alpha * image + self.sigma * self.noise

    def score(self, distribution: MultivariateNormal, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(distribution.log_prob(x).sum(), x)[0]

    def loss(self, image: Tensor, x: Tensor, log_posterior: Tensor) -> Tensor:
        one = torch.ones(len(x), dtype=torch.float64)
        score = self.score(self.teacher, x)
        return bound_loss(log_posterior, score, image, self.noise, self.alpha * one, self.sigma * one)


def _mean_field(problem: Linear) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], MultivariateNormal]]:
    """Parameters for `GaussianPosterior` that are linear in x, and the same density as torch's."""
    generator = torch.Generator().manual_seed(1)
    weight = 0.3 * torch.randn(problem.k, problem.d, generator=generator, dtype=torch.float64)
    raw = 0.3 * torch.randn(problem.k, generator=generator, dtype=torch.float64)
    std = torch.nn.functional.softplus(raw + ONE) + 1e-3
    return (
        lambda x: torch.cat([x @ weight.T, raw.expand(len(x), -1)], 1),
        lambda x: MultivariateNormal(x @ weight.T, torch.diag(std.square())),
    )


SHAPES = [(1, 1), (2, 3), (3, 2)]


@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_the_bound_exceeds_the_kl_by_the_gap_between_the_posteriors(k, d):
    problem = Linear(k, d)
    parameters_at, density = _mean_field(problem)
    _, x = problem.images()
    conditional = MultivariateNormal(x - problem.sigma * problem.noise, problem.sigma**2 * torch.eye(d).double())
    prior = MultivariateNormal(torch.zeros(k).double(), torch.eye(k).double())
    log_r = GaussianPosterior(k)(problem.z, parameters_at(x))
    terms = conditional.log_prob(x) + prior.log_prob(problem.z) - log_r - problem.teacher.log_prob(x)
    gap = (problem.weights * kl_divergence(problem.posterior(x), density(x))).sum()
    excess = (problem.weights * terms).sum() - kl_divergence(problem.student(), problem.teacher)
    torch.testing.assert_close(excess, gap, rtol=1e-10, atol=1e-10)
    assert gap > 0.01


@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_the_gradient_is_that_of_kl_and_gap(k, d):
    problem = Linear(k, d)
    parameters_at, density = _mean_field(problem)
    image, x = problem.images()
    loss = problem.loss(image, x, GaussianPosterior(k)(problem.z, parameters_at(x)))
    found = torch.autograd.grad((problem.weights * loss).sum(), problem.parameters)
    _, x = problem.images()
    gap = (problem.weights * kl_divergence(problem.posterior(x), density(x))).sum()
    expected = torch.autograd.grad(gap + kl_divergence(problem.student(), problem.teacher), problem.parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_with_the_exact_posterior_every_sample_is_diff_instructs(k, d):
    problem = Linear(k, d)
    image, x = problem.images()
    image.retain_grad()
    with torch.no_grad():
        scaled, offset = problem.alpha * problem.matrix, problem.offset
        precision = torch.eye(k, dtype=torch.float64) + scaled.T @ scaled / problem.sigma**2
        gain = torch.linalg.solve(precision, scaled.T) / problem.sigma**2
    posterior = MultivariateNormal((x - problem.alpha * offset.detach()) @ gain.T, precision_matrix=precision)
    problem.loss(image, x, posterior.log_prob(problem.z)).sum().backward()

    def mean_image(score: Tensor) -> Tensor:  # by Tweedie's formula
        return (x.detach() + problem.sigma**2 * score) / problem.alpha

    real, fake = (mean_image(problem.score(p, x)) for p in (problem.teacher, problem.student()))
    alpha, sigma = (torch.full((len(x),), value, dtype=torch.float64) for value in (problem.alpha, problem.sigma))
    expected = matching_gradient(image.detach(), real, fake, alpha, sigma, normaliser="none")
    torch.testing.assert_close(image.grad, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- noise levels


def test_noise_levels_go_from_coarse_to_fine():
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [float(annealed_level(u, progress, 0.0, 1.0, (0.1, 2.0)).mean()) for progress in (0.0, 0.5, 1.0)]
    # E u^p = 1 / (p + 1), with a standard error of at most 0.003
    assert means == pytest.approx([1 / 1.1, 1 / (1 + math.sqrt(0.2)), 1 / 3.0], abs=0.01)
    ends = annealed_level(torch.tensor([0.0, 1.0]), 0.3, 0.2, 0.7, (0.5, 2.0))
    torch.testing.assert_close(ends, torch.tensor([0.2, 0.7]))


def test_weights_are_powers_of_sigma():
    sigma = torch.tensor([0.5, 2.0])
    weights = [level_weight(sigma, kind).tolist() for kind in ("none", "sigma", "sigma2")]
    assert weights == [[1.0, 1.0], [0.5, 2.0], [0.25, 4.0]]


# ---------------------------------------------------------------- in a run


def test_the_students_gradient_is_that_of_the_bound(start, tiny_teacher):
    """With r(z | x) = N(x, 1) for the posterior: all else by stock networks and formulas written out."""
    from diffusers import UNet2DModel

    trainer = start(KIND, "student.steps=1", "train.batch_size=4", "teacher.guidance=2")
    objective, examples = trainer.objective, trainer.objective.draw("student", 0)
    objective.posterior = lambda z, x, timestep, condition: -0.5 * (z - x).square().flatten(1).sum(1)
    trainer.engine.backward(objective.loss("student", examples).loss)

    stock = UNet2DModel.from_pretrained(tiny_teacher, subfolder="unet")
    z, noise, timestep = (examples[name] for name in ("initial", "noise", "timestep"))
    labels, schedule = examples.condition["class_labels"], trainer.parts["vardiu"].objective.context.teacher.schedule
    first = torch.full((4,), int(schedule.timesteps(1)[0]))

    def root(values: Tensor) -> Tensor:
        return values.sqrt().float().view(-1, 1, 1, 1)

    product = schedule.alphas_cumprod
    image = (z - root(1 - product[first]) * stock(z, first, class_labels=labels).sample) / root(product[first])
    alpha, sigma = root(product[timestep]), root(1 - product[timestep])
    x = alpha * image + sigma * noise
    with torch.no_grad():
        nothing = stock(x, timestep, class_labels=torch.full_like(labels, 10)).sample
        predicted = nothing + 2 * (stock(x, timestep, class_labels=labels).sample - nothing)
    bound = 0.5 * (z - x).square() - alpha * ((noise - predicted) / sigma) * image
    (sigma.square() * bound).mean().backward()
    ours = torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()])
    theirs = torch.cat([p.grad.flatten() for p in stock.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * 1e-4)
    assert float(theirs.norm()) > 0


def test_antithetic_pairs_are_one_image_with_opposite_noise(start):
    trainer = start(KIND, "train.batch_size=4", "objective.vardiu.antithetic=true")
    objective, examples = trainer.objective, trainer.objective.draw("student", 0)
    seen = []

    def record(z: Tensor, x: Tensor, timestep: Tensor, condition: dict) -> Tensor:
        seen.append((z, x.detach(), levels(objective.context.teacher.schedule, timestep)[0]))
        return x.flatten(1).sum(1)

    objective.posterior = record
    objective.loss("student", examples)
    ((z, x, alpha),) = seen
    torch.testing.assert_close(z[:4], z[4:], rtol=0, atol=0)
    with torch.no_grad():
        image = objective._image(examples)
    middle = alpha[:4].float().view(-1, 1, 1, 1) * image
    torch.testing.assert_close((x[:4] + x[4:]) / 2, middle, rtol=1e-4, atol=1e-4)
    assert not torch.equal(x[:4], x[4:])


def test_the_posterior_learns_which_noise_images_are_made_of(start):
    lr = "objective.vardiu.posterior.lr=1e-2"
    trainer = start(KIND, "student.steps=1", "train.batch_size=8", "optimizer.lr=1e-9", "train.updates=8", lr)
    losses = [trainer.train_iteration()["loss/posterior"] for _ in range(3)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "overrides",
    [
        ("student.steps=1", f"{HEAD}=gaussian", "objective.vardiu.gradient_steps=5"),
        (f"{HEAD}=mixture", "objective.vardiu.antithetic=true", "objective.vardiu.gradient_steps=1"),
        (f"{HEAD}=flow", "student.sampler=renoise", "student.steps=2"),
    ],
)
@pytest.mark.parametrize("schedule", ["diffusion", "flow"])
def test_all_heads_train_on_both_schedules(start, tiny_flow_teacher, overrides, schedule):
    flow = (f"teacher.path={tiny_flow_teacher}", "policy.kind=flow_sde") if schedule == "flow" else ()
    trainer = start(KIND, *flow, *overrides, "train.batch_size=4", "train.micro_batch=2")
    before = [p.clone() for network in _networks(trainer) for p in network.parameters()]
    rows = [trainer.train_iteration() for _ in range(2)]
    after = [p for network in _networks(trainer) for p in network.parameters()]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize("lora", [0, 2])
def test_a_transformer_trains(start, tiny_pipeline, lora):
    trainer = start(KIND, f"teacher.path={tiny_pipeline('dit')}", *DIT, f"lora.rank={lora}", "train.micro_batch=2")
    rows = [trainer.train_iteration() for _ in range(2)]
    assert all(row["grad_norm"] > 0 and row["grad_norm/posterior"] > 0 for row in rows)
    frozen = [name for name, p in _networks(trainer)[1].named_parameters() if not p.requires_grad]
    assert bool(frozen) == bool(lora)


def test_passes_are_counted(start):
    overrides = ("train.batch_size=4", "train.micro_batch=4", "train.updates=1", "objective.vardiu.antithetic=true")
    trainer = start(KIND, *overrides, "objective.vardiu.posterior.updates=2", "objective.vardiu.gradient_steps=2")
    row = trainer.train_iteration()
    # 3 steps of the student for each of 3 optimizer steps, gradients through 2 in one of them; 4 images in each
    expected = {"student_forward": 36, "student_backward": 8, "teacher": 8, "posterior_forward": 16}
    expected["posterior_backward"] = 16
    assert {name: row[f"passes/{name}"] for name in expected} == expected


def test_a_band_outside_of_the_noise_levels_is_refused(start):
    with pytest.raises(EngineError, match=r"objective\.bands\.vardiu=\[0\.99, 1\.0\]"):
        start(KIND, "objective.bands={vardiu: [0.99, 1]}")


def _networks(trainer) -> list[torch.nn.Module]:
    return [trainer.engine.module, trainer.objective.context.networks[POSTERIOR].module]
