"""Triton kernels of GroupNorm with SiLU, and how a sample is tiled for them.

A sample of C channels and S positions is read in tiles (BLOCK_C, BLOCK_S), whichever of the two is the fast dimension
in memory, so that weight and bias are one number per row of a tile. A group whose padded tile fits into registers is
*resident*: one program reads it once. Larger groups are *split*: one pass sums over tiles, a second merges the sums, a
third reads the tiles again. Sums over tiles are kept per channel, so that the same partial sums serve the groups and
the gradients of weight and bias. Everything is split by the shape of a sample alone and added in a fixed order without
atomics: a sample has the same bits in any batch, and a gradient in every run.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from .rows import load

# Elements that a program keeps in registers; 65536 would spill on every GPU.
RESIDENT = 16384
_SPLIT_TILE = 8192
# Partial sums that the merging kernels read at once.
MERGED = 1024
MERGE_WARPS = 4


class GroupTiling(NamedTuple):
    """How programs share a sample: (sample, block of channels, part of the positions) each."""

    resident: bool
    width: int
    """channels a block: those of a group when it is resident"""
    block_c: int
    block_s: int
    blocks: int
    parts: int
    warps: int
    columns: int
    """channels whose sums a program adds up over samples and parts"""


@functools.cache
def group_tiling(channels: int, positions: int, groups: int, channels_last: bool) -> GroupTiling:
    """The tiling of samples of this shape: up to 32 elements a thread, in vectors along the fast dimension."""
    width = channels // groups
    block_c, block_s = triton.next_power_of_2(width), triton.next_power_of_2(positions)
    resident = block_c * block_s <= RESIDENT
    if not resident:
        # 64 neighbouring channels are a cache line of bf16
        narrowest = min(64, triton.next_power_of_2(channels)) if channels_last else 1
        block_s = min(_SPLIT_TILE // narrowest, block_s)
        width = block_c = min(_SPLIT_TILE // block_s, triton.next_power_of_2(channels))
    warps = min(16, max(1, block_c * block_s // (512 if resident else 1024)))
    blocks, parts = triton.cdiv(channels, width), triton.cdiv(positions, block_s)
    # few where there are many parts, which are neighbours in memory; else the channels are
    columns = max(1, min(32, MERGED // triton.next_power_of_2(parts)))
    return GroupTiling(resident, width, block_c, block_s, blocks, parts, warps, columns)


@triton.jit
def _tile(
    channels, positions, blocks, parts, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """This program's sample, channels and their mask (BLOCK_C,), offsets and their mask (BLOCK_C, BLOCK_S)."""
    i_program = tl.program_id(0).to(tl.int64)
    i_sample = i_program // parts // blocks
    first = i_program // parts % blocks * WIDTH
    o_c = first + tl.arange(0, BLOCK_C)
    o_s = i_program % parts * BLOCK_S + tl.arange(0, BLOCK_S)
    m_c = (o_c < channels) & (o_c < first + WIDTH)
    o = i_sample * channels * positions
    if CHANNELS_LAST:
        o += o_c[:, None] + o_s[None, :] * channels
    else:
        o += o_c[:, None] * positions + o_s[None, :]
    return i_sample, o_c, m_c, o, m_c[:, None] & (o_s < positions)[None, :]


@triton.jit
def _affine(p_weight, p_bias, o_c, m_c, AFFINE: tl.constexpr):
    """weight and bias of the channels o_c, as (BLOCK_C, 1)."""
    b_weight = tl.full([o_c.shape[0]], 1.0, tl.float32)
    b_bias = tl.full([o_c.shape[0]], 0.0, tl.float32)
    if AFFINE:
        b_weight = load(p_weight + o_c, m_c)
        b_bias = load(p_bias + o_c, m_c)
    return b_weight[:, None], b_bias[:, None]


@triton.jit
def _activated(b_z, SILU: tl.constexpr):
    if SILU:
        b_z *= tl.sigmoid(b_z)
    return b_z


@triton.jit
def _group_size(positions, GROUP: tl.constexpr):
    # as a float: a group may hold more than 2^31 elements
    return tl.cast(positions, tl.float32) * GROUP


# ---- forward


