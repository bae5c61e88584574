"""The metrics against their textbook formulas, the `prdc` package, scipy's filters and analytic Gaussians."""

import math
import time

import numpy as np
import prdc
import pytest
import scipy.linalg
import scipy.ndimage
import torch

from engine import metrics
from engine.metrics import (
    class_accuracy,
    diversity,
    frechet_distance,
    kernel_distance,
    paired_cosine,
    precision_recall_density_coverage,
    psnr,
    ssim,
)


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


# Kernel distance


def kid_by_loops(a: torch.Tensor, b: torch.Tensor) -> float:
    def kernel(x, y) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    a, b = a.tolist(), b.tolist()
    m, n = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_a + within_b - 2 * sum(kernel(x, y) for x in a for y in b) / (m * n)


def test_kernel_distance_of_whole_sets_is_the_double_loop():
    a, b = normal(30, 5), normal(30, 5, seed=1, scale=1.3, shift=0.2)
    ours = kernel_distance(a, b, subsets=3, subset_size=30)
    assert ours.mean == pytest.approx(kid_by_loops(a, b), rel=1e-10)
    assert ours.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_averages_subsets_drawn_without_repetition():
    a, b = normal(40, 3), normal(50, 3, seed=1, shift=0.5)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(4):
        rows = [torch.randperm(n, generator=generator)[:20] for n in (40, 50)]
        assert all(len(set(r.tolist())) == 20 for r in rows)
        expected.append(kid_by_loops(a[rows[0]], b[rows[1]]))
    ours = kernel_distance(a, b, subsets=4, subset_size=20, seed=7)
    assert ours.mean == pytest.approx(np.mean(expected), rel=1e-10)
    assert ours.std == pytest.approx(np.std(expected), rel=1e-10)


def test_kernel_distance_is_unbiased_for_few_samples_where_the_frechet_distance_is_not():
    kernel = [kernel_distance(normal(30, 8, seed=2 * i), normal(30, 8, seed=2 * i + 1), subset_size=30, subsets=1).mean
              for i in range(300)]  # fmt: skip
    frechet = [frechet_distance(normal(30, 8, seed=2 * i), normal(30, 8, seed=2 * i + 1)) for i in range(100)]
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / math.sqrt(300)
    assert min(kernel) < 0 < max(kernel)
    assert np.mean(frechet) > 10 * np.std(frechet) / math.sqrt(100)


# Precision, recall, density, coverage


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 0.7), (1.0, 2.0), (100.0, 1.0)])
@pytest.mark.parametrize("nearest_k", [1, 5])
def test_prdc_is_that_of_the_package(shift, scale, nearest_k):
    real, fake = normal(300, 8), normal(250, 8, seed=1, scale=scale, shift=shift)
    ours = precision_recall_density_coverage(real, fake, nearest_k=nearest_k)
    assert ours == pytest.approx(prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=nearest_k), abs=1e-12)


def test_prdc_in_blocks_is_that_of_the_whole(monkeypatch):
    real, fake = normal(300, 8), normal(250, 8, seed=1, shift=0.5)
    real[:20] = real[0]  # repeated points, whose balls are empty
    whole = precision_recall_density_coverage(real, fake)
    monkeypatch.setattr(metrics, "BLOCK", 250 * 7)
    assert precision_recall_density_coverage(real, fake) == whole


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


# Images in pairs, and groups


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_ten_times_the_logarithm_of_peak_over_error():
    a = images(3, 2, 4, 4)
    b = a.clone()
    b[0] += 0.1
    b[1, 0, 0, 0] += 0.5
    expected = [20.0, -10 * math.log10(0.25 / 32), math.inf]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def ssim_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 with scipy's Gaussian filter, of one channel."""

    def blur(x: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = 1e-4, 9e-4
    return float(((2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean())


@pytest.mark.parametrize("shape", [(11, 11), (16, 23), (40, 32)])
def test_ssim_is_the_formula_with_scipys_gaussian(shape):
    a, b = images(2, 3, *shape), images(2, 3, *shape, seed=1)
    b = 0.7 * a + 0.3 * b
    expected = [
        np.mean([ssim_by_scipy(*(x[i, c].double().numpy() for x in (a, b))) for c in range(3)]) for i in range(2)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1], rel=1e-12)


def test_diversity_is_the_mean_distance_within_groups():
    features = normal(12, 6)
    cosine = lambda x, y: float(x @ y / (x.norm() * y.norm()))  # noqa: E731
    pairs = [(3 * g + i, 3 * g + j) for g in range(4) for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = np.mean([1 - cosine(features[i], features[j]) for i, j in pairs])
    assert diversity(features, 3) == pytest.approx(expected, rel=1e-12)


def test_a_collapsed_generator_has_no_diversity_however_its_prompts_differ():
    assert diversity(normal(10, 6).repeat_interleave(4, 0) * 3, 4) == pytest.approx(0, abs=1e-12)


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
        (lambda: kernel_distance(torch.ones(9, 3), torch.ones(9, 2), subset_size=5), r"of one D"),
        (lambda: kernel_distance(torch.ones(9, 3), torch.ones(20, 3), subset_size=10), r"at least 10 samples"),
        (lambda: kernel_distance(nan_row, nan_row, subset_size=4), r"1 of 8 rows"),
        (lambda: kernel_distance(nan_row, nan_row, subset_size=1), r"subset_size=1 >= 2"),
        (lambda: diversity(torch.ones(9, 3), 2), r"got \(9, 3\) and group_size=2"),
        (lambda: diversity(torch.ones(9, 3), 1), r"group_size >= 2"),
        (lambda: diversity(nan_row, 2), r"1 of 8 rows"),
        (lambda: psnr(torch.ones(2, 1, 4, 4), torch.ones(2, 3, 4, 4)), r"of one shape"),
        (lambda: ssim(torch.ones(2, 1, 12, 10), torch.ones(2, 1, 12, 10)), r"at least 11 pixels, got \(2, 1, 12, 10\)"),
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
