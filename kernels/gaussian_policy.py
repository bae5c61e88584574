"""The affine Gaussian policy: sampling a step, and the log-density of a step that was taken."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import (
    check_batch,
    check_finite,
    check_like,
    check_std,
    per_sample,
    per_sample_int,
    reduction_factors,
)
from .backend import launch, register
from .noise import Noise, standard_normal_reference
from .policy_backward import policy_backward
from .rows import (
    column,
    compute_dtype,
    guided,
    in_layout,
    mean_of,
    row_strides,
    row_sums,
    row_totals,
    sum_of_squares,
)

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


@torch.no_grad()
def policy_sample(
    x: Tensor,
    pred: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    std: Tensor | float,
    *,
    pred_uncond: Tensor | None = None,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Take one step x_next = mean + std z and score the step as it is stored.

    mean = a x + b f, with f = pred_uncond + guidance (pred - pred_uncond) when pred_uncond is given, else f = pred.
    x_next is rounded to the dtype of x before it is scored, so ``policy_log_prob`` on the stored tensors returns the
    same bits (on one back end, for x of one memory layout, in any batch). No gradient.

    Args:
        x: (B, ...), the current latents; float32, bfloat16 or float16 (float64 on CPU).
        pred: like x (any of the dtypes), the network output.
        a, b, std: per-step scalars, each a (B,) tensor of any float dtype or a number; used as float32. std >= 0;
            std = 0 is a deterministic step: x_next = mean and log_prob = 0.
        pred_uncond: like x, the output without the condition.
        guidance: weight of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); read only with pred_uncond.
        noise: like x, standard normal z. Without it, z is drawn in float32: by ``torch.randn``, or from a seed.
        generator: of ``torch.randn``, on its own device.
        seed, offset: draw z inside the kernel, where it costs no memory: the z of a sample is a function of its seed,
            its offset and the positions of its elements in memory alone, whatever the batch, the rank or the device
            (up to rounding). Each an int64 tensor (B,) or (), or an int; one seed serves all samples, one offset
            numbers them: sample i draws from offset + i. offset None: 0. A captured CUDA graph reads the tensors anew
            at each replay: advance one in place. See ``engine.kernels.noise`` for the generator.
        reduction: over a sample's elements, see ``policy_log_prob``.

    Returns:
        x_next, like x in shape, dtype and layout; log_prob, (B,) float32.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value; more than one source of noise.
    """
    check_batch("x", x)
    check_like("pred", pred, "x", x)
    if pred_uncond is not None:
        check_like("pred_uncond", pred_uncond, "x", x)
    given = [
        name for name, source in (("noise", noise), ("generator", generator), ("seed", seed)) if source is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; pass one of them")
    if seed is not None:
        seed, offset = per_sample_int("seed", seed, x), per_sample_int("offset", 0 if offset is None else offset, x)
    elif offset is not None:
        raise ValueError("offset numbers the streams of a seed; pass seed too, or leave it out")
    elif noise is None:
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(x.device)
    else:
        check_like("noise", noise, "x", x)
    check_std(std)
    guidance = check_finite("guidance", guidance)
    scale, count = reduction_factors(reduction, x)
    a, b, std = per_sample("a", a, x), per_sample("b", b, x), per_sample("std", std, x)
    return _sample(x, pred, pred_uncond, noise, seed, offset, a, b, std, guidance, scale, count)


def policy_log_prob(
    x: Tensor,
    x_next: Tensor,
    pred: Tensor,
    a: Tensor | float,
    b: Tensor | float,
    std: Tensor | float,
    *,
    pred_uncond: Tensor | None = None,
    guidance: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Log-density of the step x -> x_next under the policy N(mean, std^2 I), mean = a x + b f.

    log p = R_i [ -(x_next_i - mean_i)^2 / (2 std^2) - ln std - ln(2 pi)/2 ], R = the mean over a sample's elements (the
    convention of DDPO, Black et al. 2023, arXiv:2305.13301, appendix) or their sum. The arguments are those of
    ``policy_sample``; x_next is like x, in any of the dtypes.

    Returns:
        (B,) float32 (float64 when an input is float64), differentiable once in pred and pred_uncond:
        d log p / d f_i = b (x_next_i - mean_i) / std^2, over the number of elements for "mean";
        d f / d pred = guidance, d f / d pred_uncond = 1 - guidance.
        A sample with std = 0 has no density: its log_prob is 0, its gradient zero.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.
    """
    check_batch("x", x)
    check_like("x_next", x_next, "x", x)
    check_like("pred", pred, "x", x)
    if pred_uncond is not None:
        check_like("pred_uncond", pred_uncond, "x", x)
    check_std(std)
    guidance = check_finite("guidance", guidance)
    scale, count = reduction_factors(reduction, x)
    a, b, std = per_sample("a", a, x), per_sample("b", b, x), per_sample("std", std, x)
    return _LogProb.apply(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count):
        log_prob, slope = _score(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count)
        ctx.save_for_backward(slope, x, x_next, pred, pred_uncond, a, b)
        ctx.guidance = guidance
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope, x, x_next, pred, pred_uncond, a, b = ctx.saved_tensors
        uncond_grad = ctx.needs_input_grad[3]
        d_pred, d_uncond = policy_backward(
            grad, slope, None, x, x_next, pred, pred_uncond, None, a, b, ctx.guidance, uncond_grad
        )
        return None, None, d_pred, d_uncond if uncond_grad else None, *(None,) * 6


def precision_of(std: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(std == 0, std with 1 in place of 0, scale / std^2 with 0 where std is 0), each (B,)."""
    std = std.to(dtype)
    unscored = std == 0
    safe = std.masked_fill(unscored, 1.0)
    return unscored, safe, (safe * safe).reciprocal_().mul_(scale).masked_fill_(unscored, 0.0)


def log_prob_rows(spread: Tensor, unscored: Tensor, safe: Tensor, precision: Tensor, count: float) -> Tensor:
    """log_prob (B,) from the row sums; its slope, d log_prob / d f = slope (x_next - mean), is b precision."""
    # the logarithm in float64: in float32 torch's vector and scalar code, so two batches, may differ in the last bit
    constant = safe.double().log_().add_(HALF_LOG_TWO_PI).mul_(count).to(spread.dtype)
    return (spread * precision).mul_(-0.5).sub_(constant).masked_fill_(unscored, 0.0)


def _sample_reference(
    x, pred, pred_uncond, noise, seed, offset, a, b, std, guidance, scale, count
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, pred, pred_uncond)
    mean = mean_of(x, guided(pred, pred_uncond, guidance, dtype), a, b)
    if noise is None:
        noise = torch.empty_strided(x.shape, row_strides(x), dtype=torch.float32, device=x.device)
        rows, n = x.shape[0], math.prod(x.shape[1:])
        noise.as_strided((rows, n), (n, 1)).copy_(standard_normal_reference(seed, offset, rows, n))
    x_next = in_layout((noise.to(dtype) * column(std, x, dtype)).add_(mean), x)
    rows = precision_of(std, scale, dtype)
    return x_next, log_prob_rows(sum_of_squares(x_next - mean), *rows, count)


def _sample_fake(x, pred, pred_uncond, noise, seed, offset, a, b, std, guidance, scale, count) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x, pred, pred_uncond))


