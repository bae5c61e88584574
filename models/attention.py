"""Which operator computes attention: xformers' where it has one, PyTorch's elsewhere."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

SDPA = "PyTorch SDPA (flash, memory-efficient, cuDNN or math, as PyTorch chooses)"


def set_attention(network: nn.Module, choice: str, *, device: torch.device | str, dtype: torch.dtype) -> str:
    """Let a diffusers UNet or transformer compute its attention by one operator, in rollout and update alike.

    Attention with a mask (PixArt's to its prompts) is left to PyTorch: xformers wants masks written out for every head
    and query, in memory of an alignment that prompts do not have.

    Args:
        network: with diffusers' own attention processors; changed in place.
        choice: "sdpa"; "xformers"; or "auto": xformers in every layer for which it has an operator, on a GPU.
        device: that the network will run on.
        dtype: that it will compute in.

    Returns:
        What runs, for the log.

    Raises:
        ValueError: "xformers", but it has no operator for any layer; the reason is xformers' own.
    """
    layers = _attention_layers(network)
    if not layers:
        if choice == "xformers":
            raise ValueError(f"attention=xformers, but a {type(network).__name__} has no attention; use auto")
        return "none in this network"
    if choice == "sdpa" or (choice == "auto" and torch.device(device).type == "cpu"):
        for layer in layers:
            _use_sdpa(layer)
        return SDPA
    operators: Counter[str] = Counter()
    reasons: dict[str, None] = {}
    for layer in layers:
        try:
            operator = _operator(torch.device(device), dtype, layer.to_q.out_features // layer.heads)
            _use_xformers(layer)
            operators[operator] += 1
        except _NoOperator as error:
            _use_sdpa(layer)
            reasons[str(error)] = None
    if not operators:
        if choice == "xformers":
            raise ValueError(f"attention=xformers: {'; '.join(reasons)}; use auto or sdpa")
        return f"{SDPA}; not xformers: {'; '.join(reasons)}"
    names = ", ".join(f"{name} in {count} of {len(layers)} layers" for name, count in operators.items())
    rest = f"; elsewhere {SDPA}: {'; '.join(reasons)}" if reasons else ""
    return f"xformers memory_efficient_attention ({names}){rest}"


class _NoOperator(Exception):
    """Why xformers cannot compute a layer's attention."""


class _XFormersWithoutMask:
    """xformers' processor for calls without a mask, the stock one for calls with."""

    def __init__(self, xformers: Any, stock: Any) -> None:
        self.xformers, self.stock = xformers, stock

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *arguments: Any,
        **keywords: Any,
    ) -> Any:
        processor = self.xformers if attention_mask is None else self.stock
        return processor(attn, hidden_states, encoder_hidden_states, attention_mask, *arguments, **keywords)


def _attention_layers(network: nn.Module) -> list[nn.Module]:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    return [module for module in network.modules() if isinstance(module, (Attention, AttentionModuleMixin))]


def _use_xformers(layer: nn.Module) -> None:
    # Not by diffusers' enable_xformers_memory_efficient_attention: it tries the operators in fp32, which those that
    # PyTorch lends to xformers do not take, and set_attention_backend switches every other network of the process, too.
    from diffusers.models import attention_processor as stock

    processor = layer.processor
    if isinstance(processor, _XFormersWithoutMask):
        return
    if hasattr(processor, "_attention_backend"):
        layer.set_attention_backend("xformers")
    elif type(processor) is stock.JointAttnProcessor2_0:
        layer.set_processor(_XFormersWithoutMask(stock.XFormersJointAttnProcessor(), processor))
    elif type(processor) is stock.AttnProcessor2_0 and layer.norm_q is None and layer.norm_k is None:
        layer.set_processor(_XFormersWithoutMask(stock.XFormersAttnProcessor(), processor))
    else:
        raise _NoOperator(f"diffusers has no xformers processor for {type(processor).__name__} as configured")


def _use_sdpa(layer: nn.Module) -> None:
    processor = layer.processor
    if isinstance(processor, _XFormersWithoutMask):
        layer.set_processor(processor.stock)
    elif hasattr(processor, "_attention_backend"):
        layer.set_attention_backend("native")


def _operator(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The name of the operator that xformers takes, forward and backward, having run it once."""
    try:
        from xformers.ops import fmha, memory_efficient_attention

        query = torch.zeros(1, 16, 1, head_size, device=device, dtype=dtype, requires_grad=True)
        name = fmha._dispatch_fw(fmha.Inputs(query, query, query), True).NAME
        memory_efficient_attention(query, query, query).sum().backward()
    except (ImportError, RuntimeError) as error:  # what xformers raises where it has no operator is a RuntimeError
        said = " ".join(inspect.cleandoc(str(error)).split())
        raise _NoOperator(f"head size {head_size} in {dtype} on {device.type}: {said[:400]}") from None
    return name
