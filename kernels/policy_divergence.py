"""Divergences between two Gaussian policies that share std: closed forms in one number a sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import check_batch, check_finite, check_like, check_std, choose, per_sample, reduction_factors
from .backend import launch, register
from .gaussian_policy import ROWS, WARPS, precision_of
from .policy_backward import policy_backward
from .rows import compute_dtype, row_sums, row_totals, sum_of_squares

KINDS = ("kl", "renyi", "chi2", "power")
# chi2 and power are exponentials; their exponent stops here, and so does the gradient.
# e^60 = 1.1e26 leaves float32 room for the factors around it.
EXPONENT_LIMIT = 60.0


def policy_divergence(
    pred: Tensor,
    pred_ref: Tensor,
    b: Tensor | float,
    std: Tensor | float,
    *,
    kind: str = "kl",
    alpha: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Divergence of the policy N(a x + b pred, std^2 I) from the reference N(a x + b pred_ref, std^2 I) at the same x.

    With equal std every kind is a closed form in d = R_i [ b^2 (pred_i - pred_ref_i)^2 / std^2 ], R = mean or sum over
    a sample's elements ("mean": the divergence of one average element):

        kl      d / 2
        renyi   alpha d / 2, of order alpha > 0
        chi2    exp(d) - 1, Pearson's: E_ref[(p/p_ref)^2] - 1
        power   (exp(alpha (alpha-1) d / 2) - 1) / (alpha (alpha-1)), of order alpha: half of Cressie & Read's with
                lambda = alpha - 1; alpha 0 and 1 are limits, d / 2

    Sources: Gil, Alajaji & Linder 2013, "Renyi divergence measures for commonly used univariate continuous
    distributions", Information Sciences 249, table 2 (Renyi and Kullback-Leibler of Gaussians); Cressie & Read 1984,
    JRSS B 46(3), whose E_ref[(p/p_ref)^alpha] is exp((alpha-1) Renyi_alpha). Exponents are clamped at
    ``EXPONENT_LIMIT`` = 60: beyond it the value stays finite and the gradient is zero.

    Args:
        pred, pred_ref: (B, ...), the (already guided) network outputs; float32, bfloat16 or float16 (float64 on CPU).
        b, std: (B,) tensors of any float dtype, or numbers; used as float32. A sample with std = 0 has no density: its
            divergence is 0 with zero gradient.
        kind: "kl", "renyi", "chi2" or "power".
        alpha: the order, needed by renyi (> 0) and power; an error with the others.
        reduction: "mean" or "sum".

    Returns:
        (B,) float32 (float64 when an input is float64), >= 0, differentiable once in pred.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.
    """
    check_batch("pred", pred)
    check_like("pred_ref", pred_ref, "pred", pred)
    check_std(std)
    exponential, rate, factor = divergence_form(kind, alpha)
    scale, _ = reduction_factors(reduction, pred)
    b, std = per_sample("b", b, pred), per_sample("std", std, pred)
    return _Divergence.apply(pred, pred_ref, b, std, exponential, rate, factor, scale)


def divergence_form(kind: str, alpha: float | None, names: tuple[str, str] = ("kind", "alpha")) -> tuple:
    """(exponential, rate, factor): the divergence is factor (exp(rate d) - 1) if exponential, else rate d."""
    choose(names[0], kind, KINDS)
    if kind in ("kl", "chi2"):
        if alpha is not None:
            raise ValueError(f"{names[1]}={alpha} has no meaning for {names[0]}={kind!r}; leave it out")
        return (False, 0.5, 1.0) if kind == "kl" else (True, 1.0, 1.0)
    if alpha is None:
        raise ValueError(f"{names[0]}={kind!r} needs its order; pass {names[1]}, e.g. {names[1]}=0.5")
    alpha = check_finite(names[1], alpha)
    if kind == "renyi":
        if alpha <= 0:
            raise ValueError(f"{names[1]}={alpha} is no order of a Renyi divergence; pass a number > 0")
        return False, 0.5 * alpha, 1.0
    product = alpha * (alpha - 1.0)
    return (True, 0.5 * product, 1.0 / product) if product else (False, 0.5, 1.0)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, pred_ref, b, std, exponential, rate, factor, scale):
        value, slope = _divergence(pred, pred_ref, b, std, exponential, rate, factor, scale)
        ctx.save_for_backward(slope, pred, pred_ref)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope, pred, pred_ref = ctx.saved_tensors
        d_pred, _ = policy_backward(grad, None, slope, None, None, pred, None, pred_ref, None, None, 1.0, False)
        return d_pred, *(None,) * 7


