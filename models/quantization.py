"""Frozen weights in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import torch
from torch import nn

KINDS = ("int8", "nf4")


def quantize(network: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Exchange a network's linear layers for bitsandbytes' layers of the same weights in 8 or 4 bits, frozen.

    diffusers quantises only while it loads, and only where there is a GPU; these layers are the same, on any device.

    Args:
        network: on the CPU, changed in place.
        kind: "int8" (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339) or "nf4" (QLoRA, Dettmers et al. 2023, arXiv
            2305.14314).
        dtype: what 4-bit layers compute in; 8-bit layers compute in fp16 and give it back in their input's dtype.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, layer in [(name, layer) for name, layer in network.named_modules() if type(layer) is nn.Linear]:
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        with torch.device("meta"):
            if kind == "int8":
                # Above 0, which columns stay in 16 bits depends on the whole batch: rollout and update would differ.
                small = Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=0.0)
            else:
                small = Linear4bit(*sizes, bias=bias, compute_dtype=dtype, quant_type="nf4")
        small.weight = type(small.weight)(layer.weight.data, requires_grad=False, **_keywords(kind))
        small.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, small.to("cpu"))
    network.requires_grad_(False)
    setattr(network, {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}[kind], True)  # what peft asks for


def _keywords(kind: str) -> dict[str, object]:
    return {"has_fp16_weights": False} if kind == "int8" else {"quant_type": "nf4"}
