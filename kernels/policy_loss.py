"""The clipped policy-gradient loss with a divergence penalty, forward and backward in three launches."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import check_batch, check_finite, check_like, check_number, check_std, per_sample, reduction_factors
from .backend import launch, register
from .gaussian_policy import ROWS, WARPS, log_prob_of, log_prob_rows, precision_of
from .policy_backward import policy_backward
from .policy_divergence import divergence_form, divergence_of, divergence_rows
from .rows import compute_dtype, guided, mean_of, row_sums, row_totals, sum_of_squares

# The log-ratio is clamped to +-LOG_RATIO_LIMIT before exp (e^20 = 4.9e8): with reduction="sum" it overflows easily.
LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """What ``policy_loss`` returns; all but the loss is detached."""

    loss: Tensor
    """scalar, backpropagates into pred and pred_uncond"""
    log_prob: Tensor
    """(B,), the bits of ``policy_log_prob``"""
    ratio: Tensor
    """(B,), p / p_old"""
    clip_fraction: Tensor
    """scalar in [0, 1]: the share of the scored samples (std > 0) whose gradient the clip cuts off"""
    kl: Tensor
    """(B,), divergence from pred_ref; zeros without pred_ref"""


def policy_loss(
    x: Tensor,
    x_next: Tensor,
    pred: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    std: Tensor | float,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    pred_uncond: Tensor | None = None,
    guidance: float = 1.0,
    pred_ref: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "kl",
    kl_alpha: float | None = None,
    clip_range: float | tuple[float, float] = 1e-4,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> PolicyLoss:
    """PPO's clipped surrogate on stored steps, plus a penalty on leaving the reference.

        ratio = exp(clamp(log_prob - old_log_prob, +-20))
        surrogate = max(-A ratio, -A clip(ratio, 1 - low, 1 + high))
        loss = mean over the batch of weight (surrogate + kl_coef divergence(policy || reference))

    Source: Schulman et al. 2017, arXiv:1707.06347, equation (7); GRPO, arXiv:2402.03300, equation (3), with the closed
    form of the divergence instead of an estimate. Beyond ``LOG_RATIO_LIMIT`` = 20 the surrogate has no gradient.

    Args:
        x, x_next, pred, a, b, std, pred_uncond, guidance, reduction: as for ``policy_log_prob``. A sample with
            std = 0 has ratio 1, kl 0 and zero gradient.
        old_log_prob: (B,), any float dtype (float32 if the ratio is to be exact), of the policy that took the steps.
        advantage: (B,), any float dtype.
        pred_ref: like x, the already guided prediction of the reference; needed when kl_coef is not 0.
        kl_coef: weight of the divergence, finite.
        kl_kind, kl_alpha: as kind and alpha of ``policy_divergence``.
        clip_range: one number for both sides or (low, high), >= 0, low <= 1; useful are 1e-5..1e-2 with "mean".
        weight: (B,), any float dtype; None = ones.

    Returns:
        ``PolicyLoss``, all float32 (float64 when a batched input is float64). An empty batch has loss 0 (with a
        graph). A non-finite input of a scored sample makes the loss non-finite; nothing is masked.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.
    """
    check_batch("x", x)
    check_like("x_next", x_next, "x", x)
    check_like("pred", pred, "x", x)
    if pred_uncond is not None:
        check_like("pred_uncond", pred_uncond, "x", x)
    kl_coef = check_finite("kl_coef", kl_coef)
    exponential, rate, factor = divergence_form(kl_kind, kl_alpha, ("kl_kind", "kl_alpha"))
    if pred_ref is not None:
        check_like("pred_ref", pred_ref, "x", x)
    elif kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs pred_ref, the reference's prediction; pass it or kl_coef=0")
    check_std(std)
    low, high = _clip_bounds(clip_range)
    guidance = check_finite("guidance", guidance)
    scale, count = reduction_factors(reduction, x)
    rows = [per_sample("a", a, x), per_sample("b", b, x), per_sample("std", std, x)]
    rows += [per_sample("old_log_prob", old_log_prob, x), per_sample("advantage", advantage, x)]
    rows.append(None if weight is None else per_sample("weight", weight, x))
    numbers = (guidance, scale, count, low, high, kl_coef, exponential, rate, factor)
    return PolicyLoss(*_Loss.apply(x, x_next, pred, pred_uncond, pred_ref, *rows, numbers))


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    pair = tuple(clip_range) if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if len(pair) != 2:
        raise ValueError(f"clip_range={clip_range} must be one number or (low, high)")
    low, high = (check_number("clip_range", bound) for bound in pair)
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip_range={clip_range} must hold 0 <= low <= 1 and high >= 0")
    return low, high


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_next, pred, pred_uncond, pred_ref, a, b, std, old_log_prob, advantage, weight, numbers):
        loss, log_prob, ratio, clip_fraction, kl, spread_slope, gap_slope = _loss(
            x, x_next, pred, pred_uncond, pred_ref, a, b, std, old_log_prob, advantage, weight, *numbers
        )
        ctx.save_for_backward(spread_slope, gap_slope, x, x_next, pred, pred_uncond, pred_ref, a, b)
        ctx.guidance, ctx.penalised = numbers[0], pred_ref is not None and numbers[5] != 0
        ctx.mark_non_differentiable(log_prob, ratio, clip_fraction, kl)
        ctx.set_materialize_grads(False)  # zeros for what is not differentiated would be four launches
        return loss, log_prob, ratio, clip_fraction, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 12
        spread_slope, gap_slope, x, x_next, pred, pred_uncond, pred_ref, a, b = ctx.saved_tensors
        uncond_grad = ctx.needs_input_grad[3]
        gap_slope = gap_slope if ctx.penalised else None
        d_pred, d_uncond = policy_backward(
            grad, spread_slope, gap_slope, x, x_next, pred, pred_uncond, pred_ref, a, b, ctx.guidance, uncond_grad
        )
        return None, None, d_pred, d_uncond if uncond_grad else None, *(None,) * 8


def _reference(
    x, x_next, pred, pred_uncond, pred_ref, a, b, std, old_log_prob, advantage, weight,
    guidance, scale, count, low, high, kl_coef, exponential, rate, factor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = compute_dtype(x, x_next, pred, pred_uncond, pred_ref)
    f = guided(pred, pred_uncond, guidance, dtype)
    spread = sum_of_squares(x_next - mean_of(x, f, a, b))
    unscored, safe, precision = precision_of(std, scale, dtype)
    log_prob = log_prob_rows(spread, unscored, safe, precision, count)
    b, advantage, share = b.to(dtype), advantage.to(dtype), 1.0 / max(x.shape[0], 1)
    score_slope = b * precision

    log_ratio = (log_prob - old_log_prob.to(dtype)).masked_fill_(unscored, 0.0)
    # 0 x is 0 for a finite log-ratio, and nan for one that the clamp would turn into a harmless number
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).add_(log_ratio * 0.0).exp_()
    free, held = advantage * ratio, advantage * ratio.clamp(1.0 - low, 1.0 + high)
    clipped = held < free
    term = torch.minimum(free, held).neg_()
    cut = clipped | (log_ratio.abs() > LOG_RATIO_LIMIT)
    spread_slope = (free * score_slope).mul_(-share).masked_fill_(cut, 0.0)

    if pred_ref is None:
        kl, gap_slope = torch.zeros_like(term), torch.zeros_like(term)
    else:
        kl, gap_slope = divergence_rows(sum_of_squares(f - pred_ref), b * score_slope, exponential, rate, factor)
        term += kl.masked_fill_(unscored, 0.0) * kl_coef
        gap_slope *= kl_coef * share
    if weight is not None:
        weight = weight.to(dtype)
        term, spread_slope, gap_slope = term * weight, spread_slope * weight, gap_slope * weight
    clip_fraction = clipped.sum().to(dtype) / (x.shape[0] - unscored.sum()).clamp_(min=1)
    return term.sum() * share, log_prob, ratio, clip_fraction, kl, spread_slope, gap_slope


def _fake(x, x_next, pred, pred_uncond, pred_ref, *_) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x, x_next, pred, pred_uncond, pred_ref)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in ((), x.shape[:1], x.shape[:1], (), *(x.shape[:1],) * 3))


# ---- Triton

_LOG_RATIO_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


def _kernels(
    x, x_next, pred, pred_uncond, pred_ref, a, b, std, old_log_prob, advantage, weight,
    guidance, scale, count, low, high, kl_coef, exponential, rate, factor,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = x.shape[0]
    if rows == 0:
        return _reference(
            x, x_next, pred, pred_uncond, pred_ref, a, b, std, old_log_prob, advantage, weight,
            guidance, scale, count, low, high, kl_coef, exponential, rate, factor,
        )  # fmt: skip
    partial, split = row_sums(x, x_next, pred, pred_uncond, pred_ref, a, b, std, guidance)
    loss, clip_fraction = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    per_row = [torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(5)]
    launch(
        _loss_kernel, 1,
        [
            partial, b, std, old_log_prob, advantage, advantage if weight is None else weight,
            loss, clip_fraction, *per_row,
        ],
        [rows, -(-rows // ROWS), scale, count, low, high, kl_coef, rate, factor],
        WEIGHTED=weight is not None, REFERENCE=pred_ref is not None, EXPONENTIAL=exponential,
        SPLIT=split, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    log_prob, ratio, kl, spread_slope, gap_slope = per_row
    return loss, log_prob, ratio, clip_fraction, kl, spread_slope, gap_slope


@triton.jit
def _loss_kernel(
    p_partial,  # (1 + REFERENCE, B, SPLIT) fp32
    p_b,  # (B,), like the four below
    p_std,
    p_old,
    p_advantage,
    p_weight,
    p_loss,  # () fp32
    p_clip_fraction,  # () fp32
    p_log_prob,  # (B,) fp32, like the four below
    p_ratio,
    p_kl,
    p_spread_slope,
    p_gap_slope,
    rows,
    blocks,
    scale,
    count,
    low,
    high,
    kl_coef,
    rate,
    factor,
    WEIGHTED: tl.constexpr,
    REFERENCE: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for the whole batch: its rows are few, and the mean over them has one order."""
    scale, count = tl.cast(scale, tl.float32), tl.cast(count, tl.float32)
    lowest, highest = 1.0 - tl.cast(low, tl.float32), 1.0 + tl.cast(high, tl.float32)
    kl_coef, rate, factor = tl.cast(kl_coef, tl.float32), tl.cast(rate, tl.float32), tl.cast(factor, tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    b_clipped = tl.zeros([ROWS], tl.float32)
    b_scored = tl.zeros([ROWS], tl.float32)
    for i in range(blocks):
        o = i * ROWS + tl.arange(0, ROWS)
        m = o < rows
        b_b = tl.load(p_b + o, mask=m, other=0.0).to(tl.float32)
        b_std = tl.load(p_std + o, mask=m, other=0.0).to(tl.float32)
        b_old = tl.load(p_old + o, mask=m, other=0.0).to(tl.float32)
        b_advantage = tl.load(p_advantage + o, mask=m, other=0.0).to(tl.float32)
        m_scored = b_std != 0.0

        b_spread = row_totals(p_partial, i * ROWS, rows, SPLIT, ROWS)
        b_log_prob, b_score_slope = log_prob_of(b_spread, b_b, b_std, scale, count)
        b_log_ratio = tl.where(m_scored, b_log_prob - b_old, 0.0)
        m_cut = tl.abs(b_log_ratio) > _LOG_RATIO_LIMIT
        b_clamped = tl.where(m_cut, tl.where(b_log_ratio > 0.0, _LOG_RATIO_LIMIT, -_LOG_RATIO_LIMIT), b_log_ratio)
        # the difference is 0 for a finite log-ratio, and nan for one that the clamp would turn into a harmless number
        b_ratio = tl.exp(b_clamped + (b_log_ratio - b_log_ratio))
        b_within = tl.where(b_ratio < lowest, lowest, tl.where(b_ratio > highest, highest, b_ratio))
        b_free, b_held = -b_advantage * b_ratio, -b_advantage * b_within
        m_clipped = b_held > b_free
        b_term = tl.where(m_clipped, b_held, b_free)
        b_spread_slope = tl.where(m_clipped | m_cut, 0.0, b_free * b_score_slope / rows)
        tl.store(p_log_prob + o, b_log_prob, mask=m)
        tl.store(p_ratio + o, b_ratio, mask=m)

        if WEIGHTED:
            b_weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
            b_spread_slope *= b_weight
        b_kl, b_gap_slope = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        if REFERENCE:
            b_gap = row_totals(p_partial + rows * SPLIT, i * ROWS, rows, SPLIT, ROWS)
            b_kl, b_gap_slope = divergence_of(b_gap, b_b, b_std, rate, factor, scale, EXPONENTIAL)
            b_term += b_kl * kl_coef
            b_gap_slope = b_gap_slope * kl_coef / rows
            if WEIGHTED:
                b_gap_slope *= b_weight
        if WEIGHTED:
            b_term *= b_weight
        tl.store(p_kl + o, b_kl, mask=m)
        tl.store(p_spread_slope + o, b_spread_slope, mask=m)
        tl.store(p_gap_slope + o, b_gap_slope, mask=m)
        b_total += tl.where(m, b_term, 0.0)
        b_clipped += tl.where(m & m_scored & m_clipped, 1.0, 0.0)
        b_scored += tl.where(m & m_scored, 1.0, 0.0)
    tl.store(p_loss, tl.sum(b_total) / rows)
    scored = tl.sum(b_scored)
    tl.store(p_clip_fraction, tl.sum(b_clipped) / tl.where(scored > 0.0, scored, 1.0))


_loss = register(
    "policy_loss(Tensor x, Tensor x_next, Tensor pred, Tensor? pred_uncond, Tensor? pred_ref, Tensor a, Tensor b, "
    "Tensor std, Tensor old_log_prob, Tensor advantage, Tensor? weight, float guidance, float scale, float count, "
    "float low, float high, float kl_coef, bool exponential, float rate, float factor) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels=_kernels,
    fake=_fake,
)
