"""Norm and modulate (adaLN), alone or behind a gated residual, in one pass over the tokens.

For a token x (D,), with the vectors gate, shift and scale (D,) of its sample and a shared weight and bias (D,):

    r = x + gate h                                              (r = x without a branch h)
    n = (r - mean(r)) / sqrt(var(r) + eps)                      "layer"
    n = r / sqrt(mean(r^2) + eps)                               "rms"
    y = (n weight + bias) (1 + scale) + shift

Backwards, with g = dy (1 + scale) weight, and mean(g) = 0 for "rms":

    dr += (g - mean(g) - n mean(g n)) / sqrt(...)
    dx = dr,   dh = gate dr,   d gate = sum of dr h over the tokens of a sample

and with the sums Q of dy and P of dy n over the tokens of a sample,

    d shift = Q,   d scale = weight P + bias Q
    d bias = sum of (1 + scale) Q over the samples,   d weight = sum of (1 + scale) P over the samples
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import check_channels, check_finite, check_like, choose
from .backend import register
from .modulate_kernels import backward_kernels, empty_gradients, forward_kernels
from .rows import compute_dtype
from .tokens import check_tokens, sum_tokens, vector_of


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "layer",
) -> Tensor:
    """norm(x) * (1 + scale) + shift, the adaptive norm of transformer denoisers.

    Source: adaLN, Peebles & Xie 2022, arXiv:2212.09748, section 3.2. Statistics and arithmetic are float32 with one
    rounding at the end; the variance is that of the centred token, so a large mean costs no digits.

    Args:
        x: (B, L, D); float32, bfloat16 or float16 (float64 on CPU), D <= 8192. Tokens may lie apart in memory.
        shift, scale: (B, D) or (B, 1, D), any of the dtypes; views into a larger tensor, as ``chunk`` gives them, are
            read in place. shift may be None: no shift.
        weight, bias: (D,), any of the dtypes, of the norm itself; None: 1 and 0.
        eps: added to the variance ("rms": to the mean square), >= 0.
        kind: "layer", LayerNorm (Ba et al. 2016, arXiv:1607.06450), or "rms", RMSNorm (Zhang & Sennrich 2019,
            arXiv:1910.07467).

    Returns:
        (B, L, D), contiguous, in the dtype of x (torch's composition would return the widest of the dtypes);
        differentiable once in all tensors. Saved are x and one or two float32 numbers a token. A sample's result and
        its gradients of x, shift and scale have the same bits in any batch (for tensors of one memory layout).

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.
    """
    check_tokens("x", x)
    return _modulated(x, None, None, shift, scale, weight, bias, eps, kind)[1]


def residual_norm_modulate(
    x: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "layer",
) -> tuple[Tensor, Tensor]:
    """The end of one branch of a transformer block and the begin of the next, reading the stream once.

        residual = x + gate * branch,   y = norm(residual) * (1 + scale) + shift

    The norm is that of the residual as it is stored, in the dtype of x: the pair equals ``gated_residual`` followed by
    ``norm_modulate`` up to the order in which a token is summed.

    Args:
        x, gate, branch: as for ``gated_residual``.
        shift, scale, weight, bias, eps, kind: as for ``norm_modulate``.

    Returns:
        residual and y, each (B, L, D), contiguous, in the dtype of x; differentiable once in all tensors, from both
        results. Saved are branch, residual and one or two float32 numbers a token, but not x.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.
    """
    check_tokens("x", x)
    check_like("branch", branch, "x", x)
    return _modulated(x, vector_of("gate", gate, x), branch, shift, scale, weight, bias, eps, kind)


def _modulated(x, gate, branch, shift, scale, weight, bias, eps, kind) -> tuple[Tensor, Tensor]:
    if shift is not None:
        shift = vector_of("shift", shift, x)
    scale = vector_of("scale", scale, x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_channels(name, value, x.shape[2], x)
    if check_finite("eps", eps) < 0:
        raise ValueError(f"eps={eps} is negative; it is added to a variance, pass a number >= 0")
    rms = choose("kind", kind, ("layer", "rms")) == "rms"
    return _NormModulate.apply(x, gate, branch, shift, scale, weight, bias, float(eps), rms)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, branch, shift, scale, weight, bias, eps, rms):
        residual, y, mean, rstd = _norm_modulate(x, gate, branch, shift, scale, weight, bias, eps, rms)
        ctx.set_materialize_grads(False)
        if gate is None:
            ctx.mark_non_differentiable(residual)
        stream = x if gate is None else residual
        ctx.save_for_backward(stream, gate, branch, shift, scale, weight, bias, mean, rstd)
        ctx.rms = rms
        return residual, y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_residual, d_y):
        stream, gate, *rest = ctx.saved_tensors
        if d_y is None:
            d_y = torch.zeros_like(stream)
        if gate is None:  # torch.compile makes a gradient of it all the same
            d_residual = None
        needed = ctx.needs_input_grad
        vector_grads = needed[1] or any(needed[3:])
        gradients = _norm_modulate_backward(d_y, d_residual, stream, gate, *rest, ctx.rms, vector_grads)
        return *(grad if need else None for grad, need in zip(gradients, needed, strict=False)), None, None


def _reference(x, gate, branch, shift, scale, weight, bias, eps, rms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, gate, branch, shift, scale, weight, bias)
    residual, stream = x.new_empty(0), x
    if gate is not None:
        residual = (x.to(dtype) + gate.to(dtype).unsqueeze(1) * branch.to(dtype)).to(x.dtype).contiguous()
        stream = residual
    normed, mean = stream.to(dtype), x.new_empty(0, dtype=dtype)
    if not rms:
        mean = normed.mean(-1)
        normed = normed - mean.unsqueeze(-1)
    rstd = (normed.square().mean(-1) + eps).rsqrt_()
    y = normed * rstd.unsqueeze(-1)
    if weight is not None:
        y *= weight.to(dtype)
    if bias is not None:
        y += bias.to(dtype)
    y *= scale.to(dtype).unsqueeze(1) + 1.0
    if shift is not None:
        y += shift.to(dtype).unsqueeze(1)
    return residual, y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def _fake(x, gate, branch, shift, scale, weight, bias, eps, rms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, gate, branch, shift, scale, weight, bias)
    rstd = x.new_empty(x.shape[:2], dtype=dtype)
    mean = rstd.new_empty(0 if rms else rstd.shape)
    return x.new_empty(0 if gate is None else x.shape), x.new_empty(x.shape), mean, rstd


def _backward_reference(
    d_y, d_residual, stream, gate, branch, shift, scale, weight, bias, mean, rstd, rms, vector_grads
) -> list[Tensor]:
    dtype = rstd.dtype
    d_y, rstd, normed = d_y.to(dtype), rstd.unsqueeze(-1), stream.to(dtype)
    if not rms:
        normed = normed - mean.unsqueeze(-1)
    normed = normed * rstd
    factor = scale.to(dtype) + 1.0
    d_normed = d_y * factor.unsqueeze(1)
    if weight is not None:
        d_normed *= weight.to(dtype)
    d_stream = d_normed - normed * (d_normed * normed).mean(-1, keepdim=True)
    if not rms:
        d_stream -= d_normed.mean(-1, keepdim=True)
    d_stream *= rstd
    if d_residual is not None:
        d_stream += d_residual

    results = empty_gradients(stream, gate, branch, shift, scale, weight, bias, vector_grads)
    d_x, d_gate, d_branch, d_shift, d_scale, d_weight, d_bias = results
    d_x.copy_(d_stream)
    if gate is not None:
        d_branch.copy_(d_stream * gate.to(dtype).unsqueeze(1))
    if vector_grads:
        plain, along = sum_tokens(d_y), sum_tokens(d_y * normed)
        by_scale = along if weight is None else along * weight.to(dtype)
        d_scale.copy_(by_scale if bias is None else by_scale + plain * bias.to(dtype))
        if gate is not None:
            d_gate.copy_(sum_tokens(d_stream * branch))
        if shift is not None:
            d_shift.copy_(plain)
        if weight is not None:
            d_weight.copy_((factor * along).sum(0))
        if bias is not None:
            d_bias.copy_((factor * plain).sum(0))
    return results


def _backward_fake(
    d_y, d_residual, stream, gate, branch, shift, scale, weight, bias, mean, rstd, rms, vector_grads
) -> list[Tensor]:
    return empty_gradients(stream, gate, branch, shift, scale, weight, bias, vector_grads)


_norm_modulate = register(
    "norm_modulate(Tensor x, Tensor? gate, Tensor? branch, Tensor? shift, Tensor scale, Tensor? weight, "
    "Tensor? bias, float eps, bool rms) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    kernels=forward_kernels,
    fake=_fake,
)
_norm_modulate_backward = register(
    "norm_modulate_backward(Tensor d_y, Tensor? d_residual, Tensor stream, Tensor? gate, Tensor? branch, "
    "Tensor? shift, Tensor scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool rms, "
    "bool vector_grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    kernels=backward_kernels,
    fake=_backward_fake,
)
