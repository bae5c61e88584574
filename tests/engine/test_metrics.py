"""The metrics against their textbook formulas, the `prdc` package and analytic Gaussians."""

import time

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch

from engine.metrics import class_accuracy, frechet_distance, paired_cosine, precision_recall_density_coverage


def normal(count: int, dim: int, *, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift


def fid_by_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.numpy(), b.numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


# Frechet distance


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_frechet_distance_is_the_formula_with_the_matrix_root(dim):
    mix = normal(dim, dim, seed=9)
    a, b = normal(500, dim) @ mix, normal(400, dim, seed=1, scale=1.3, shift=0.2)
    assert frechet_distance(a, b) == pytest.approx(fid_by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_of_scaled_and_shifted_features_is_closed_form():
    a = normal(1000, 8)
    # C_b = 4 C_a and the means differ by mean_a + 3: |m|^2 + tr(C) (1 - 2)^2
    b = 2 * a + 3
    expected = float((a.mean(0) + 3).square().sum() + torch.cov(a.T).trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_approaches_that_of_the_gaussians():
    a, b = normal(20000, 4), normal(20000, 4, seed=1, scale=2.0, shift=1.0)
    assert frechet_distance(a, b) == pytest.approx(4 * 1.0 + 4 * (2 - 1) ** 2, rel=0.03)


def test_frechet_distance_of_rank_deficient_sets_is_exact():
    # fewer samples than dimensions, on orthogonal subspaces: the root's trace is 0 and everything else adds up
    a, b = torch.zeros(5, 32, dtype=torch.float64), torch.zeros(6, 32, dtype=torch.float64)
    a[:, :16], b[:, 16:] = normal(5, 16), normal(6, 16, seed=1)
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(torch.ones(3, 4), torch.zeros(2, 4)) == 4.0  # no spread at all: the means' distance


def test_frechet_distance_of_identical_sets_is_zero_in_any_dtype_and_far_from_the_origin():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        features = normal(200, 32, shift=1000.0).to(dtype)
        assert frechet_distance(features, features.clone()) == pytest.approx(0, abs=1e-9)


# Precision, recall, density, coverage


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 0.7), (1.0, 2.0), (100.0, 1.0)])
@pytest.mark.parametrize("nearest_k", [1, 5])
def test_prdc_is_that_of_the_package(shift, scale, nearest_k):
    real, fake = normal(300, 8), normal(250, 8, seed=1, scale=scale, shift=shift)
    ours = precision_recall_density_coverage(real, fake, nearest_k=nearest_k)
    assert ours == pytest.approx(prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=nearest_k), abs=1e-12)


def test_precision_counts_any_ball_not_only_that_of_the_nearest_real():
    # the real nearest to 0.3 is 0.1, whose ball ends at 0.2; the ball of 3.0 begins at 0.1
    real = torch.tensor([[0.0], [0.1], [3.0]])
    fake = torch.tensor([[0.3], [-100.0]])
    assert precision_recall_density_coverage(real, fake, nearest_k=1)["precision"] == 0.5


def test_identical_sets_are_perfect():
    real = normal(300, 8, shift=50.0)
    ours = precision_recall_density_coverage(real, real.clone())
    assert (ours["precision"], ours["recall"], ours["coverage"]) == (1.0, 1.0, 1.0)
    assert ours["density"] == pytest.approx(1.0, abs=1e-3)


def test_separate_sets_share_nothing():
    ours = precision_recall_density_coverage(normal(100, 4), normal(100, 4, shift=50.0))
    assert ours == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


def test_a_collapsed_generator_has_precision_and_no_recall():
    real = normal(200, 4)
    fake = real.mean(0).expand(200, -1)
    ours = precision_recall_density_coverage(real, fake)
    assert ours["precision"] == 1.0
    assert ours["recall"] == 0.0
    assert ours["density"] > 1
    assert ours["coverage"] < 0.5


def test_two_thousand_samples_stay_cheap_on_one_core():
    real, fake = normal(2000, 64).float(), normal(2000, 64, seed=1).float()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()  # not the wall: tests share the cores
        precision_recall_density_coverage(real, fake)
        frechet_distance(real, fake)
        assert time.process_time() - started < 2.0  # 0.3 s on a quiet core
    finally:
        torch.set_num_threads(threads)


# Accuracy and pairs


def test_class_accuracy_is_the_share_of_right_classes():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0], [5.0, 4.0]])
    assert class_accuracy(logits, torch.tensor([0, 1, 0, 0])) == 0.75


def test_paired_cosine_pairs_rows():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, -1.0], [1.0, 0.0]])
    assert paired_cosine(a, b) == pytest.approx((1 + 0 - 1 + 0) / 4)
    assert paired_cosine(a[:3], a[:3].bfloat16()) == pytest.approx(1.0)


# Errors

nan_row = torch.ones(8, 3).index_fill(0, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(torch.ones(4, 3), torch.ones(4, 2)), r"of one D >= 1, got \(4, 3\) and \(4, 2\)"),
        (lambda: frechet_distance(torch.ones(4), torch.ones(4)), r"\(N, D\) and \(M, D\)"),
        (lambda: frechet_distance(torch.ones(1, 3), torch.ones(4, 3)), r"at least 2 samples"),
        (lambda: frechet_distance(nan_row, torch.ones(4, 3)), r"1 of 8 rows of features are not finite"),
        (lambda: precision_recall_density_coverage(torch.ones(9, 3), torch.ones(5, 3)), r"at least 6 samples"),
        (lambda: precision_recall_density_coverage(torch.ones(9, 3), nan_row), r"1 of 8 rows"),
        (lambda: precision_recall_density_coverage(torch.ones(9, 3), torch.ones(9, 2)), r"of one D"),
        (lambda: precision_recall_density_coverage(nan_row, nan_row, nearest_k=0), r"nearest_k=0 must be >= 1"),
        (lambda: class_accuracy(torch.ones(4, 3), torch.zeros(3, dtype=torch.long)), r"labels \(N,\)"),
        (lambda: class_accuracy(torch.ones(2, 3), torch.tensor([0, 3])), r"integers in 0..2"),
        (lambda: class_accuracy(torch.ones(2, 3), torch.ones(2)), r"integers in 0..2, got torch.float32"),
        (lambda: class_accuracy(nan_row, torch.zeros(8, dtype=torch.long)), r"rows of logits"),
        (lambda: paired_cosine(torch.ones(4, 3), torch.ones(5, 3)), r"as many features on both sides, got 4 and 5"),
        (lambda: paired_cosine(torch.ones(0, 3), torch.ones(0, 3)), r"at least 1 samples"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
