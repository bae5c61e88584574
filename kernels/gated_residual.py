"""The gated residual of a transformer block, x + gate * branch.

``torch.compile`` moves as few bytes in large batches, but the batch size decides how it splits the sum over the tokens,
and so the bits of the gate's gradient. Here it does not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import check_like
from .backend import launch, register
from .rows import compute_dtype, load
from .tokens import (
    TOTAL_WARPS,
    check_tokens,
    readable,
    row_tiling,
    split_of,
    sum_tokens,
    token_total,
    total_block,
    vector_of,
)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, the end of a branch of a transformer block with adaLN-Zero.

    Source: Peebles & Xie 2022, arXiv:2212.09748, section 3.2. Arithmetic is float32 with one rounding at the end.

    Args:
        x: (B, L, D), the residual stream; float32, bfloat16 or float16 (float64 on CPU), D <= 8192.
        gate: (B, D) or (B, 1, D), any of the dtypes; a view into a larger tensor is read in place.
        branch: like x, any of the dtypes.

    Returns:
        (B, L, D), contiguous, in the dtype of x; differentiable once in all three: d x = dy itself, d branch = gate dy,
        d gate = sum of dy branch over the tokens. A sample's results and gradients have the same bits in any batch (for
        tensors of one memory layout).

    Raises:
        TypeError, ValueError: an argument of a wrong type or shape.
    """
    check_tokens("x", x)
    check_like("branch", branch, "x", x)
    return _GatedResidual.apply(x, vector_of("gate", gate, x), branch)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, branch):
        ctx.save_for_backward(gate, branch)
        return _gated_residual(x, gate, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        _, gate_grad, branch_grad = ctx.needs_input_grad
        if not gate_grad and not branch_grad:
            return d_y, None, None
        d_gate, d_branch = _gated_residual_backward(d_y, *ctx.saved_tensors, gate_grad)
        return d_y, d_gate if gate_grad else None, d_branch


def _reference(x, gate, branch) -> Tensor:
    dtype = compute_dtype(x, gate, branch)
    return (x.to(dtype) + gate.to(dtype).unsqueeze(1) * branch.to(dtype)).to(x.dtype).contiguous()


def _fake(x, gate, branch) -> Tensor:
    return x.new_empty(x.shape)


def _backward_reference(d_y, gate, branch, gate_grad) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(d_y, gate, branch)
    d_y = d_y.to(dtype)
    d_branch = (d_y * gate.to(dtype).unsqueeze(1)).to(branch.dtype).contiguous()
    return sum_tokens(d_y * branch).to(gate.dtype) if gate_grad else gate.new_empty(0), d_branch


def _backward_fake(d_y, gate, branch, gate_grad) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape if gate_grad else 0), branch.new_empty(branch.shape)


# ---- Triton


def _kernels(x, gate, branch) -> Tensor:
    batch, length, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch == 0:
        return y
    x, gate, branch = map(readable, (x, gate, branch))
    block, warps = row_tiling(d)
    launch(
        _forward_kernel, batch * length,
        [x, gate, branch, y], [*x.stride()[:2], gate.stride(0), *branch.stride()[:2], length, d],
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y


@triton.jit
def _forward_kernel(
    p_x,  # (B, L, D) with strides, like p_branch
    p_gate,  # (B, D) with a stride
    p_branch,
    p_y,  # (B, L, D)
    x_sample,
    x_token,
    gate_sample,
    branch_sample,
    branch_token,
    length,
    d,
    BLOCK: tl.constexpr,
):
    """One token a program."""
    i_row = tl.program_id(0).to(tl.int64)
    i_sample, i_token = i_row // length, i_row % length
    o = tl.arange(0, BLOCK)
    m = o < d
    b_x = load(p_x + i_sample * x_sample + i_token * x_token + o, m)
    b_branch = load(p_branch + i_sample * branch_sample + i_token * branch_token + o, m)
    b_y = b_x + load(p_gate + i_sample * gate_sample + o, m) * b_branch
    tl.store(p_y + i_row * d + o, b_y.to(p_y.dtype.element_ty), mask=m)


def _backward_kernels(d_y, gate, branch, gate_grad) -> tuple[Tensor, Tensor]:
    batch, length, d = branch.shape
    d_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    d_gate = torch.empty(gate.shape if gate_grad else 0, dtype=gate.dtype, device=gate.device)
    if batch == 0:
        return d_gate, d_branch
    d_y, gate, branch = map(readable, (d_y, gate, branch))
    block, warps = row_tiling(d)
    split = split_of(length)
    partial = torch.empty((batch, split, d) if gate_grad else 0, dtype=torch.float32, device=gate.device)
    launch(
        _backward_kernel, batch * split,
        [d_y, gate, branch, d_branch, partial],
        [*d_y.stride()[:2], gate.stride(0), *branch.stride()[:2], length, d],
        GATE_GRAD=gate_grad, SPLIT=split, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if gate_grad:
        block = total_block(d, split)
        tiles = triton.cdiv(d, block)
        launch(
            _total_kernel, batch * tiles, [partial, d_gate], [d, tiles],
            SPLIT=split, BLOCK=block, num_warps=TOTAL_WARPS,
        )  # fmt: skip
    return d_gate, d_branch


@triton.jit
def _backward_kernel(
    p_d_y,  # (B, L, D) with strides, like p_branch
    p_gate,  # (B, D) with a stride
    p_branch,
    p_d_branch,  # (B, L, D)
    p_partial,  # (B, SPLIT, D) fp32
    y_sample,
    y_token,
    gate_sample,
    branch_sample,
    branch_token,
    length,
    d,
    GATE_GRAD: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (sample, split) takes the tokens split, split + SPLIT, ... of its sample."""
    i_program = tl.program_id(0).to(tl.int64)
    i_sample = i_program // SPLIT
    o = tl.arange(0, BLOCK)
    m = o < d
    b_gate = load(p_gate + i_sample * gate_sample + o, m)
    b_d_gate = tl.zeros([BLOCK], tl.float32)
    for i_token in range(i_program % SPLIT, length, SPLIT):
        b_d_y = load(p_d_y + i_sample * y_sample + i_token * y_token + o, m)
        b_d_branch = (b_gate * b_d_y).to(p_d_branch.dtype.element_ty)
        tl.store(p_d_branch + (i_sample * length + i_token) * d + o, b_d_branch, mask=m)
        if GATE_GRAD:
            b_d_gate += b_d_y * load(p_branch + i_sample * branch_sample + i_token * branch_token + o, m)
    if GATE_GRAD:
        tl.store(p_partial + i_program * d + o, b_d_gate, mask=m)


@triton.jit
def _total_kernel(
    p_partial,  # (B, SPLIT, D) fp32
    p_d_gate,  # (B, D)
    d,
    tiles,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_sample = i_program // tiles
    o = (i_program % tiles) * BLOCK + tl.arange(0, BLOCK)
    m = o < d
    b_d_gate = token_total(p_partial, i_sample, d, o, m, SPLIT)
    tl.store(p_d_gate + i_sample * d + o, b_d_gate.to(p_d_gate.dtype.element_ty), mask=m)


_gated_residual = register(
    "gated_residual(Tensor x, Tensor gate, Tensor branch) -> Tensor",
    reference=_reference,
    kernels=_kernels,
    fake=_fake,
)
_gated_residual_backward = register(
    "gated_residual_backward(Tensor d_y, Tensor gate, Tensor branch, bool gate_grad) -> (Tensor, Tensor)",
    reference=_backward_reference,
    kernels=_backward_kernels,
    fake=_backward_fake,
)
