"""The test bed in the plane: its target, its figures, and that every method runs by the engine's own losses."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from bench.mixture import __main__ as mixture
from bench.mixture.metrics import log_mmd
from bench.mixture.networks import Generator
from bench.mixture.target import mixture_of_40
from bench.mixture.training import train


@pytest.fixture(scope="module")
def target():
    return mixture_of_40()


@pytest.fixture
def restored():
    """Whatever a command sets for its whole process is as before."""
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)  # other tests in this process draw subnormal numbers
    torch.set_num_threads(threads)


def _noised(target, sigma: torch.Tensor) -> MixtureSameFamily:
    std = (target.std**2 + sigma.double() ** 2).sqrt().view(-1, 1, 1).expand(-1, 40, 2)
    components = Independent(Normal(target.means.double().expand(len(sigma), -1, -1), std), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(sigma), 40)), components)


def test_the_layout_is_fabs(target):
    torch.manual_seed(0)
    torch.testing.assert_close(target.means, (torch.rand(40, 2) - 0.5) * 2 * 40, rtol=0, atol=1e-5)
    assert target.std == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(1.0))), rel=1e-6)


def test_density_score_and_denoiser_are_those_of_the_noised_mixture(target):
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.0, 0.5, 3.0, 20.0])
    x = (target.means[:4] + 3 * torch.randn(4, 2, generator=generator)).double().requires_grad_()
    expected = _noised(target, sigma).log_prob(x)
    torch.testing.assert_close(target.log_prob(x.detach().float(), sigma).double(), expected, rtol=1e-4, atol=1e-3)
    score = torch.autograd.grad(expected.sum(), x)[0]
    ours = target.score(x.detach().float(), sigma)
    torch.testing.assert_close(ours.double(), score, rtol=1e-3, atol=1e-3)
    denoised = x.detach() + sigma.double().view(-1, 1) ** 2 * score
    torch.testing.assert_close(target.denoise(x.detach().float(), sigma).double(), denoised, rtol=1e-3, atol=1e-2)


def test_log_mmd_is_the_double_sum_over_five_bandwidths():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(700, 2, generator=generator), 1 + torch.randn(600, 2, generator=generator)

    def kernel(a: torch.Tensor, b: torch.Tensor, width: float) -> torch.Tensor:
        return torch.exp(-(torch.cdist(a.double(), b.double()) ** 2) / (2 * width**2)).mean()

    widths = (0.25, 0.5, 1.0, 2.0, 4.0)
    values = [float(kernel(x, x, w) + kernel(y, y, w) - 2 * kernel(x, y, w)) for w in widths]
    assert log_mmd(x, y) == pytest.approx(math.log(sum(values) / 5), abs=1e-4)


def test_samples_of_the_target_are_judged_best(target):
    generator = torch.Generator().manual_seed(0)
    truth, others = target.sample(2000, generator), target.sample(2000, generator)
    floor = mixture.figures(others, target, truth)
    expected = _noised(target, torch.zeros(1)).log_prob(others.double()).mean()
    assert floor["log_density"] == pytest.approx(float(expected), abs=1e-3)
    assert floor["modes"] == 40
    half = mixture.figures(
        target.means[:20].repeat(100, 1) + 0.1 * torch.randn(2000, 2, generator=generator), target, truth
    )
    assert half["modes"] == 20
    assert half["log_mmd"] > floor["log_mmd"] + 1


@pytest.mark.parametrize("name", mixture.METHODS)
def test_a_run_repeats_and_spreads(target, name):
    schedule = replace(mixture.SCHEDULE, steps=60, batch=64, width=32, decay=0.5, critic_start=20)
    ends = [[], []]
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    for values in ends:
        train(mixture.METHODS[name], schedule, target, 3, lambda step, net, v=values: v.append(net(noise)))
    for first, second in zip(*ends, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    widths = [float(samples.std()) for samples in ends[0]]
    assert max(widths) > 1.5 * widths[0]  # it starts near 0; so few steps are too few to hold what was reached


@pytest.mark.parametrize("name", mixture.METHODS)
def test_the_generator_is_trained_on_normal_noise_that_never_repeats(target, name, monkeypatch):
    forward, seen = Generator.forward, []
    monkeypatch.setattr(Generator, "forward", lambda self, z: seen.append(z) or forward(self, z))
    schedule = replace(mixture.SCHEDULE, steps=20, batch=64, width=8, critic_start=1)
    train(mixture.METHODS[name], schedule, target, 3, lambda step, net: None)
    z = torch.cat(seen)
    assert z.unique(dim=0).shape == z.shape
    torch.testing.assert_close(z.T.cov(), torch.eye(2), rtol=0, atol=0.15)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=0.15)


def test_passes_are_those_of_the_updates(target):
    schedule = replace(mixture.SCHEDULE, steps=10, batch=4, width=8, critic_start=1)
    passes = {
        name: train(mixture.METHODS[name], schedule, target, 0, lambda step, net: None).passes
        for name in ("Diff-Instruct K=5", "VarDiU gaussian")
    }
    assert passes["Diff-Instruct K=5"] == {"generator": 40 * (5 + 3), "critic": 40 * (5 * 3 + 1), "teacher": 40}
    updates = mixture.METHODS["VarDiU gaussian"].updates
    expected = {"generator": 40 * (updates + 2), "posterior": 40 * (3 * updates + 1), "teacher": 40}
    assert passes["VarDiU gaussian"] == expected


def test_the_command_writes_figures_and_pictures(restored, tmp_path, monkeypatch):
    arguments = ["--quick", "--seeds", "0", "1", "--methods", "VarDiU gaussian", "--json", f"{tmp_path}/mixture.json"]
    monkeypatch.setattr(sys, "argv", ["bench.mixture", *arguments])
    mixture.main()
    record = json.loads((tmp_path / "mixture.json").read_text())
    assert [row["seed"] for row in record["rows"]] == [0, 1]
    mean = sum(row["log_density"] for row in record["rows"]) / 2
    assert record["summary"][0]["log_density"] == pytest.approx(mean)
    assert {path.name for path in tmp_path.glob("*.png")} == {"mixture_samples.png", "mixture_curves.png"}
