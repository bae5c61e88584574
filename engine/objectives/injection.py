"""How a critic is moved towards the student between optimizer steps, whatever ZeRO stage and precision they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import zero


@torch.no_grad()
def inject(critic: Any, student: Any, keep: float) -> None:
    """psi <- keep psi + (1 - keep) theta, for all that the student trains (Flash-DMD, arXiv 2511.20549).

    It is done in the weights that the optimizer works on, and the network computes with the result; the optimizer's
    means stay.

    Args:
        critic, student: DeepSpeed engines around networks of one architecture, of which the critic trains at least
            what the student trains; all ranks call this together.
        keep: share of the critic that stays, in [0, 1].
    """
    shared = {name for name, _ in zero.trainable_parameters(student)}
    parameters = dict(zero.trainable_parameters(critic))
    own = ((name, value) for name, value in zero.full_parameters(critic) if name in shared)
    for (name, mine), (_, theirs) in zip(own, zero.full_parameters(student), strict=True):
        _write(critic, parameters[name], mine.lerp(theirs.to(mine), 1 - keep))


def _write(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another full value, and its master weight too, where there is one."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # low precision without ZeRO
        for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, full, strict=True):
                if weight is parameter:
                    master.copy_(value)
    elif hasattr(parameter, "ds_id"):  # ZeRO-3, where the full setter fails on a padded part
        size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
        ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        padded = F.pad(value.flatten(), (0, size * ranks - value.numel()))
        safe_set_local_fp32_param(parameter, padded[rank * size : (rank + 1) * size])
    else:
        safe_set_full_fp32_param(parameter, value)  # nothing in fp32 without ZeRO, which has no master weights
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
