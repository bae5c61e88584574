"""Rollouts: a student draws samples by its policy and records what the update will score again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import policy_log_prob, policy_sample
from engine.models.denoiser import Condition, Denoiser

from .policies import GaussianPolicy


@dataclass
class Trajectory:
    """The scored (sample, step) pairs of a rollout and its final latents: N samples, S stochastic steps, P = S*N pairs.

    Attributes:
        latents: (P, C, H, W) fp32, x at each pair.
        next_latents: (P, C, H, W) fp32, the x_next that was drawn, exactly as it was scored.
        log_prob: (P,) fp32.
        sample: (P,) int64, index of the pair's sample.
        step: (P,) int64, index of the pair's policy step.
        final: (N, C, H, W) fp32, latents after the last step.
        passes: network evaluations of one latent that the rollout took.
    """

    latents: Tensor
    next_latents: Tensor
    log_prob: Tensor
    sample: Tensor
    step: Tensor
    final: Tensor
    passes: int


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    policy: GaussianPolicy,
    initial: Tensor,
    condition: Condition,
    *,
    guidance: float = 1.0,
    group_size: int = 1,
    step_noise: Callable[[int], Tensor] | None = None,
    batch_size: int | None = None,
) -> Trajectory:
    """Draw `group_size` samples per row by the policy.

    Rows that are still equal are computed once: until the first stochastic step, the samples of a group that start from
    the same noise are one row.

    Args:
        denoiser: the student (or, with a deterministic policy, the teacher).
        policy: T steps; step i goes from timesteps[i] to the next.
        initial: (M, C, H, W) initial latents; sample j of row m is sample m * group_size + j.
        condition: tensors (K, ...), where K divides M: each is the condition of M / K consecutive rows.
        guidance: of the student.
        group_size: samples per row.
        step_noise: maps a step index to standard normal noise (M * group_size, C, H, W); needed by stochastic steps.
        batch_size: most latents in one forward pass; None: all.

    Returns:
        Trajectory of N = M * group_size samples.
    """
    x = initial.float()
    records: list[tuple[Tensor, Tensor, Tensor, int]] = []
    passes, grouped = 0, group_size == 1
    for i, stochastic in enumerate(policy.stochastic.tolist()):
        if stochastic and not grouped:
            x, grouped = x.repeat_interleave(group_size, 0), True
        passes += len(x) * denoiser.passes(guidance)
        noise = step_noise(i).to(x.device) if stochastic else torch.zeros((), device=x.device).expand_as(x)
        drawn = []
        for rows in torch.arange(len(x), device=x.device).split(batch_size or len(x)):
            pred, uncond = predict_step(denoiser, policy, x[rows], i, take(condition, rows, len(x)), guidance)
            drawn.append(
                policy_sample(
                    x[rows], pred, *coefficients(policy, torch.full_like(rows, i)),
                    pred_uncond=uncond, guidance=guidance, noise=noise[rows],
                )
            )  # fmt: skip
        x_next = torch.cat([pair[0] for pair in drawn])
        if stochastic:
            records.append((x, x_next, torch.cat([pair[1] for pair in drawn]), i))
        x = x_next
    if not grouped:
        x = x.repeat_interleave(group_size, 0)
    return _trajectory(records, x, passes)


def predict_step(
    denoiser: Denoiser, policy: GaussianPolicy, x: Tensor, step: int | Tensor, condition: Condition, guidance: float
) -> tuple[Tensor, Tensor | None]:
    """The prediction (and its unconditional half) at policy steps, the one call that rollout and update share.

    Args:
        step: a step index, or (B,) int64 indices.
    """
    return denoiser.predict(x, timesteps_of(policy, step, x), condition, guidance=guidance)


def timesteps_of(policy: GaussianPolicy, step: int | Tensor, x: Tensor) -> Tensor:
    """What the network is conditioned on at policy steps, one for each of the latents x (B, ...): (B,)."""
    timesteps = policy.timesteps.float() if policy.timesteps.is_floating_point() else policy.timesteps
    return timesteps.to(x.device)[torch.as_tensor(step, device=x.device).expand(len(x))]


def coefficients(policy: GaussianPolicy, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, std) of policy steps (B,), each (B,) fp32 on the steps' device."""
    table = torch.stack([policy.a, policy.b, policy.std]).float().to(step.device)
    return tuple(table[:, step])


