"""DeepSpeed: its JSON from our configuration, the student's engine, and the full-precision weights behind ZeRO."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from engine.config import Config
from engine.errors import EngineError
from engine.models.memory import use_channels_last


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
        "bf16": _bf16(config),
        "fp16": {"enabled": config.precision == "fp16"},
        # bitsandbytes is not on DeepSpeed's list, and offload must keep the optimizer that was asked for.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return _merged(built, config.zero.deepspeed, "zero.deepspeed")


def _bf16(config: Config) -> dict[str, bool]:
    section = {"enabled": config.precision == "bf16"}
    if config.zero.master_weights == "bf16":
        # DeepSpeed asks for the states along with them; 8-bit states stay as they are.
        section |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return section


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
    """The optimizer that optimizer.kind names: torch's AdamW, or one of bitsandbytes'.

    Args:
        parameters: the trainable ones.
    """
    settings = config.optimizer
    arguments = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if "adamw" in settings.kind:
        arguments["eps"] = settings.eps
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    from bitsandbytes import optim

    made = {
        "adamw8bit": optim.AdamW8bit,
        "paged_adamw8bit": optim.PagedAdamW8bit,
        "lion": optim.Lion,
        "lion8bit": optim.Lion8bit,
        "paged_lion8bit": optim.PagedLion8bit,
    }
    return made[settings.kind](parameters, **arguments)


def initialize(config: Config, network: nn.Module, *, micro_batch: int, accumulation: int, world_size: int) -> Any:
    """The DeepSpeed engine of the student's network."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=make_optimizer(config, [parameter for _, parameter in trainable_parameters(network)]),
        config=deepspeed_config(config, micro_batch=micro_batch, accumulation=accumulation, world_size=world_size),
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # DeepSpeed allocates the states by a step on zero gradients, which would count as Adam's first.
        engine.optimizer.state.clear()
    if config.model.channels_last:
        try:
            use_channels_last(network, frozen_only=config.zero.stage > 0)
        except ValueError as error:
            raise EngineError(f"model.{error}") from None
    return engine


def learning_rate_share(config: Config, iteration: int) -> float:
    """The share of optimizer.lr in an iteration, counted from 0: from 1 to final_lr, as scheduled."""
    settings, progress = config.optimizer, iteration / max(1, config.iterations - 1)
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.final_lr + (1 - settings.final_lr) * falling[settings.schedule]


def set_learning_rate(engine: Any, lr: float) -> None:
    """Give every parameter group a learning rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def trainable_parameters(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the network, parameter) of all that is trained: of an engine's network, or of one without an engine."""
    network = getattr(engine, "module", engine)
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, full fp32 value) of all that is trained, whatever the ZeRO stage: the optimizer's master weight, where it
    has one. All ranks must iterate together."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters: dict[Tensor, Tensor] = {}
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # low precision without ZeRO
        for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters.update(zip(low, full, strict=True))
    for name, parameter in trainable_parameters(engine):
        full = masters.get(parameter)
        full = safe_get_full_fp32_param(parameter) if full is None else full
        # in the default order, as files want it, whatever that of the live weight (model.channels_last)
        yield name, (parameter if full is None else full).detach().float().contiguous()


@torch.no_grad()
def write_parameters(engine: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let the network compute with other values of what is trained, until those that are returned are written back.

    The values are rounded to the network's precision. The optimizer's master weights stay (in fp32 without ZeRO there
    are none), so take no optimizer step in between.

    Args:
        engine: a DeepSpeed engine of any ZeRO stage, all of whose ranks call this together; or a network.
        values: name in the network -> full value, equal on all ranks; what is not named stays.

    Returns:
        What stood there: the same names, full values in the network's precision, in host memory.

    Raises:
        KeyError: a name of nothing that is trained.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters, before = dict(trainable_parameters(engine)), {}
    for name, value in values.items():
        parameter = parameters[name]
        # Written on rank 0 and spread from there; where nothing is partitioned, by every rank to its own.
        with GatheredParameters([parameter], modifier_rank=0):
            before[name] = parameter.detach().to("cpu", copy=True)
            parameter.copy_(value)
    return before


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
