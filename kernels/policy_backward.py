"""The gradient that the Gaussian-policy operators share: elementwise in the predictions, one launch.

For every function F of a sample's spread and gap (see ``rows``), with the slopes (B,) that its forward pass left:

    df = dF / d f = spread_slope (x_next - mean) + gap_slope (f - f_ref)
    d pred = guidance df,   d pred_uncond = (1 - guidance) df
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launch, register
from .rows import arranged, column, compute_dtype, guided, in_layout, load, mean_of, row_strides, tiling_of


def backward_reference(
    grad: Tensor,
    spread_slope: Tensor | None,
    gap_slope: Tensor | None,
    x: Tensor | None,
    x_next: Tensor | None,
    pred: Tensor,
    pred_uncond: Tensor | None,
    pred_ref: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    guidance: float,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and pred_uncond: df = grad (spread_slope (x_next - mean) + gap_slope (f - f_ref))."""
    dtype = compute_dtype(x, x_next, pred, pred_uncond, pred_ref)
    f = guided(pred, pred_uncond, guidance, dtype)
    df = None
    if spread_slope is not None:
        df = (x_next - mean_of(x, f, a, b)).mul_(column(grad * spread_slope, pred, dtype))
    if gap_slope is not None:
        gap = (f - pred_ref).mul_(column(grad * gap_slope, pred, dtype))
        df = gap if df is None else df.add_(gap)
    if pred_uncond is None:
        return in_layout(df, pred), pred.new_empty(0)
    uncond = in_layout(df * (1.0 - guidance), pred_uncond) if uncond_grad else pred.new_empty(0)
    return in_layout(df.mul_(guidance), pred), uncond


# ---- Triton


def backward_kernels(
    grad, spread_slope, gap_slope, x, x_next, pred, pred_uncond, pred_ref, a, b, guidance, uncond_grad
) -> tuple[Tensor, Tensor]:
    """One launch, see ``backward_reference``."""
    score, reference, is_guided = spread_slope is not None, gap_slope is not None, pred_uncond is not None
    rows = pred.shape[0]
    if rows == 0:
        return backward_fake(
            grad, spread_slope, gap_slope, x, x_next, pred, pred_uncond, pred_ref, a, b, guidance, uncond_grad
        )
    strides = row_strides(pred)
    n = pred[0].numel()
    tiling = tiling_of(n)
    # the gradient of a sum arrives expanded from one number, the gradient of the loss is one number
    per_row = grad.dim() > 0 and grad.stride(0) != 0
    d_pred = torch.empty_strided(pred.shape, strides, dtype=pred.dtype, device=pred.device)
    d_uncond = pred.new_empty(0)
    if is_guided and uncond_grad:
        d_uncond = torch.empty_strided(pred.shape, strides, dtype=pred_uncond.dtype, device=pred.device)
    inputs = [None if t is None else arranged(t, strides) for t in (x, x_next, pred, pred_uncond, pred_ref)]
    inputs = [grad.contiguous() if per_row else grad, spread_slope, gap_slope, *inputs, a, b]
    launch(
        _backward_kernel, rows * tiling.tiles,
        [*(pred if t is None else t for t in inputs), d_pred, d_uncond], [guidance, n, tiling.tiles],
        PER_ROW=per_row, SCORE=score, GUIDED=is_guided, REFERENCE=reference, UNCOND_GRAD=is_guided and uncond_grad,
        BLOCK=tiling.block, num_warps=tiling.warps,
    )  # fmt: skip
    return in_layout(d_pred, pred), in_layout(d_uncond, pred_uncond) if is_guided and uncond_grad else d_uncond


@triton.jit
def _backward_kernel(
    p_grad,  # (B,) if PER_ROW, else ()
    p_spread_slope,  # (B,) fp32
    p_gap_slope,  # (B,) fp32
    p_x,  # (B, n), like the four below
    p_next,
    p_pred,
    p_uncond,
    p_ref,
    p_a,  # (B,)
    p_b,  # (B,)
    p_d_pred,  # (B, n)
    p_d_uncond,  # (B, n)
    guidance,
    n,
    tiles,
    PER_ROW: tl.constexpr,
    SCORE: tl.constexpr,
    GUIDED: tl.constexpr,
    REFERENCE: tl.constexpr,
    UNCOND_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """df = grad (spread_slope (x_next - mean) + gap_slope (f - f_ref)), one block of a row a program."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // tiles
    o = (i_program % tiles) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    o += i_row * n
    guidance = tl.cast(guidance, tl.float32)
    grad = tl.load(p_grad + (i_row if PER_ROW else 0)).to(tl.float32)
    b_f = load(p_pred + o, m)
    if GUIDED:
        b_uncond = load(p_uncond + o, m)
        b_f = (b_f - b_uncond) * guidance + b_uncond
    b_df = tl.zeros([BLOCK], tl.float32)
    if SCORE:
        b_mean = load(p_x + o, m) * tl.load(p_a + i_row).to(tl.float32) + b_f * tl.load(p_b + i_row).to(tl.float32)
        b_df += (load(p_next + o, m) - b_mean) * (grad * tl.load(p_spread_slope + i_row))
    if REFERENCE:
        b_df += (b_f - load(p_ref + o, m)) * (grad * tl.load(p_gap_slope + i_row))
    if UNCOND_GRAD:
        tl.store(p_d_uncond + o, (b_df * (1.0 - guidance)).to(p_d_uncond.dtype.element_ty), mask=m)
    if GUIDED:
        b_df *= guidance
    tl.store(p_d_pred + o, b_df.to(p_d_pred.dtype.element_ty), mask=m)


def backward_fake(
    grad, spread_slope, gap_slope, x, x_next, pred, pred_uncond, pred_ref, a, b, guidance, uncond_grad
) -> tuple[Tensor, Tensor]:
    has_uncond = pred_uncond is not None and uncond_grad
    return torch.empty_like(pred), torch.empty_like(pred_uncond) if has_uncond else pred.new_empty(0)


policy_backward = register(
    "policy_backward(Tensor grad, Tensor? spread_slope, Tensor? gap_slope, Tensor? x, Tensor? x_next, Tensor pred, "
    "Tensor? pred_uncond, Tensor? pred_ref, Tensor? a, Tensor? b, float guidance, bool uncond_grad) "
    "-> (Tensor, Tensor)",
    reference=backward_reference,
    kernels=backward_kernels,
    fake=backward_fake,
)
