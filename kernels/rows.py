"""What every Gaussian-policy operator shares: sums of squares over a sample's elements, and their gradient.

For a batch of samples x with network outputs pred (and pred_uncond under guidance w), and per-sample scalars a, b, std:

    f = pred_uncond + w (pred - pred_uncond)   (f = pred without guidance)
    mean = a x + b f
    spread_i = sum over the elements of (x_next - mean)^2,   gap_i = sum over the elements of (f - f_ref)^2

Log-probs, divergences and the loss are functions of these two sums alone, so sampling and scoring share the code below,
and a sample's log-prob has the same bits wherever it is computed. All arithmetic is fp32 and made of separately rounded
additions and multiplications: results do not depend on which of them a compiler or a vector unit would fuse.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import refuse_float64
from .backend import launch
from .noise import Noise, standard_normal

# Rows are summed in chunks of this many elements, below torch's threshold for splitting one reduction over threads,
# which would make the bits of a long row depend on the batch size.
_CHUNK = 16384


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64 (torch reference only), else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def column(scalars: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Per-sample scalars (B,) shaped to broadcast over ``like`` (B, ...)."""
    return scalars.to(dtype).view(-1, *(1,) * (like.dim() - 1))


def guided(pred: Tensor, uncond: Tensor | None, guidance: float, dtype: torch.dtype) -> Tensor:
    """The guided network output f, in ``dtype``; pred itself where there is nothing to do."""
    f = pred.to(dtype)
    if uncond is None:
        return f
    base = uncond.to(dtype)
    return (f - base).mul_(guidance).add_(base)