@torch.no_grad()
def first_pass_error(
    denoiser: Denoiser,
    policy: GaussianPolicy,
    trajectory: Trajectory,
    condition: Condition,
    *,
    guidance: float,
    batch_size: int,
) -> float:
    """Largest |ratio - 1| when an unchanged student scores all pairs of a trajectory again, in batches of another size.

    Args:
        condition: tensors (K, ...), each of N / K consecutive samples of the trajectory's N.
    """
    worst = 0.0
    for pairs in torch.arange(len(trajectory.step), device=trajectory.step.device).split(batch_size):
        step = trajectory.step[pairs]
        x = trajectory.latents[pairs]
        rows = take(condition, trajectory.sample[pairs], len(trajectory.final))
        pred, uncond = predict_step(denoiser, policy, x, step, rows, guidance)
        log_prob = policy_log_prob(
            x, trajectory.next_latents[pairs], pred, *coefficients(policy, step), pred_uncond=uncond, guidance=guidance
        )
        error = (log_prob - trajectory.log_prob[pairs]).exp().sub(1).abs().max().item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


def default_ratio_tolerance(policy: GaussianPolicy, precision: str) -> float:
    """The largest |ratio - 1| before an update that rounding explains.

    A network rounds differently in other batch sizes, by some 2e-7 in fp32, and the log-prob multiplies that by
    |b| / std of the step. In "bf16" and "fp16", 0.05: an error of the guidance or the sampler is of the order of 1.
    """
    if precision != "fp32":
        return 0.05
    scored = policy.stochastic
    return max(1e-5, 1e-6 * float((policy.b[scored].abs() / policy.std[scored]).max()))


def take(condition: Condition, samples: Tensor, count: int) -> Condition:
    """Conditions (B, ...) of `samples` (B,) int64 out of `count`, of which each row of `condition` holds an equal,
    consecutive share: a group's condition is stored once, however many samples it has."""
    return {name: value[samples * len(value) // count] for name, value in condition.items()}


def join(parts: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of the samples of several, in their order; all by one policy."""
    if len(parts) == 1:
        return parts[0]
    counts = [len(part.final) for part in parts]
    steps = len(parts[0].step) // counts[0]
    firsts = [sum(counts[:i]) for i in range(len(parts))]

    def by_step(values: Sequence[Tensor]) -> Tensor:
        split = [value.unflatten(0, (steps, count)) for value, count in zip(values, counts, strict=True)]
        return torch.cat(split, dim=1).flatten(0, 1)

    return Trajectory(
        latents=by_step([part.latents for part in parts]),
        next_latents=by_step([part.next_latents for part in parts]),
        log_prob=by_step([part.log_prob for part in parts]),
        sample=by_step([part.sample + first for part, first in zip(parts, firsts, strict=True)]),
        step=by_step([part.step for part in parts]),
        final=torch.cat([part.final for part in parts]),
        passes=sum(part.passes for part in parts),
    )


def _trajectory(records: list[tuple[Tensor, Tensor, Tensor, int]], final: Tensor, passes: int) -> Trajectory:
    samples = torch.arange(len(final), device=final.device)
    if not records:
        none = final[:0]
        return Trajectory(none, none, none.new_zeros(0), samples[:0], samples[:0], final, passes)
    latents, next_latents, log_probs, steps = zip(*records, strict=True)
    return Trajectory(
        latents=torch.cat(latents),
        next_latents=torch.cat(next_latents),
        log_prob=torch.cat(log_probs),
        sample=samples.repeat(len(records)),
        step=torch.cat([torch.full_like(samples, i) for i in steps]),
        final=final,
        passes=passes,
    )
