"""GroupNorm, with a SiLU behind it or without, forward and backward.

For a sample x (C, S) whose channels form groups, with mean and variance over each group, and weight and bias (C,):

    n = (x - mean) / sqrt(variance + eps)
    z = n weight + bias
    y = z sigmoid(z)                                            (y = z without activation)
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import check_batch, check_channels, check_finite, choose, refuse_float64
from .backend import launch, register
from .group_norm_kernels import (
    MERGE_WARPS,
    MERGED,
    GroupTiling,
    apply_kernel,
    backward_kernel,
    forward_kernel,
    group_tiling,
    input_gradient_kernel,
    moments_kernel,
    statistics_kernel,
    totals_kernel,
)
from .rows import compute_dtype, in_layout


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """silu(group_norm(x)), the pair in front of every convolution of a UNet or VAE.

    Source: Wu & He 2018, arXiv:1803.08494, equations (1)-(2) and (7); SiLU: Elfwing et al. 2017, arXiv:1702.03118.
    Statistics and arithmetic are float32 with one rounding at the end, also under autocast; the variance is that of
    the centred group, not a difference of large sums.

    Args:
        x: (N, C, ...), float32, bfloat16 or float16 (float64 on CPU). Contiguous and channels_last tensors are read in
            place; any other layout costs a copy.
        weight, bias: (C,), each of any of the dtypes; or both None: 1 and 0.
        num_groups: G, a divisor of C.
        eps: added to the variance, >= 0.
        activation: "silu" or "none".

    Returns:
        like x in shape, dtype and dense layout; differentiable once in x, weight and bias. Saved are these three and
        two float32 numbers a group. A sample's result and its gradient have the same bits in any batch (for tensors of
        one memory layout); the gradients of weight and bias are summed in a fixed order.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.
    """
    check_batch("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, C, ...)")
    channels = x.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {channels} channels of x; pass a divisor")
    if (weight is None) != (bias is None):
        absent, other = ("weight", "bias") if weight is None else ("bias", "weight")
        raise ValueError(f"{absent} is None, but {other} is not; pass both or neither")
    if weight is not None:
        check_channels("weight", weight, x.shape[1], x)
        check_channels("bias", bias, x.shape[1], x)
    eps = check_finite("eps", eps)
    if eps < 0:
        raise ValueError(f"eps={eps} is negative; it is added to a variance, pass a number >= 0")
    silu = choose("activation", activation, ("silu", "none")) == "silu"
    return _GroupNorm.apply(x, weight, bias, num_groups, eps, silu)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, silu):
        y, mean, rstd = _group_norm(x, weight, bias, num_groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needed = ctx.needs_input_grad
        gradients = _group_norm_backward(grad, *ctx.saved_tensors, ctx.silu, needed[1] or needed[2])
        return *(grad if need else None for grad, need in zip(gradients, needed, strict=False)), None, None, None


# The reference takes one sample after the other: torch chooses vector or scalar code, whose exp differ in the last bit,
# and the threads that share a sum by the size of all it is given, so a sample's bits would depend on the batch.


def _reference(x, weight, bias, num_groups, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _columns(x, weight, bias)
    mean, rstd = (x.new_empty((x.shape[0], num_groups, 1), dtype=compute_dtype(x)) for _ in range(2))
    y = torch.empty_like(x)
    for i, sample in enumerate(x):
        n = sample.to(mean.dtype).contiguous().view(num_groups, -1)
        mean[i] = n.mean(1, keepdim=True)
        n = n - mean[i]
        rstd[i] = (n.square().mean(1, keepdim=True) + eps).rsqrt_()
        z = n.mul_(rstd[i]).view(x.shape[1], -1).mul_(weight).add_(bias)
        y[i] = (torch.nn.functional.silu(z) if silu else z).view(sample.shape)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


def _columns(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight and bias, (C, 1) each, in the dtype of the arithmetic."""
    if weight is None:
        weight, bias = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    return tuple(t.to(compute_dtype(x)).unsqueeze(1) for t in (weight, bias))


def _fake(x, weight, bias, num_groups, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x)) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _backward_reference(grad, x, weight, bias, mean, rstd, silu, affine_grad) -> tuple[Tensor, Tensor, Tensor]:
    channels, groups = x.shape[1], mean.shape[1]
    w, b = _columns(x, weight, bias)
    dx, d_weight, d_bias = torch.empty_like(x), torch.zeros_like(w), torch.zeros_like(b)
    for i, sample in enumerate(x):
        sample_rstd = rstd[i].unsqueeze(1)
        n = (sample.to(w.dtype).contiguous().view(groups, -1) - mean[i].unsqueeze(1)) * sample_rstd
        dz = grad[i].to(w.dtype).contiguous().view(channels, -1)
        if silu:
            z = n.view(channels, -1) * w + b
            sigmoid = z.sigmoid()
            dz = z.mul_(1.0 - sigmoid).add_(1.0).mul_(sigmoid).mul_(dz)
        d_bias += dz.sum(1, keepdim=True)
        d_weight += (dz * n.view(channels, -1)).sum(1, keepdim=True)
        dn = (dz * w).view(groups, -1)
        mean_dn, mean_dnn = dn.mean(1, keepdim=True), (dn * n).mean(1, keepdim=True)
        dx[i] = dn.sub_(mean_dn).sub_(n.mul_(mean_dnn)).mul_(sample_rstd).view(sample.shape)
    if not affine_grad:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, d_weight.squeeze(1).to(weight.dtype), d_bias.squeeze(1).to(bias.dtype)


