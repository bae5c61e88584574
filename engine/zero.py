"""DeepSpeed: its JSON from our configuration, the student's engine, and the full-precision weights behind ZeRO."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from engine.config import Config
from engine.errors import EngineError


def deepspeed_config(config: Config, *, micro_batch: int, accumulation: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON.

    Args:
        micro_batch: (sample, step) pairs in one forward pass of a rank.
        accumulation: micro-batches per optimizer step.
        world_size: number of ranks.

    Raises:
        EngineError: when zero.deepspeed sets a key that our configuration decides.
    """
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    built = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        # bitsandbytes is not on DeepSpeed's list, and offload must keep the optimizer that was asked for.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return _merged(built, config.zero.deepspeed, "zero.deepspeed")


def _merged(built: dict[str, Any], extra: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(built)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(built.get(key), dict):
            merged[key] = _merged(built[key], value, f"{where}.{key}")
        elif key in built:
            raise EngineError(f"{where}.{key} is decided by the other keys ({key}={built[key]!r}); leave it out")
        else:
            merged[key] = value
    return merged


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that optimizer.kind names, over the trainable parameters."""
    settings = config.optimizer
    arguments = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **arguments)
    return torch.optim.AdamW(parameters, **arguments)


def initialize(config: Config, network: nn.Module, *, micro_batch: int, accumulation: int, world_size: int) -> Any:
    """The DeepSpeed engine of the student's network."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=make_optimizer(config, [p for p in network.parameters() if p.requires_grad]),
        config=deepspeed_config(config, micro_batch=micro_batch, accumulation=accumulation, world_size=world_size),
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # DeepSpeed allocates the states by a step on zero gradients, which would count as Adam's first.
        engine.optimizer.state.clear()
    return engine


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0: optimizer.lr, falling to its final_lr share as scheduled."""
    settings, progress = config.optimizer, iteration / max(1, config.iterations - 1)
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * falling[settings.schedule])


def set_learning_rate(engine: Any, config: Config, iteration: int) -> float:
    """Give every parameter group the learning rate of an iteration, and return it."""
    lr = learning_rate(config, iteration)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, full fp32 value) of every parameter, whatever the ZeRO stage; all ranks must iterate together."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters: dict[Tensor, Tensor] = {}
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # low precision without ZeRO
        for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters.update(zip(low, full, strict=True))
    for name, parameter in engine.module.named_parameters():
        full = masters.get(parameter)
        full = safe_get_full_fp32_param(parameter) if full is None else full
        yield name, (parameter if full is None else full).detach()


def step(engine: Any) -> Tensor | float | None:
    """Step the optimizer if the accumulation is complete.

    Returns:
        The norm of the gradient over all ranks before clipping, or None between optimizer steps.
    """
    due = engine.is_gradient_accumulation_boundary()
    norm = None
    if due and not isinstance(engine.optimizer, DeepSpeedOptimizer):
        # Without ZeRO in fp32, DeepSpeed clips but does not tell the norm; the gradients are reduced already.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    if due and norm is None:
        norm = engine.get_global_grad_norm()
    return norm