@triton.jit
def forward_kernel(
    p_x,  # (N, C, S) or (N, S, C), like y
    p_weight,  # (C,)
    p_bias,  # (C,)
    p_y,
    p_mean,  # (N, G) fp32
    p_rstd,  # (N, G) fp32
    eps,
    channels,
    positions,
    groups,
    GROUP: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program a resident group; the variance is summed in a second pass over registers."""
    _, o_c, m_c, o, m = _tile(channels, positions, groups, 1, GROUP, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    b_weight, b_bias = _affine(p_weight, p_bias, o_c, m_c, AFFINE)
    b_x = load(p_x + o, m)
    mean = tl.sum(b_x) / _group_size(positions, GROUP)
    b_x = tl.where(m, b_x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(b_x * b_x) / _group_size(positions, GROUP) + tl.cast(eps, tl.float32))
    tl.store(p_mean + tl.program_id(0), mean)
    tl.store(p_rstd + tl.program_id(0), rstd)
    b_y = _activated(b_x * (b_weight * rstd) + b_bias, SILU)
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def moments_kernel(
    p_x,  # (N, C, S) or (N, S, C)
    p_partial_mean,  # (N, C, PARTS) fp32
    p_partial_squares,  # (N, C, PARTS) fp32, sums of squared distances from the mean beside them
    channels,
    positions,
    blocks,
    parts,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Moments of each channel of a tile."""
    i_sample, o_c, m_c, o, m = _tile(channels, positions, blocks, parts, BLOCK_C, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    i_part = tl.program_id(0) % parts
    b_x = load(p_x + o, m)
    b_mean = tl.sum(b_x, 1) / tl.minimum(positions - i_part * BLOCK_S, BLOCK_S)
    b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    o_partial = (i_sample * channels + o_c) * parts + i_part
    tl.store(p_partial_mean + o_partial, b_mean, mask=m_c)
    tl.store(p_partial_squares + o_partial, tl.sum(b_x * b_x, 1), mask=m_c)


@triton.jit
def statistics_kernel(
    p_partial_mean,  # (N, C, PARTS) fp32, like the one below
    p_partial_squares,
    p_mean,  # (N, G) fp32
    p_rstd,  # (N, G) fp32
    eps,
    positions,
    parts,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program (sample, group) merges its moments as distances from one of them, so that a far mean costs nothing."""
    i_program = tl.program_id(0).to(tl.int64)
    size = GROUP * parts
    p_partial_mean += i_program * size
    p_partial_squares += i_program * size
    pivot = tl.load(p_partial_mean)
    b_total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_count = tl.minimum(positions - o % parts * BLOCK_S, BLOCK_S)
        b_total += tl.where(o < size, (load(p_partial_mean + o, o < size) - pivot) * b_count, 0.0)
    mean = tl.sum(b_total) / _group_size(positions, GROUP) + pivot
    b_total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_count = tl.minimum(positions - o % parts * BLOCK_S, BLOCK_S)
        b_shift = load(p_partial_mean + o, o < size) - mean
        b_total += tl.where(o < size, load(p_partial_squares + o, o < size) + b_shift * b_shift * b_count, 0.0)
    rstd = tl.rsqrt(tl.sum(b_total) / _group_size(positions, GROUP) + tl.cast(eps, tl.float32))
    tl.store(p_mean + i_program, mean)
    tl.store(p_rstd + i_program, rstd)


@triton.jit
def apply_kernel(
    p_x,  # (N, C, S) or (N, S, C), like y
    p_weight,  # (C,)
    p_bias,  # (C,)
    p_mean,  # (N, G) fp32
    p_rstd,  # (N, G) fp32
    p_y,
    channels,
    positions,
    groups,
    blocks,
    parts,
    GROUP: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_sample, o_c, m_c, o, m = _tile(channels, positions, blocks, parts, BLOCK_C, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    b_weight, b_bias = _affine(p_weight, p_bias, o_c, m_c, AFFINE)
    o_group = i_sample * groups + o_c // GROUP
    b_mean = load(p_mean + o_group, m_c)[:, None]
    b_rstd = load(p_rstd + o_group, m_c)[:, None]
    b_y = _activated((load(p_x + o, m) - b_mean) * (b_weight * b_rstd) + b_bias, SILU)
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)


# ---- backward, with the normalised n = (x - mean) rstd, z = weight n + bias before the activation, dn = weight dz:
#   dx = rstd (dn - mean of dn - n (mean of dn n)), means over the group
#   d bias = sum of dz, d weight = sum of dz n, over samples and positions


@triton.jit
def _normal_and_dz(p_grad, p_x, b_mean, b_rstd, b_weight, b_bias, o, m, SILU: tl.constexpr):
    b_dz = load(p_grad + o, m)  # 0 where masked, so that masked elements add nothing below
    b_normal = (load(p_x + o, m) - b_mean) * b_rstd
    if SILU:
        b_z = b_normal * b_weight + b_bias
        b_sigmoid = tl.sigmoid(b_z)
        b_dz *= b_sigmoid * (b_z * (1.0 - b_sigmoid) + 1.0)
    return b_normal, b_dz


@triton.jit
def backward_kernel(
    p_grad,  # (N, C, S) or (N, S, C), like x and dx
    p_x,
    p_weight,  # (C,)
    p_bias,  # (C,)
    p_mean,  # (N, G) fp32
    p_rstd,  # (N, G) fp32
    p_dx,  # written if RESIDENT
    p_sum_dz,  # (N, C, PARTS) fp32, written if SUMS
    p_sum_dzn,
    channels,
    positions,
    groups,
    blocks,
    parts,
    RESIDENT: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums of each channel of a tile; of a resident group, all there is to do."""
    i_sample, o_c, m_c, o, m = _tile(channels, positions, blocks, parts, WIDTH, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    b_weight, b_bias = _affine(p_weight, p_bias, o_c, m_c, AFFINE)
    o_group = i_sample * groups + o_c // GROUP
    b_mean = load(p_mean + o_group, m_c)[:, None]
    b_rstd = load(p_rstd + o_group, m_c)[:, None]
    b_normal, b_dz = _normal_and_dz(p_grad, p_x, b_mean, b_rstd, b_weight, b_bias, o, m, SILU)
    b_sum_dz, b_sum_dzn = tl.sum(b_dz, 1), tl.sum(b_dz * b_normal, 1)
    if SUMS:
        o_sum = (i_sample * channels + o_c) * parts + tl.program_id(0) % parts
        tl.store(p_sum_dz + o_sum, b_sum_dz, mask=m_c)
        tl.store(p_sum_dzn + o_sum, b_sum_dzn, mask=m_c)
    if RESIDENT:
        mean_dn = tl.sum(b_sum_dz[:, None] * b_weight) / _group_size(positions, GROUP)
        mean_dnn = tl.sum(b_sum_dzn[:, None] * b_weight) / _group_size(positions, GROUP)
        b_dx = (b_dz * b_weight - mean_dn - b_normal * mean_dnn) * b_rstd
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def totals_kernel(
    p_sum_dz,  # (N, C, PARTS) fp32, like the one below
    p_sum_dzn,
    p_weight,  # (C,)
    p_mean_dn,  # (N, G) fp32, like the one below
    p_mean_dnn,
    p_d_weight,  # (C,), like the one below
    p_d_bias,
    group_programs,
    samples,
    channels,
    positions,
    parts,
    GROUP: tl.constexpr,
    AFFINE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs find the means of a (sample, group) each, the others the gradients of COLUMNS channels."""
    i_program = tl.program_id(0).to(tl.int64)
    if i_program < group_programs:
        size = GROUP * parts
        o_group = i_program * size
        b_dn = tl.zeros([BLOCK, 1], tl.float32)
        b_dnn = tl.zeros([BLOCK, 1], tl.float32)
        for start in range(0, size, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_weight, _ = _affine(p_weight, p_weight, i_program * GROUP % channels + o // parts, o < size, AFFINE)
            b_dn += load(p_sum_dz + o_group + o, o < size)[:, None] * b_weight
            b_dnn += load(p_sum_dzn + o_group + o, o < size)[:, None] * b_weight
        tl.store(p_mean_dn + i_program, tl.sum(b_dn) / _group_size(positions, GROUP))
        tl.store(p_mean_dnn + i_program, tl.sum(b_dnn) / _group_size(positions, GROUP))
    else:
        ROWS: tl.constexpr = BLOCK // COLUMNS
        o_c = (i_program - group_programs) * COLUMNS + tl.arange(0, COLUMNS)
        m_c = o_c < channels
        b_d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
        b_d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, samples * parts, ROWS):
            o_row = start + tl.arange(0, ROWS)[:, None]
            m = (o_row < samples * parts) & m_c[None, :]
            o = (o_row // parts * channels + o_c[None, :]) * parts + o_row % parts
            b_d_bias += load(p_sum_dz + o, m)
            b_d_weight += load(p_sum_dzn + o, m)
        tl.store(p_d_weight + o_c, tl.sum(b_d_weight, 0).to(p_d_weight.dtype.element_ty), mask=m_c)
        tl.store(p_d_bias + o_c, tl.sum(b_d_bias, 0).to(p_d_bias.dtype.element_ty), mask=m_c)


@triton.jit
def input_gradient_kernel(
    p_grad,  # (N, C, S) or (N, S, C), like x and dx
    p_x,
    p_weight,  # (C,)
    p_bias,  # (C,)
    p_mean,  # (N, G) fp32, like the three below
    p_rstd,
    p_mean_dn,
    p_mean_dnn,
    p_dx,
    channels,
    positions,
    groups,
    blocks,
    parts,
    GROUP: tl.constexpr,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_sample, o_c, m_c, o, m = _tile(channels, positions, blocks, parts, BLOCK_C, CHANNELS_LAST, BLOCK_C, BLOCK_S)
    b_weight, b_bias = _affine(p_weight, p_bias, o_c, m_c, AFFINE)
    o_group = i_sample * groups + o_c // GROUP
    b_mean = load(p_mean + o_group, m_c)[:, None]
    b_rstd = load(p_rstd + o_group, m_c)[:, None]
    b_normal, b_dz = _normal_and_dz(p_grad, p_x, b_mean, b_rstd, b_weight, b_bias, o, m, SILU)
    b_mean_dn = load(p_mean_dn + o_group, m_c)[:, None]
    b_mean_dnn = load(p_mean_dnn + o_group, m_c)[:, None]
    b_dx = (b_dz * b_weight - b_mean_dn - b_normal * b_mean_dnn) * b_rstd
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
