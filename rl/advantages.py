"""Advantages: how much better a sample did than its baseline, over all ranks' samples at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.kernels import group_advantage


class RunningBaseline:
    """PPO's baseline: for each condition, a decayed running mean of its earlier rewards (DDPO's per-prompt tracker).

    A sample's baseline also counts the other samples of its condition in this iteration, never its own reward, so it
    stays unbiased; a condition that is seen for the first time with one sample falls back to the batch's mean of the
    other samples, and where there are none, its advantage is 0.
    """

    def __init__(self, size: int, *, decay: float) -> None:
        self.decay = decay
        self.total = torch.zeros(size, dtype=torch.float64)
        self.weight = torch.zeros(size, dtype=torch.float64)

    def advantage(
        self, rewards: Tensor, conditions: Tensor, *, scale: str, clip: float | None, eps: float = 1e-6
    ) -> Tensor:
        """Advantages (N,) fp32 of rewards (N,) under the baseline, then the baseline learns the rewards.

        Args:
            rewards: (N,) of all ranks.
            conditions: (N,) int64 pool indices.
            scale: "none" leaves the deviation; "global_std" and "group_std" divide by its std over the batch (without
                groups there is no other). A batch of one has no std, and is left as it is.
            clip: largest magnitude, or None.
        """
        reward = rewards.detach().double().cpu()
        index = conditions.cpu()
        total = torch.zeros_like(self.total).index_add_(0, index, reward)
        count = torch.zeros_like(self.weight).index_add_(0, index, torch.ones_like(reward))
        others = self.total[index] + total[index] - reward
        weight = self.weight[index] + count[index] - 1
        alone = len(reward) == 1
        batch = reward if alone else (reward.sum() - reward) / (len(reward) - 1)
        deviation = reward - torch.where(weight > 0, others / weight.clamp(min=1e-12), batch)
        seen = count > 0
        self.total[seen] = self.decay * self.total[seen] + total[seen]
        self.weight[seen] = self.decay * self.weight[seen] + count[seen]
        if scale != "none" and not alone:
            deviation = deviation / (deviation.std(unbiased=False) + eps)
        if clip is not None:
            deviation = deviation.clamp(-clip, clip)
        return deviation.to(rewards)

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.total.copy_(state["total"])
        self.weight.copy_(state["weight"])


def grpo_advantage(rewards: Tensor, group_size: int, *, scale: str, clip: float | None) -> Tensor:
    """GRPO's advantages (N,) of contiguous groups; scale "none" is Dr.GRPO (arXiv 2503.20783)."""
    return group_advantage(rewards, group_size, scale=scale, clip=clip)
