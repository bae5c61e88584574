"""The Triton kernels behind ``modulate``: one launch forward, two backward. The formulas stand there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launch
from .rows import load
from .tokens import TOTAL_WARPS, readable, row_tiling, split_of, token_total, total_block


def empty_gradients(stream, gate, branch, shift, scale, weight, bias, vector_grads) -> list[Tensor]:
    """A new contiguous tensor for each gradient; of no elements where there is none."""
    wanted = [(stream, True), (gate, vector_grads), (branch, True)]
    wanted += [(vector, vector_grads) for vector in (shift, scale, weight, bias)]
    return [
        torch.empty(
            0 if tensor is None or not want else tensor.shape,
            dtype=stream.dtype if tensor is None else tensor.dtype,
            device=stream.device,
        )
        for tensor, want in wanted
    ]


def forward_kernels(x, gate, branch, shift, scale, weight, bias, eps, rms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, d = x.shape
    gated, shifted, has_weight, has_bias = (t is not None for t in (gate, shift, weight, bias))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = torch.empty(x.shape if gated else 0, dtype=x.dtype, device=x.device)
    rstd = torch.empty((batch, length), dtype=torch.float32, device=x.device)
    mean = torch.empty(0 if rms else (batch, length), dtype=torch.float32, device=x.device)
    if batch == 0:
        return residual, y, mean, rstd
    x = readable(x)
    tensors = [x if t is None else readable(t) for t in (gate, branch, shift, scale, weight, bias)]
    gate, branch, shift, scale, weight, bias = tensors
    block, warps = row_tiling(d)
    launch(
        _forward_kernel, batch * length,
        [x, *tensors, residual, y, mean, rstd],
        [*x.stride()[:2], gate.stride(0), *branch.stride()[:2], shift.stride(0), scale.stride(0), length, d, eps],
        GATED=gated, SHIFT=shifted, WEIGHT=has_weight, BIAS=has_bias, RMS=rms,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return residual, y, mean, rstd


@triton.jit
def _forward_kernel(
    p_x,  # (B, L, D) with strides, like p_branch
    p_gate,  # (B, D) with a stride, like p_shift and p_scale
    p_branch,
    p_shift,
    p_scale,
    p_weight,  # (D,), like p_bias
    p_bias,
    p_residual,  # (B, L, D), like p_y
    p_y,
    p_mean,  # (B, L) fp32, like p_rstd
    p_rstd,
    x_sample,
    x_token,
    gate_sample,
    branch_sample,
    branch_token,
    shift_sample,
    scale_sample,
    length,
    d,
    eps,
    GATED: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program."""
    i_row = tl.program_id(0).to(tl.int64)
    i_sample, i_token = i_row // length, i_row % length
    o = tl.arange(0, BLOCK)
    m = o < d
    b_x = load(p_x + i_sample * x_sample + i_token * x_token + o, m)
    if GATED:
        b_branch = load(p_branch + i_sample * branch_sample + i_token * branch_token + o, m)
        b_residual = (b_x + load(p_gate + i_sample * gate_sample + o, m) * b_branch).to(p_residual.dtype.element_ty)
        tl.store(p_residual + i_row * d + o, b_residual, mask=m)
        b_x = b_residual.to(tl.float32)
    if not RMS:
        mean = tl.sum(b_x) / d
        tl.store(p_mean + i_row, mean)
        b_x = tl.where(m, b_x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(b_x * b_x) / d + tl.cast(eps, tl.float32))
    tl.store(p_rstd + i_row, rstd)
    b_y = b_x * rstd
    if WEIGHT:
        b_y *= load(p_weight + o, m)
    if BIAS:
        b_y += load(p_bias + o, m)
    b_y *= load(p_scale + i_sample * scale_sample + o, m) + 1.0
    if SHIFT:
        b_y += load(p_shift + i_sample * shift_sample + o, m)
    tl.store(p_y + i_row * d + o, b_y.to(p_y.dtype.element_ty), mask=m)


