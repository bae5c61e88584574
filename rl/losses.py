"""The policy-optimisation loss of one micro-batch of (sample, step) pairs: GRPO and PPO alike."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import PolicyLoss, policy_loss
from engine.models.denoiser import Condition, Denoiser

from .policies import GaussianPolicy
from .rollout import Trajectory, coefficients, predict_step, take, timesteps_of


def step_weights(policy: GaussianPolicy, kind: str) -> Tensor | None:
    """Weights (T,) fp32 of the steps: None for "none", std over the mean std of the stochastic steps for "std".

    The gradient of a step's log-prob grows as 1/std, so late steps outweigh the early ones without it.

    Args:
        policy: with all its stochastic steps; the weights hold for any window of them.
    """
    if kind == "none":
        return None
    return (policy.std / policy.std[policy.stochastic].mean()).float()


def pair_loss(
    student: Denoiser,
    policy: GaussianPolicy,
    trajectory: Trajectory,
    pairs: Tensor,
    condition: Condition,
    advantage: Tensor,
    *,
    guidance: float,
    clip_range: float | tuple[float, float],
    reference: Denoiser | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "kl",
    kl_alpha: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """One forward pass of the student over a micro-batch, and its clipped loss.

    Args:
        pairs: (B,) int64 indices into the trajectory's pairs.
        condition: tensors (K, ...), each of N / K consecutive samples of the trajectory's N.
        advantage: (N,) of its samples.
        reference: the frozen initial student, needed where kl_coef is not 0.
        weights: (T,) step weights, or None.

    Returns:
        PolicyLoss; `.loss` is the mean over the B pairs and backpropagates into the student.
    """
    sample, step = trajectory.sample[pairs], trajectory.step[pairs]
    x = trajectory.latents[pairs]
    rows = take(condition, sample, len(trajectory.final))
    pred, uncond = predict_step(student, policy, x, step, rows, guidance)
    pred_ref = None
    if kl_coef:
        with torch.no_grad():
            pred_ref = reference.guided(x, timesteps_of(policy, step, x), rows, guidance=guidance)
    return policy_loss(
        x,
        trajectory.next_latents[pairs],
        pred,
        *coefficients(policy, step),
        trajectory.log_prob[pairs],
        advantage[sample],
        pred_uncond=uncond,
        guidance=guidance,
        pred_ref=pred_ref,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        clip_range=clip_range,
        weight=None if weights is None else weights.to(x.device)[step],
        **({} if kl_alpha is None else {"kl_alpha": kl_alpha}),
    )
