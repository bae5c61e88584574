"""Errors against float64 are at most twice those of the plain PyTorch formulas.

Half precision has two rivals: the formula in the dtype of its inputs, and the formula after `.float()`, as careful
trainers write it. Why twice: sums in another order collect other roundings. On top comes one unit in the last place of
the result, below which it is luck who is nearer.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from engine.kernels import group_advantage, policy_divergence, policy_log_prob, policy_loss, policy_sample

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
GUIDANCE, CLIP_RANGE, KL_COEF = 3.0, 0.1, 0.3
BATCHES = 4  # whose errors are taken together

# ---- the formulas as papers and trainers write them


def guided(s):
    return s.pred_uncond + GUIDANCE * (s.pred - s.pred_uncond)


def mean(s):
    return s.a[:, None] * s.x + s.b[:, None] * guided(s)


@torch.no_grad()
def plain_sample(s):
    return mean(s) + s.std[:, None] * s.noise


def plain_log_prob(s):
    std = s.std[:, None]
    return (-((s.x_next - mean(s)) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))).mean(1)


def plain_divergence(s, f, kind, alpha):
    distance = ((s.b[:, None] * (f - s.pred_ref)) ** 2 / s.std[:, None] ** 2).mean(1)
    if kind == "kl":
        return distance / 2
    if kind == "chi2":
        return torch.exp(distance) - 1
    return (torch.exp(alpha * (alpha - 1) * distance / 2) - 1) / (alpha * (alpha - 1))


def plain_loss(s, kind, alpha):
    ratio = torch.exp(plain_log_prob(s) - s.old)
    surrogate = torch.maximum(-s.advantage * ratio, -s.advantage * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
    return (s.weight * (surrogate + KL_COEF * plain_divergence(s, guided(s), kind, alpha))).mean()


def plain_advantage(s):
    return (s.x - s.x.mean(1, keepdim=True)) / (s.x.std(1, correction=0, keepdim=True) + 1e-6)


# ---- ours


def keywords(s):
    return {"pred_uncond": s.pred_uncond, "guidance": GUIDANCE}


def our_sample(s):
    return policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise, **keywords(s))[0]


def our_log_prob(s):
    return policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std, **keywords(s))


def our_divergence(s, kind, alpha):
    return policy_divergence(s.pred, s.pred_ref, s.b, s.std, kind=kind, alpha=alpha)


def our_loss(s, kind, alpha):
    return policy_loss(
        s.x, s.x_next, s.pred, s.a, s.b, s.std, s.old, s.advantage, **keywords(s), weight=s.weight,
        clip_range=CLIP_RANGE, pred_ref=s.pred_ref, kl_coef=KL_COEF, kl_kind=kind, kl_alpha=alpha,
    ).loss  # fmt: skip


def our_advantage(s):
    return group_advantage(s.x.flatten(), s.x.shape[1]).view(s.x.shape)


KINDS = [("kl", None), ("chi2", None), ("power", 0.5)]
OPERATIONS = {
    "sample": (our_sample, plain_sample),
    "log_prob": (our_log_prob, plain_log_prob),
    "advantage": (our_advantage, plain_advantage),
}
for _kind in KINDS:
    OPERATIONS[f"divergence {_kind[0]}"] = (
        lambda s, k=_kind: our_divergence(s, *k),
        lambda s, k=_kind: plain_divergence(s, s.pred, *k),
    )
    OPERATIONS[f"loss {_kind[0]}"] = (lambda s, k=_kind: our_loss(s, *k), lambda s, k=_kind: plain_loss(s, *k))


def results(function, s, dtype=None):
    """Value and gradients of both predictions, with all inputs in a dtype, or as they are."""
    s = SimpleNamespace(**{name: t.detach().to(dtype or t.dtype) for name, t in vars(s).items()})
    leaves = [s.pred.requires_grad_(), s.pred_uncond.requires_grad_()]
    value = function(s)
    if not value.requires_grad:
        return [value]
    total = (value * s.weight).sum() if value.dim() else value
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]


def size(values):
    return values.square().mean().sqrt()


def step(shape, seed, dtype, device, truth, *, near_guided):
    s = truth.batch(shape, dtype=dtype, device=device, seed=seed)
    for name in ("a", "b", "std", "advantage", "weight"):
        setattr(s, name, getattr(s, name).to(dtype))
    s.advantage = s.advantage.abs()  # terms of both signs would cancel in the loss and leave the rest to luck
    if near_guided:  # as a reference that the policy has not left
        s.pred_ref = (guided(s).float() + 0.3 * s.noise.float()).to(dtype)
    s.x_next = plain_sample(s).to(dtype)  # a step of this policy: far ones would leave the sum to few samples
    wide = SimpleNamespace(**{name: t.double() for name, t in vars(s).items()})
    s.old = (plain_log_prob(wide) + 0.2 * s.shift.sign()).float()  # no rounding moves a ratio across the clip's bounds
    return s


@pytest.mark.parametrize("shape", [(8, 130), (1, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_error_is_more_than_twice_that_of_plain_pytorch(operation, dtype, shape, device, truth):
    ours, plain = OPERATIONS[operation]
    batches = []
    for seed in range(BATCHES):
        s = step(shape, seed, dtype, device, truth, near_guided=operation.startswith("loss"))
        batches.append([results(ours, s), *(results(plain, s, arithmetic) for arithmetic in (F64, F32, dtype))])
    for i, result in enumerate(batches[0][0]):
        mine, exact, *rivals = (torch.stack([of[i].double() for of in side]) for side in zip(*batches, strict=True))
        unit = torch.finfo(result.dtype).eps * size(exact)
        for rival in rivals:
            assert size(mine - exact) <= 2 * size(rival.to(result.dtype).double() - exact) + unit