def divergence_rows(
    gap: Tensor, metric: Tensor, exponential: bool, rate: float, factor: float
) -> tuple[Tensor, Tensor]:
    """Divergence (B,) and its slope, d divergence / d f = slope (f - f_ref), from row sums and scale b^2 / std^2."""
    distance = gap * metric
    value, slope = distance * rate, metric * (2.0 * rate)
    if exponential:
        exponent = value.clamp(max=EXPONENT_LIMIT)
        slope = slope.mul_(exponent.exp()).mul_(factor).masked_fill_(value > EXPONENT_LIMIT, 0.0)
        # an infinite distance is a defect to show, not a large number to clamp
        value = torch.where(distance.isinf(), distance, exponent.expm1() * factor)
    return value, slope


def _reference(pred, pred_ref, b, std, exponential, rate, factor, scale) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(pred, pred_ref)
    unscored, _, precision = precision_of(std, scale, dtype)
    metric = b.to(dtype).square() * precision
    value, slope = divergence_rows(sum_of_squares(pred.to(dtype) - pred_ref), metric, exponential, rate, factor)
    return value.masked_fill_(unscored, 0.0), slope


def _fake(pred, pred_ref, b, std, exponential, rate, factor, scale) -> tuple[Tensor, Tensor]:
    rows = pred.new_empty(pred.shape[0], dtype=compute_dtype(pred, pred_ref))
    return rows, torch.empty_like(rows)


# ---- Triton

_EXPONENT_LIMIT = tl.constexpr(EXPONENT_LIMIT)


def _kernels(pred, pred_ref, b, std, exponential, rate, factor, scale) -> tuple[Tensor, Tensor]:
    rows = pred.shape[0]
    if rows == 0:
        return _reference(pred, pred_ref, b, std, exponential, rate, factor, scale)
    partial, split = row_sums(None, None, pred, None, pred_ref, None, None, None, 1.0)
    value, slope = (torch.empty(rows, dtype=torch.float32, device=pred.device) for _ in range(2))
    launch(
        _divergence_kernel, -(-rows // ROWS), [partial, b, std, value, slope], [rows, rate, factor, scale],
        EXPONENTIAL=exponential, SPLIT=split, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return value, slope


@triton.jit
def _expm1(x):
    # exp(x) - 1 would cancel near 0; the series leaves 0.5^8 / 9! = 1e-8 at the seam
    series = 1.0 + x * (1.0 / 7) * (1.0 + x * (1.0 / 8))
    series = 1.0 + x * (1.0 / 5) * (1.0 + x * (1.0 / 6) * series)
    series = 1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * series)
    return tl.where(tl.abs(x) < 0.5, x * (1.0 + x * 0.5 * series), tl.exp(x) - 1.0)


@triton.jit
def divergence_of(b_gap, b_b, b_std, rate, factor, scale, EXPONENTIAL: tl.constexpr):
    """Divergence and its slope from the totals of rows; both 0 where std is 0."""
    m_scored = b_std != 0.0
    b_weight = b_b / tl.where(m_scored, b_std, 1.0)
    b_weight = b_weight * b_weight * scale
    b_distance = b_gap * b_weight
    b_slope = b_weight * rate * 2.0
    b_value = b_distance * rate
    if EXPONENTIAL:
        # comparisons let nan through; an infinite distance is a defect to show, not a large number to clamp
        m_large = b_value > _EXPONENT_LIMIT
        b_exponent = tl.where(m_large, _EXPONENT_LIMIT, b_value)
        b_slope = tl.where(m_large, 0.0, b_slope * factor * tl.exp(b_exponent))
        b_value = tl.where(b_distance == float("inf"), b_distance, _expm1(b_exponent) * factor)
    return tl.where(m_scored, b_value, 0.0), tl.where(m_scored, b_slope, 0.0)


@triton.jit
def _divergence_kernel(
    p_partial,  # (B, SPLIT) fp32
    p_b,  # (B,)
    p_std,  # (B,)
    p_value,  # (B,) fp32
    p_slope,  # (B,) fp32
    rows,
    rate,
    factor,
    scale,
    EXPONENTIAL: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS
    o = i_row + tl.arange(0, ROWS)
    m = o < rows
    b_gap = row_totals(p_partial, i_row, rows, SPLIT, ROWS)
    b_b = tl.load(p_b + o, mask=m, other=0.0).to(tl.float32)
    b_std = tl.load(p_std + o, mask=m, other=0.0).to(tl.float32)
    rate, factor, scale = tl.cast(rate, tl.float32), tl.cast(factor, tl.float32), tl.cast(scale, tl.float32)
    b_value, b_slope = divergence_of(b_gap, b_b, b_std, rate, factor, scale, EXPONENTIAL)
    tl.store(p_value + o, b_value, mask=m)
    tl.store(p_slope + o, b_slope, mask=m)


_divergence = register(
    "policy_divergence(Tensor pred, Tensor pred_ref, Tensor b, Tensor std, bool exponential, float rate, "
    "float factor, float scale) -> (Tensor, Tensor)",
    reference=_reference,
    kernels=_kernels,
    fake=_fake,
)
