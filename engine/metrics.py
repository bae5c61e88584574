"""How close a set of samples is to another: Frechet and kernel distance, precision and recall, pairs, diversity.

They take features (or logits) that an encoder made, and PSNR and SSIM images; the encoder of an evaluation is never
that of the reward. Everything is computed in float64, on the device of the features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**25
"""Most distances that are held at once: 256 MB in float64."""


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the squared kernel distance over subsets."""

    mean: float
    std: float


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features (FID; Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with unbiased covariances. With the centred features
    factored as Q R, the eigenvalues of C_a C_b are the squared singular values of R_a R_b^T up to the counts, so the
    last trace is a sum of singular values: real, never negative, and exact for rank-deficient covariances, where
    rooting C_a C_b itself is neither.

    Args:
        features_a: (N, D) any floating dtype, N >= 2.
        features_b: (M, D), M >= 2.

    Returns:
        The distance, >= 0. It is biased upwards for few samples: compare only values of equal N and M.

    Raises:
        ValueError: for unequal D, fewer than 2 samples, or features that are not finite.
    """
    features_a, features_b = _pair(features_a, features_b, fewest=2)
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    root_a = torch.linalg.qr(features_a - mean_a, mode="r").R / (len(features_a) - 1) ** 0.5
    root_b = torch.linalg.qr(features_b - mean_b, mode="r").R / (len(features_b) - 1) ** 0.5
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(distance))  # equal sets may come out a rounding below 0


def kernel_distance(
    features_a: Tensor, features_b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (KID; Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased estimate, which leaves the kernels of a sample with itself out, averaged over random subsets. Unlike
    that of the Frechet distance, its expectation does not depend on the number of samples; it may come out below 0.

    Args:
        features_a: (N, D) any floating dtype.
        features_b: (M, D).
        subsets: number of subsets, each drawn without repetition.
        subset_size: samples of each side in a subset, from 2 to the smaller of N and M.
        seed: of the subsets.

    Returns:
        Mean over the subsets and standard deviation between them (0 where every subset is the whole set).

    Raises:
        ValueError: for unequal D, subsets that cannot be drawn, or features that are not finite.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets={subsets} must be >= 1 and subset_size={subset_size} >= 2")
    features_a, features_b = _pair(features_a, features_b, fewest=subset_size)
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        a = features_a[torch.randperm(len(features_a), generator=generator)[:subset_size]]
        b = features_b[torch.randperm(len(features_b), generator=generator)[:subset_size]]
        within = (_mean_off_diagonal(_cubic_kernel(x, x)) for x in (a, b))
        estimates.append(sum(within) - 2 * _cubic_kernel(a, b).mean())
    values = torch.stack(estimates)
    return KernelDistance(float(values.mean()), float(values.std(unbiased=False)))


def precision_recall_density_coverage(real: Tensor, fake: Tensor, *, nearest_k: int = 5) -> dict[str, float]:
    """How much of the fakes lies among the reals and how much of the reals is reached.

    Each sample carries the open ball that reaches to its k-th nearest neighbour within its own set. Precision: the
    share of fakes in any real ball; recall: of reals in any fake ball (Kynkaanniemi et al. 2019, arXiv 1904.06991).
    Density: the mean number of real balls that hold a fake, over k; coverage: the share of real balls that hold any
    fake (Naeem et al. 2020, arXiv 2002.09797). A set that repeats one point has balls without inside: it holds none.

    Args:
        real: (N, D) features of the reference set, any floating dtype.
        fake: (M, D) features of the set that is judged.
        nearest_k: k, from 1 to the smaller count - 1.

    Returns:
        "precision", "recall", "coverage" in [0, 1] and "density" >= 0 (1 for two draws of one distribution).

    Raises:
        ValueError: for unequal D, too few samples for k, or features that are not finite.
    """
    if nearest_k < 1:
        raise ValueError(f"nearest_k={nearest_k} must be >= 1")
    real, fake = _pair(real, fake, fewest=nearest_k + 1)
    origin = real.mean(0)  # distances do not see it; their rounding error, relative to the norms, does
    real, fake = real - origin, fake - origin
    real_radii, fake_radii = _radii(real, nearest_k), _radii(fake, nearest_k)
    holding = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real balls that hold each fake
    reached, recalled = [], []
    noise = _noise(real, fake)
    for rows in torch.arange(len(real), device=real.device).split(max(1, BLOCK // len(fake))):
        distances = _distances(real[rows], fake, noise)
        in_real_ball = distances < real_radii[rows, None]
        holding += in_real_ball.sum(0)
        reached.append(in_real_ball.any(1))
        recalled.append((distances < fake_radii).any(1))
    return {
        "precision": float((holding > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(holding.double().mean() / nearest_k),
        "coverage": float(torch.cat(reached).double().mean()),
    }


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the samples whose largest logit is that of their label.

    Args:
        logits: (N, K) any floating dtype, N >= 1.
        labels: (N,) integers in 0..K-1.

    Returns:
        The accuracy in [0, 1].

    Raises:
        ValueError: for shapes or labels that do not fit, or logits that are not finite.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"logits must be (N, K) and labels (N,) with N >= 1, got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must be integers in 0..{logits.shape[1] - 1}, got {labels.dtype} from {labels.min()} "
            f"to {labels.max()}"
        )
    _check_finite("logits", logits)
    return float((logits.argmax(1) == labels).double().mean())


def paired_cosine(features_a: Tensor, features_b: Tensor) -> float:
    """Mean cosine of the features of pairs, such as student and teacher images of the same noise and condition.

    Args:
        features_a: (N, D) any floating dtype, N >= 1.
        features_b: (N, D); row i is the partner of row i.

    Returns:
        The mean in [-1, 1]; a pair with a zero vector counts as 0.

    Raises:
        ValueError: for unequal shapes, no samples, or features that are not finite.
    """
    features_a, features_b = _pair(features_a, features_b, fewest=1)
    if len(features_a) != len(features_b):
        raise ValueError(f"pairs need as many features on both sides, got {len(features_a)} and {len(features_b)}")
    return float(F.cosine_similarity(features_a, features_b, dim=1).mean())


def diversity(features: Tensor, group_size: int) -> float:
    """Mean cosine distance 1 - cos between the samples of a group, such as one prompt's images from several seeds.

    Args:
        features: (groups * group_size, D) any floating dtype, groups contiguous.
        group_size: samples of a group, at least 2.

    Returns:
        The mean over all pairs of all groups, in [0, 2]; 0 for a generator that always draws the same.

    Raises:
        ValueError: for groups that do not fit, or features that are not finite.
    """
    if features.dim() != 2 or group_size < 2 or len(features) == 0 or len(features) % group_size:
        raise ValueError(
            f"features must be (groups * group_size, D) with group_size >= 2, got {tuple(features.shape)} "
            f"and group_size={group_size}"
        )
    _check_finite("features", features)
    groups = F.normalize(features.detach().double(), dim=1).view(-1, group_size, features.shape[1])
    cosines = groups @ groups.transpose(1, 2)
    pairs = torch.ones(group_size, group_size, dtype=torch.bool).triu(1)
    return float(1 - cosines[:, pairs].mean())


def psnr(images_a: Tensor, images_b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images, in dB.

    Args:
        images_a: (B, C, H, W) in [0, 1], any floating dtype.
        images_b: the same shape.

    Returns:
        (B,) float64; infinite for equal images.

    Raises:
        ValueError: for unequal shapes.
    """
    images_a, images_b = _images(images_a, images_b)
    return -10 * (images_a - images_b).square().flatten(1).mean(1).log10()


def ssim(images_a: Tensor, images_b: Tensor) -> Tensor:
    """Structural similarity of each pair of images (Wang et al. 2004), with their Gaussian window of 11 and 1.5 pixels.

    Args:
        images_a: (B, C, H, W) in [0, 1], any floating dtype, H and W at least 11.
        images_b: the same shape.

    Returns:
        (B,) float64 in [-1, 1], the mean over channels and over the places where the window lies within the image.

    Raises:
        ValueError: for unequal shapes, or images smaller than the window.
    """
    images_a, images_b = _images(images_a, images_b)
    if min(images_a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels, got {tuple(images_a.shape)}")
    mean_a, mean_b, square_a, square_b, product = (
        _gaussian_mean(x) for x in (images_a, images_b, images_a**2, images_b**2, images_a * images_b)
    )
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    means = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (means * (2 * covariance + c2) / (variances + c2)).flatten(1).mean(1)


SSIM_WINDOW = 11


def _gaussian_mean(images: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    weights = (-0.5 * (offsets / 1.5) ** 2).exp()
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(images, weights, groups=images.shape[1])
    return F.conv2d(rows, weights.transpose(2, 3), groups=images.shape[1])


def _images(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.dim() != 4 or first.shape != second.shape:
        raise ValueError(
            f"images must be (B, C, H, W) of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first.detach().double(), second.detach().double()


def _cubic_kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _mean_off_diagonal(square: Tensor) -> Tensor:
    return (square.sum() - square.diagonal().sum()) / (len(square) * (len(square) - 1))


def _pair(first: Tensor, second: Tensor, *, fewest: int) -> tuple[Tensor, Tensor]:
    shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1] or first.shape[1] == 0:
        raise ValueError(f"features must be (N, D) and (M, D) of one D >= 1, got {shapes}")
    if min(len(first), len(second)) < fewest:
        raise ValueError(f"at least {fewest} samples are needed on each side, got {shapes}")
    _check_finite("features", first, second)
    return first.detach().double(), second.detach().double()


def _check_finite(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        bad = int((~tensor.isfinite().all(1)).sum())
        if bad:
            raise ValueError(f"{bad} of {len(tensor)} rows of {name} are not finite; look at the samples behind them")


def _noise(first: Tensor, second: Tensor) -> float:
    """The squared distance below which two features are the same: the rounding of `_distances`, without which repeated
    points would keep balls of noise around them."""
    return 1e-13 * float(first.square().sum(1).max() + second.square().sum(1).max())


def _distances(first: Tensor, second: Tensor, noise: float) -> Tensor:
    """(N, M) squared distances; comparing them orders as the distances do. `first` and `second` share their origin."""
    norms_first, norms_second = first.square().sum(1), second.square().sum(1)
    squares = torch.addmm(norms_second.expand(len(first), -1), first, second.T, alpha=-2).add_(norms_first[:, None])
    return squares.masked_fill_(squares < noise, 0.0)


def _radii(features: Tensor, nearest_k: int) -> Tensor:
    noise = _noise(features, features)
    blocks = features.split(max(1, BLOCK // len(features)))
    # + 1: the nearest one is the sample itself
    return torch.cat([_distances(rows, features, noise).kthvalue(nearest_k + 1, dim=1).values for rows in blocks])