def _score_reference(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, x_next, pred, pred_uncond)
    mean = mean_of(x, guided(pred, pred_uncond, guidance, dtype), a, b)
    rows = precision_of(std, scale, dtype)
    return log_prob_rows(sum_of_squares(x_next - mean), *rows, count), b.to(dtype) * rows[-1]


def _score_fake(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count) -> tuple[Tensor, Tensor]:
    rows = x.new_empty(x.shape[0], dtype=compute_dtype(x, x_next, pred, pred_uncond))
    return rows, torch.empty_like(rows)


# ---- Triton

# Rows a program of stage 2.
ROWS = 32
WARPS = 4
_HALF_LOG_TWO_PI = tl.constexpr(HALF_LOG_TWO_PI)


def _sample_kernels(
    x, pred, pred_uncond, noise, seed, offset, a, b, std, guidance, scale, count
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty(0, dtype=torch.float32, device=x.device)
    x_next = torch.empty_strided(x.shape, row_strides(x), dtype=x.dtype, device=x.device)
    source = Noise(noise, seed, offset)
    log_prob, _ = _launch(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count, source)
    return in_layout(x_next, x), log_prob


def _score_kernels(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _score_reference(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count)
    return _launch(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count)


def _launch(x, x_next, pred, pred_uncond, a, b, std, guidance, scale, count, noise=None) -> tuple[Tensor, Tensor]:
    partial, split = row_sums(x, x_next, pred, pred_uncond, None, a, b, std, guidance, noise=noise)
    rows = x.shape[0]
    log_prob, slope = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        _score_kernel, -(-rows // ROWS), [partial, b, std, log_prob, slope], [rows, scale, count],
        SPLIT=split, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return log_prob, slope


@triton.jit
def log_prob_of(b_spread, b_b, b_std, scale, count):
    """log_prob and its slope from the totals of rows; both 0 where std is 0."""
    m_scored = b_std != 0.0
    b_safe = tl.where(m_scored, b_std, 1.0)
    b_inverse = 1.0 / b_safe
    b_log_prob = b_spread * b_inverse * b_inverse * scale * -0.5 - (tl.log(b_safe) + _HALF_LOG_TWO_PI) * count
    b_slope = b_b * b_inverse * b_inverse * scale
    return tl.where(m_scored, b_log_prob, 0.0), tl.where(m_scored, b_slope, 0.0)


@triton.jit
def _score_kernel(
    p_partial,  # (B, SPLIT) fp32
    p_b,  # (B,)
    p_std,  # (B,)
    p_log_prob,  # (B,) fp32
    p_slope,  # (B,) fp32
    rows,
    scale,
    count,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS
    o = i_row + tl.arange(0, ROWS)
    m = o < rows
    b_spread = row_totals(p_partial, i_row, rows, SPLIT, ROWS)
    b_b = tl.load(p_b + o, mask=m, other=0.0).to(tl.float32)
    b_std = tl.load(p_std + o, mask=m, other=0.0).to(tl.float32)
    b_log_prob, b_slope = log_prob_of(b_spread, b_b, b_std, tl.cast(scale, tl.float32), tl.cast(count, tl.float32))
    tl.store(p_log_prob + o, b_log_prob, mask=m)
    tl.store(p_slope + o, b_slope, mask=m)


_sample = register(
    "policy_sample(Tensor x, Tensor pred, Tensor? pred_uncond, Tensor? noise, Tensor? seed, Tensor? offset, "
    "Tensor a, Tensor b, Tensor std, float guidance, float scale, float count) -> (Tensor, Tensor)",
    reference=_sample_reference,
    kernels=_sample_kernels,
    fake=_sample_fake,
)
_score = register(
    "policy_score(Tensor x, Tensor x_next, Tensor pred, Tensor? pred_uncond, Tensor a, Tensor b, Tensor std, "
    "float guidance, float scale, float count) -> (Tensor, Tensor)",
    reference=_score_reference,
    kernels=_score_kernels,
    fake=_score_fake,
)