def mean_of(x: Tensor, f: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b f as a new tensor in the dtype of f."""
    mean = x.to(f.dtype) * column(a, x, f.dtype)
    return mean.add_(f * column(b, x, f.dtype))


def sum_of_squares(values: Tensor) -> Tensor:
    """(B, ...) -> (B,), in logical order whatever the layout, with bits that do not depend on B."""
    squares = values.square().unsqueeze(-1).flatten(1)  # (B,) is a batch of single numbers
    if squares.shape[1] <= _CHUNK:
        return squares.sum(1)
    return torch.stack([part.sum(1) for part in squares.split(_CHUNK, 1)], 1).sum(1)


def in_layout(values: Tensor, like: Tensor) -> Tensor:
    """``values`` in the dtype and the dense layout that ``torch.empty_like(like)`` has; copied only if need be."""
    if values.dtype == like.dtype and values.stride() == like.stride():
        return values
    result = torch.empty_like(like)
    if values.dtype == result.dtype and _same_layout(values.shape, values.stride(), result.stride()):
        return values
    return result.copy_(values)


def _same_layout(shape: torch.Size, strides: tuple[int, ...], others: tuple[int, ...]) -> bool:
    if strides == others:
        return True
    # the stride of a dimension of one element says nothing
    return all(n == 1 or s == o for n, s, o in zip(shape, strides, others, strict=True))


# ---- Triton


def row_strides(x: Tensor) -> tuple[int, ...]:
    """The strides in which kernels read a batch: those of x when its samples are dense blocks, else contiguous ones."""
    if x.is_contiguous():
        return x.stride()
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return _contiguous(x)
        expected *= size
    return x.stride() if x.shape[0] == 1 or x.stride(0) == expected else _contiguous(x)


def _contiguous(x: Tensor) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def arranged(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` itself when it has these strides, else one copy that has."""
    refuse_float64(x)
    if _same_layout(x.shape, x.stride(), strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


class Tiling(NamedTuple):
    """How programs share a row of n elements. From n only, never from the batch or the GPU: so a row's sum has the
    same bits in any batch."""

    block: int
    warps: int
    tiles: int
    """blocks a row"""
    split: int
    """programs a row, when it is summed"""
    rounds: int
    """blocks each of these sums"""
    aligned: bool
    """whether rows can be read in vectors"""


@functools.cache
def tiling_of(n: int) -> Tiling:
    """The tiling of rows of n elements: 8 elements a thread, so that bf16 loads are 128 bits wide."""
    aligned = n % 16 == 0  # 16 is also what Triton specialises integers on
    block = max(128, min(2048, triton.next_power_of_2(n)))
    tiles = triton.cdiv(n, block)
    split = min(64, triton.next_power_of_2(tiles))
    return Tiling(block, max(1, block // 256), tiles, split, triton.cdiv(tiles, split), aligned)


def row_sums(
    x: Tensor | None,
    x_next: Tensor | None,
    pred: Tensor,
    pred_uncond: Tensor | None,
    pred_ref: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    std: Tensor | None,
    guidance: float,
    *,
    noise: Noise | None = None,
) -> tuple[Tensor, int]:
    """Stage 1, one launch: partial sums (sums, B, SPLIT) of spread (with x) and gap (with pred_ref), and SPLIT.

    With noise, x_next is written (in the layout of x, see ``arranged``) before it is scored.
    """
    like = pred if x is None else x
    strides = row_strides(like)
    rows, n = like.shape[0], like[0].numel()
    tiling = tiling_of(n)
    score, reference, given = x is not None, pred_ref is not None, None if noise is None else noise.given
    drawn = noise is not None and given is None
    pred = arranged(pred, strides)
    tensors = [pred if t is None else arranged(t, strides) for t in (x, x_next, pred, pred_uncond, pred_ref, given)]
    streams = (noise.seed, noise.offset) if drawn else (pred, pred)
    scalars = [pred if t is None else t for t in (a, b, std)]
    partial = torch.empty((score + reference, rows, tiling.split), dtype=torch.float32, device=like.device)
    launch(
        _row_sums_kernel, rows * tiling.split,
        [*tensors, *streams, *scalars, partial], [guidance, n, tiling.rounds],
        SAMPLE=noise is not None, DRAW=drawn, SEEDS=drawn and noise.seed.dim() == 1,
        OFFSETS=drawn and noise.offset.dim() == 1, SCORE=score, GUIDED=pred_uncond is not None, REFERENCE=reference,
        ALIGNED=tiling.aligned, SPLIT=tiling.split, BLOCK=tiling.block, num_warps=tiling.warps,
    )  # fmt: skip
    return partial, tiling.split


# tl.sum adds in the order in which the compiler spread a block over threads, and that depends on the dtypes that a
# kernel loads: one row could be summed differently in sampling and in the loss. So what a thread reads is first added
# up in explicit pairs, which have one order; of one number a thread, tl.sum has one order too. Which pairs is a matter
# of cost: a thread holds neighbours where loads are vectors (aligned rows), else elements a stride apart.


@triton.jit
def _sum_neighbours(x, SIZE: tl.constexpr):
    """Sums of each SIZE (a power of two) neighbours of x."""
    if SIZE > 1:
        left, right = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
        x = _sum_neighbours(left + right, SIZE // 2)
    return x


@triton.jit
def _sum_strided(x, SIZE: tl.constexpr):
    """Sums of each SIZE (a power of two) elements of x that are x.shape[0] // SIZE apart."""
    if SIZE > 1:
        left, right = tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2]), (1, 0)))
        x = _sum_strided(left + right, SIZE // 2)
    return x


@triton.jit
def _squares(x, ALIGNED: tl.constexpr, EACH: tl.constexpr):
    """Sums of EACH squares, as many as a thread holds."""
    return _sum_neighbours(x * x, EACH) if ALIGNED else _sum_strided(x * x, EACH)


@triton.jit
def row_totals(p_partial, i_row, rows, SPLIT: tl.constexpr, ROWS: tl.constexpr):
    """Stage 2: the totals (ROWS,) of the rows from ``i_row`` on, from the partial sums (B, SPLIT) of all ``rows``."""
    o = tl.cast(i_row, tl.int64) * SPLIT + tl.arange(0, ROWS * SPLIT)
    return _sum_neighbours(tl.load(p_partial + o, mask=o < rows * SPLIT, other=0.0), SPLIT)


@triton.jit
def load(p, mask):
    # fp32 at once: sums of bf16 would accumulate in bf16
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_sums_kernel(
    p_x,  # (B, n), like the five below
    p_next,  # written if SAMPLE, else read
    p_pred,
    p_uncond,
    p_ref,
    p_noise,
    p_seed,  # (B,) int64 if SEEDS, else ()
    p_offset,  # (B,) int64 if OFFSETS, else (), of the first row
    p_a,  # (B,), like the two below
    p_b,
    p_std,
    p_partial,  # (SCORE + REFERENCE, B, SPLIT) fp32
    guidance,
    n,
    rounds,
    SAMPLE: tl.constexpr,
    DRAW: tl.constexpr,
    SEEDS: tl.constexpr,
    OFFSETS: tl.constexpr,
    SCORE: tl.constexpr,
    GUIDED: tl.constexpr,
    REFERENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, split) sums the blocks split, split + SPLIT, ... of its row."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // SPLIT
    i_split = i_program % SPLIT
    o_row = i_row * n
    guidance = tl.cast(guidance, tl.float32)
    if SCORE:
        a = tl.load(p_a + i_row).to(tl.float32)
        b = tl.load(p_b + i_row).to(tl.float32)
        std = tl.load(p_std + i_row).to(tl.float32)
    if DRAW:
        seed = tl.load(p_seed + (i_row if SEEDS else 0))
        offset = tl.load(p_offset + i_row) if OFFSETS else tl.load(p_offset) + i_row
    EACH: tl.constexpr = 8 if BLOCK >= 256 else BLOCK // 32  # elements a thread, see tiling_of
    b_spread = tl.zeros([BLOCK // EACH], tl.float32)
    b_gap = tl.zeros([BLOCK // EACH], tl.float32)
    for i in range(rounds):
        start = (i * SPLIT + i_split) * BLOCK
        o = start + tl.arange(0, BLOCK)
        m = o < n
        o += o_row
        b_f = load(p_pred + o, m)
        if GUIDED:
            b_uncond = load(p_uncond + o, m)
            b_f = (b_f - b_uncond) * guidance + b_uncond
        if SCORE:
            b_mean = load(p_x + o, m) * a + b_f * b
            if SAMPLE:
                if DRAW:
                    b_noise = tl.where(m, standard_normal(seed, offset, start, BLOCK), 0.0)
                else:
                    b_noise = load(p_noise + o, m)
                b_next = (b_noise * std + b_mean).to(p_next.dtype.element_ty)
                tl.store(p_next + o, b_next, mask=m)
                b_next = b_next.to(tl.float32)
            else:
                b_next = load(p_next + o, m)
            b_spread += _squares(b_next - b_mean, ALIGNED, EACH)
        if REFERENCE:
            b_gap += _squares(b_f - load(p_ref + o, m), ALIGNED, EACH)
    o_partial = i_program + tl.arange(0, 1)
    if SCORE:
        tl.store(p_partial + o_partial, tl.sum(b_spread, 0, keep_dims=True))
        o_partial += tl.num_programs(0)
    if REFERENCE:
        tl.store(p_partial + o_partial, tl.sum(b_gap, 0, keep_dims=True))
