"""How close a set of samples is to another: Frechet distance, precision and recall, accuracy, paired similarity.

All of them take features (or logits) that an encoder made; the encoder of an evaluation is never that of the reward.
Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        Memory grows as max(N, M)^2: about half a GB for 5,000 samples.

    Raises:
        ValueError: for unequal D, too few samples for k, or features that are not finite.
    """
    if nearest_k < 1:
        raise ValueError(f"nearest_k={nearest_k} must be >= 1")
    real, fake = _pair(real, fake, fewest=nearest_k + 1)
    origin = real.mean(0)  # distances do not see it; their rounding error, relative to the norms, does
    real, fake = real - origin, fake - origin
    real_radii, fake_radii = _radii(real, nearest_k), _radii(fake, nearest_k)
    distances = _distances(real, fake)
    in_real_ball = distances < real_radii[:, None]
    return {
        "precision": float(in_real_ball.any(0).double().mean()),
        "recall": float((distances < fake_radii).any(1).double().mean()),
        "density": float(in_real_ball.sum(0).double().mean() / nearest_k),
        "coverage": float(in_real_ball.any(1).double().mean()),
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
    return float(torch.nn.functional.cosine_similarity(features_a, features_b, dim=1).mean())


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


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) squared distances; comparing them orders as the distances do. `first` and `second` share their origin."""
    norms_first, norms_second = first.square().sum(1), second.square().sum(1)
    squares = torch.addmm(norms_second.expand(len(first), -1), first, second.T, alpha=-2).add_(norms_first[:, None])
    # The product loses what cancels: below its rounding two features are the same, or repeated points would keep
    # balls of noise around them.
    noise = 1e-13 * float(norms_first.max() + norms_second.max())
    return squares.masked_fill_(squares < noise, 0.0)


def _radii(features: Tensor, nearest_k: int) -> Tensor:
    return _distances(features, features).kthvalue(nearest_k + 1, dim=1).values  # the nearest one is the sample itself
