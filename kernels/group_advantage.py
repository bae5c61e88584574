"""Group-relative advantages of GRPO and its relatives."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import check_finite, check_floats, check_number, choose
from .backend import launch, register

SCALES = ("group_std", "global_std", "none")


def group_advantage(
    rewards: Tensor,
    group_size: int,
    *,
    scale: str = "group_std",
    clip: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each sample over its group, ``A = (r - mean_group) / (std + eps)``.

    Args:
        rewards: (N,), any float dtype, N = groups * group_size, the samples of a group side by side.
        group_size: samples per group, >= 1; must divide N.
        scale: what divides the deviation. ``"group_std"``: the group's population std (GRPO, Shao et al. 2024,
            arXiv:2402.03300, section 4.1.2). ``"global_std"``: the population std of all N rewards as given, around
            their common mean (safer where the rewards of a group are nearly equal). ``"none"``: nothing
            (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783).
        clip: advantages are clamped to [-clip, clip]; None = not clamped.
        eps: added to the std, >= 0. Unused with ``scale="none"``.

    Returns:
        (N,) float32, without gradient. Exactly zero for a group of equal rewards or of one sample. Non-finite rewards
        make their group nan (with ``"global_std"``: every group).

    Raises:
        TypeError: rewards are no float tensor, or a number is no number.
        ValueError: rewards are not (N,), group_size does not divide N, unknown scale, clip <= 0, eps < 0.
    """
    check_floats("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; it must be (N,), N = groups * group_size")
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size < 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide {rewards.shape[0]} rewards; "
            "pass a divisor of the number of samples per rank"
        )
    if check_finite("eps", eps) < 0:
        raise ValueError(f"eps={eps} is negative; pass a number >= 0")
    limit = math.inf if clip is None else check_number("clip", clip)
    if not limit > 0:
        raise ValueError(f"clip={clip} must be > 0; pass None not to clamp")
    mode = SCALES.index(choose("scale", scale, SCALES))
    return _advantage(rewards.detach(), group_size, mode, limit, float(eps))


def _reference(rewards: Tensor, group_size: int, mode: int, clip: float, eps: float) -> Tensor:
    rewards = rewards.double().view(-1, group_size)
    deviation = _deviation(rewards, dim=1)
    scale = SCALES[mode]
    if scale == "group_std":
        deviation = _divide(deviation, deviation.square().mean(1, keepdim=True).sqrt() + eps)
    elif scale == "global_std":
        deviation = _divide(deviation, _deviation(rewards.view(1, -1), dim=1).square().mean().sqrt() + eps)
    return deviation.clamp(-clip, clip).to(torch.float32).flatten()


def _deviation(rewards: Tensor, dim: int) -> Tensor:
    # Shifted by the first reward, equal rewards deviate by exactly zero: no rounding of their mean is left to blow up.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(dim, keepdim=True)


def _divide(deviation: Tensor, by: Tensor) -> Tensor:
    # eps = 0 and equal rewards would be 0 / 0
    return deviation / torch.where(by == 0, 1.0, by)


def _kernels(rewards: Tensor, group_size: int, mode: int, clip: float, eps: float) -> Tensor:
    total = rewards.shape[0]
    if total == 0:
        return _reference(rewards, group_size, mode, clip, eps)
    rewards = rewards.contiguous()
    advantage = torch.empty_like(rewards, dtype=torch.float32)
    block = max(32, min(1024, triton.next_power_of_2(group_size)))
    launch(
        _advantage_kernel, total // group_size, [rewards, advantage], [group_size, total, clip, eps],
        SCALE=SCALES[mode], BLOCK=block, num_warps=1,
    )  # fmt: skip
    return advantage


@triton.jit
def _moments(p_rewards, start, count, BLOCK: tl.constexpr):
    """First reward, mean of the deviations from it, and population variance of ``count`` rewards from ``start``."""
    pivot = tl.load(p_rewards + start).to(tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(count, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        b_reward = tl.load(p_rewards + start + o, mask=o < count, other=0.0).to(tl.float32)
        b_sum += tl.where(o < count, b_reward - pivot, 0.0)
    mean = tl.sum(b_sum) / count
    b_square = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.cdiv(count, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        b_reward = tl.load(p_rewards + start + o, mask=o < count, other=0.0).to(tl.float32)
        b_deviation = tl.where(o < count, b_reward - pivot - mean, 0.0)
        b_square += b_deviation * b_deviation
    return pivot, mean, tl.sum(b_square) / count


@triton.jit
def _advantage_kernel(
    p_rewards,  # (total,)
    p_advantage,  # (total,) fp32
    group_size,
    total,
    clip,
    eps,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a group. For "global_std" each program reads all rewards once more: they are few, a launch is not."""
    start = tl.program_id(0).to(tl.int64) * group_size
    clip = tl.cast(clip, tl.float32)
    pivot, mean, variance = _moments(p_rewards, start, group_size, BLOCK)
    if SCALE == "global_std":
        _pivot, _mean, variance = _moments(p_rewards, start * 0, total, BLOCK)
    divisor = tl.sqrt(variance) + tl.cast(eps, tl.float32)
    if SCALE == "none":
        divisor = divisor * 0.0 + 1.0
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    for i in range(tl.cdiv(group_size, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        b_reward = tl.load(p_rewards + start + o, mask=o < group_size, other=0.0).to(tl.float32)
        b_advantage = (b_reward - pivot - mean) / divisor
        # comparisons let nan through, minimum and maximum would not
        b_advantage = tl.where(b_advantage > clip, clip, b_advantage)
        b_advantage = tl.where(b_advantage < -clip, -clip, b_advantage)
        tl.store(p_advantage + start + o, b_advantage, mask=o < group_size)


def _fake(rewards: Tensor, group_size: int, mode: int, clip: float, eps: float) -> Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)


_advantage = register(
    "group_advantage(Tensor rewards, int group_size, int mode, float clip, float eps) -> Tensor",
    reference=_reference,
    kernels=_kernels,
    fake=_fake,
)