def _backward_fake(grad, x, weight, bias, mean, rstd, silu, affine_grad) -> tuple[Tensor, Tensor, Tensor]:
    affine = (torch.empty_like(t) if affine_grad else x.new_empty(0) for t in (weight, bias))
    return torch.empty_like(x), *affine


# ---- Triton


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels and positions."""
    return *x.shape[:2], math.prod(x.shape[2:])


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    """x or else a contiguous copy of it, and whether its channels are the fast dimension."""
    refuse_float64(x)
    if x.is_contiguous():
        return x, False
    if x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def _tile_constants(tiling: GroupTiling, channels_last: bool) -> dict[str, int]:
    return {
        "CHANNELS_LAST": channels_last, "BLOCK_C": tiling.block_c, "BLOCK_S": tiling.block_s, "num_warps": tiling.warps
    }  # fmt: skip


def _kernels(x, weight, bias, num_groups, eps, silu) -> tuple[Tensor, Tensor, Tensor]:
    values, channels_last = _readable(x)
    samples, channels, positions = _sizes(x)
    mean, rstd = (torch.empty((samples, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty_like(values)
    if samples == 0:
        return y, mean, rstd
    tiling = group_tiling(channels, positions, num_groups, channels_last)
    affine = [values if t is None else t.contiguous() for t in (weight, bias)]
    tile = _tile_constants(tiling, channels_last)
    kind = {"GROUP": channels // num_groups, "AFFINE": weight is not None, "SILU": silu} | tile
    if tiling.resident:
        launch(
            forward_kernel, samples * num_groups, [values, *affine, y, mean, rstd],
            [eps, channels, positions, num_groups], **kind,
        )  # fmt: skip
        return in_layout(y, x), mean, rstd
    tiles = samples * tiling.blocks * tiling.parts
    shape = (samples, channels, tiling.parts)
    moments = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2)]
    launch(moments_kernel, tiles, [values, *moments], [channels, positions, tiling.blocks, tiling.parts], **tile)
    launch(
        statistics_kernel, samples * num_groups, [*moments, mean, rstd], [eps, positions, tiling.parts],
        GROUP=channels // num_groups, BLOCK_S=tiling.block_s, BLOCK=MERGED, num_warps=MERGE_WARPS,
    )  # fmt: skip
    launch(
        apply_kernel, tiles, [values, *affine, mean, rstd, y],
        [channels, positions, num_groups, tiling.blocks, tiling.parts], **kind,
    )  # fmt: skip
    return in_layout(y, x), mean, rstd


def _backward_kernels(grad, x, weight, bias, mean, rstd, silu, affine_grad) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _backward_reference(grad, x, weight, bias, mean, rstd, silu, affine_grad)
    values, channels_last = _readable(x)
    grad = grad.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else grad.contiguous()
    (samples, channels, positions), groups = _sizes(x), mean.shape[1]
    tiling = group_tiling(channels, positions, groups, channels_last)
    affine = [values if t is None else t.contiguous() for t in (weight, bias)]
    inputs = [grad, values, *affine, mean, rstd]
    dx = torch.empty_like(values)
    d_weight, d_bias = (torch.empty_like(t) if affine_grad else x.new_empty(0) for t in (weight, bias))
    sums, means, group_programs, column_programs = [dx, dx], [mean, mean], 0, 0
    if affine_grad or not tiling.resident:
        shape = (samples, channels, tiling.parts)
        sums = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2)]
    if affine_grad:
        column_programs = -(-channels // tiling.columns)
    if not tiling.resident:
        group_programs = samples * groups
        means = [torch.empty_like(mean) for _ in range(2)]
    tiles, sizes = samples * tiling.blocks * tiling.parts, [channels, positions, groups, tiling.blocks, tiling.parts]
    kind = {"GROUP": channels // groups, "AFFINE": weight is not None, "SILU": silu}
    kind |= _tile_constants(tiling, channels_last)
    launch(
        backward_kernel, tiles, [*inputs, dx, *sums], sizes,
        RESIDENT=tiling.resident, SUMS=affine_grad or not tiling.resident, WIDTH=tiling.width, **kind,
    )  # fmt: skip
    if group_programs + column_programs:
        launch(
            totals_kernel, group_programs + column_programs, [*sums, affine[0], *means, d_weight, d_bias],
            [group_programs, samples, channels, positions, tiling.parts],
            GROUP=channels // groups, AFFINE=weight is not None, COLUMNS=tiling.columns, BLOCK=MERGED,
            num_warps=MERGE_WARPS,
        )  # fmt: skip
    if not tiling.resident:
        launch(input_gradient_kernel, tiles, [*inputs, *means, dx], sizes, **kind)
    return in_layout(dx, x), d_weight, d_bias


_group_norm = register(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels=_kernels,
    fake=_fake,
)
_group_norm_backward = register(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool silu, bool affine_grad) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    kernels=_backward_kernels,
    fake=_backward_fake,
)
