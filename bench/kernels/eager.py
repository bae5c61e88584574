"""The published formulas, written plainly in PyTorch, the way trainers write them: what `eager` and `compile` run.

Policies: structure and precision follow flow_grpo (Liu et al. 2025, arXiv:2505.05470; `sde_step_with_logprob` and the
loss of its training scripts): inputs are raised to float32 first, then every line is an operator of its own. They are
spared some work of the original: the coefficients a, b, std of a step and the mean of the reference are handed in, and
of the logged metrics only those stay that `engine.kernels.policy_loss` returns too.
Blocks: what diffusers' layers call, in the dtype of the network.

On float64 inputs they compute in float64, which makes them the truth that kernels are checked against.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GUIDANCE = 4.5
CLIP_RANGE = 1e-4
KL_COEF = 0.04
EPS = 1e-6
GROUPS = 32


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def column(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.view(-1, *(1,) * (like.dim() - 1))


def mean_over_elements(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.dim())))


def mean_of(x: Tensor, pred: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return column(a, x) * x + column(b, x) * pred


def guided(pred: Tensor, pred_uncond: Tensor) -> Tensor:
    return pred_uncond + GUIDANCE * (pred - pred_uncond)


def log_density(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    std = column(std, mean)
    terms = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return mean_over_elements(terms)


def group_advantage(rewards: Tensor, group_size: int) -> tuple[Tensor]:
    groups = rewards.view(-1, group_size)
    deviation = groups - groups.mean(dim=1, keepdim=True)
    return ((deviation / (groups.std(dim=1, keepdim=True, correction=0) + EPS)).flatten(),)


def policy_sample(
    x: Tensor, pred: Tensor, a: Tensor, b: Tensor, std: Tensor, noise: Tensor | None = None, **_: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores x_next before it is rounded to the dtype of the latents, as the original does."""
    dtype = x.dtype
    x, pred = upcast(x), upcast(pred)
    mean = mean_of(x, pred, a, b)
    if noise is None:
        noise = torch.randn_like(mean)
    x_next = mean + column(std, x) * noise
    return x_next.to(dtype), log_density(x_next, mean, std)


def policy_log_prob(x: Tensor, x_next: Tensor, pred: Tensor, a: Tensor, b: Tensor, std: Tensor) -> tuple[Tensor]:
    x, x_next, pred = upcast(x), upcast(x_next), upcast(pred)
    return (log_density(x_next, mean_of(x, pred, a, b), std),)


def policy_divergence(pred: Tensor, pred_ref: Tensor, b: Tensor, std: Tensor) -> tuple[Tensor]:
    difference = column(b, pred) * (upcast(pred) - upcast(pred_ref))
    return (mean_over_elements(difference**2) / (2 * std**2),)


def policy_loss(
    x: Tensor,
    x_next: Tensor,
    pred: Tensor,
    mean_ref: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    pred_uncond: Tensor | None = None,
    **_: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, log_prob, ratio, clip_fraction, kl, as of ``engine.kernels.PolicyLoss``."""
    if pred_uncond is not None:
        pred = guided(pred, pred_uncond)
    x, x_next, pred = upcast(x), upcast(x_next), upcast(pred)
    mean = mean_of(x, pred, a, b)
    log_prob = log_density(x_next, mean, std)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
    kl = mean_over_elements((mean - mean_ref) ** 2) / (2 * std**2)
    loss = torch.mean(torch.maximum(unclipped, clipped)) + KL_COEF * torch.mean(kl)
    clip_fraction = torch.mean((clipped > unclipped).float())
    return loss, log_prob.detach(), ratio.detach(), clip_fraction, kl.detach()


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (F.silu(F.group_norm(x, GROUPS, weight, bias, EPS)),)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor]:
    return (x + gate.unsqueeze(1) * branch,)


def residual_norm_modulate(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    (residual,) = gated_residual(x, gate, branch)
    return residual, *norm_modulate(residual, shift, scale)


def geglu(projected: Tensor) -> tuple[Tensor]:
    hidden, gate = projected.chunk(2, dim=-1)
    return (hidden * F.gelu(gate),)