def backward_kernels(
    d_y, d_residual, stream, gate, branch, shift, scale, weight, bias, mean, rstd, rms, vector_grads
) -> list[Tensor]:
    results = empty_gradients(stream, gate, branch, shift, scale, weight, bias, vector_grads)
    d_x, d_gate, d_branch, d_shift, d_scale, d_weight, d_bias = results
    batch, length, d = stream.shape
    if batch == 0:
        return [result.zero_() for result in results]
    add = d_residual is not None
    gated, shifted, has_weight, has_bias = (t is not None for t in (gate, shift, weight, bias))
    stream = readable(stream)
    tensors = [stream if t is None else readable(t) for t in (d_y, d_residual, gate, branch, scale, weight, bias)]
    d_y, d_residual, gate, branch, scale, weight, bias = tensors
    block, warps = row_tiling(d)
    split = split_of(length)
    sums = (2 + gated) if vector_grads else 0
    partial = torch.empty((sums, batch, split, d), dtype=torch.float32, device=stream.device)
    launch(
        _backward_kernel, batch * split,
        [d_y, d_residual, stream, gate, branch, scale, weight, mean, rstd, d_x, d_branch, partial],
        [
            *d_y.stride()[:2], *d_residual.stride()[:2], *stream.stride()[:2], gate.stride(0), *branch.stride()[:2],
            scale.stride(0), length, d,
        ],
        ADD=add, GATED=gated, WEIGHT=has_weight, RMS=rms, VECTOR_GRADS=vector_grads,
        SPLIT=split, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if vector_grads:
        # what all samples share is summed over them in order, by one program
        each = batch if has_weight or has_bias else 1
        block = total_block(d, split)
        tiles = triton.cdiv(d, block)
        launch(
            _total_kernel, batch // each * tiles,
            [partial, scale, weight, bias, d_gate, d_shift, d_scale, d_weight, d_bias],
            [scale.stride(0), batch, each, d, tiles],
            GATED=gated, SHIFT=shifted, WEIGHT=has_weight, BIAS=has_bias,
            SPLIT=split, BLOCK=block, num_warps=TOTAL_WARPS,
        )  # fmt: skip
    return results


@triton.jit
def _backward_kernel(
    p_d_y,  # (B, L, D) with strides, like p_d_residual, p_stream and p_branch
    p_d_residual,
    p_stream,
    p_gate,  # (B, D) with a stride, like p_scale
    p_branch,
    p_scale,
    p_weight,  # (D,)
    p_mean,  # (B, L) fp32, like p_rstd
    p_rstd,
    p_d_x,  # (B, L, D), like p_d_branch
    p_d_branch,
    p_partial,  # (2 + GATED, B, SPLIT, D) fp32: sums of dy, dy n, dr h
    y_sample,
    y_token,
    residual_sample,
    residual_token,
    stream_sample,
    stream_token,
    gate_sample,
    branch_sample,
    branch_token,
    scale_sample,
    length,
    d,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHT: tl.constexpr,
    RMS: tl.constexpr,
    VECTOR_GRADS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (sample, split) takes the tokens split, split + SPLIT, ... of its sample."""
    i_program = tl.program_id(0).to(tl.int64)
    i_sample = i_program // SPLIT
    o = tl.arange(0, BLOCK)
    m = o < d
    b_plain = tl.zeros([BLOCK], tl.float32)
    b_along = tl.zeros([BLOCK], tl.float32)
    b_d_gate = tl.zeros([BLOCK], tl.float32)
    for i_token in range(i_program % SPLIT, length, SPLIT):
        i_row = i_sample * length + i_token
        b_n = load(p_stream + i_sample * stream_sample + i_token * stream_token + o, m)
        b_d_y = load(p_d_y + i_sample * y_sample + i_token * y_token + o, m)
        rstd = tl.load(p_rstd + i_row)
        if not RMS:
            b_n -= tl.load(p_mean + i_row)
        b_n *= rstd
        if VECTOR_GRADS:
            b_plain += b_d_y
            b_along += b_d_y * b_n
        # dy and so g is 0 beyond the row: n is not, but multiplied by them. The vectors of the sample are read anew for
        # each token, from the cache: registers are scarcer
        b_g = b_d_y * (load(p_scale + i_sample * scale_sample + o, m) + 1.0)
        if WEIGHT:
            b_g *= load(p_weight + o, m)
        b_d_stream = b_g - b_n * (tl.sum(b_g * b_n) / d)
        if not RMS:
            b_d_stream -= tl.sum(b_g) / d
        b_d_stream *= rstd
        if ADD:
            b_d_stream += load(p_d_residual + i_sample * residual_sample + i_token * residual_token + o, m)
        tl.store(p_d_x + i_row * d + o, b_d_stream.to(p_d_x.dtype.element_ty), mask=m)
        if GATED:
            b_d_branch = load(p_gate + i_sample * gate_sample + o, m) * b_d_stream
            tl.store(p_d_branch + i_row * d + o, b_d_branch.to(p_d_branch.dtype.element_ty), mask=m)
            if VECTOR_GRADS:
                b_d_gate += b_d_stream * load(p_branch + i_sample * branch_sample + i_token * branch_token + o, m)
    if VECTOR_GRADS:
        p_program = p_partial + i_program * d + o
        plane = tl.num_programs(0).to(tl.int64) * d
        tl.store(p_program, b_plain, mask=m)
        tl.store(p_program + plane, b_along, mask=m)
        if GATED:
            tl.store(p_program + plane * 2, b_d_gate, mask=m)


@triton.jit
def _total_kernel(
    p_partial,  # (2 + GATED, B, SPLIT, D) fp32
    p_scale,  # (B, D) with a stride
    p_weight,  # (D,), like p_bias
    p_bias,
    p_d_gate,  # (B, D), like p_d_shift and p_d_scale
    p_d_shift,
    p_d_scale,
    p_d_weight,  # (D,), like p_d_bias
    p_d_bias,
    scale_sample,
    batch,
    each,  # samples a program
    d,
    tiles,
    GATED: tl.constexpr,
    SHIFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    o = (i_program % tiles) * BLOCK + tl.arange(0, BLOCK)
    m = o < d
    plane = tl.cast(batch, tl.int64) * SPLIT * d
    b_d_weight = tl.zeros([BLOCK], tl.float32)
    b_d_bias = tl.zeros([BLOCK], tl.float32)
    for i in range(each):
        i_sample = i_program // tiles * each + i
        b_plain = token_total(p_partial, i_sample, d, o, m, SPLIT)
        b_along = token_total(p_partial + plane, i_sample, d, o, m, SPLIT)
        b_factor = load(p_scale + i_sample * scale_sample + o, m) + 1.0
        o_sample = i_sample * d + o
        b_d_scale = b_along
        if WEIGHT:
            b_d_weight += b_factor * b_along
            b_d_scale *= load(p_weight + o, m)
        if BIAS:
            b_d_bias += b_factor * b_plain
            b_d_scale += b_plain * load(p_bias + o, m)
        tl.store(p_d_scale + o_sample, b_d_scale.to(p_d_scale.dtype.element_ty), mask=m)
        if SHIFT:
            tl.store(p_d_shift + o_sample, b_plain.to(p_d_shift.dtype.element_ty), mask=m)
        if GATED:
            b_d_gate = token_total(p_partial + plane * 2, i_sample, d, o, m, SPLIT)
            tl.store(p_d_gate + o_sample, b_d_gate.to(p_d_gate.dtype.element_ty), mask=m)
    if WEIGHT:
        tl.store(p_d_weight + o, b_d_weight.to(p_d_weight.dtype.element_ty), mask=m)
    if BIAS:
        tl.store(p_d_bias + o, b_d_bias.to(p_d_bias.dtype.element_ty), mask=m)
