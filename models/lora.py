"""LoRA: one network that is the teacher with its adapters off and the student with them on.

The adapters are peft's, so what is saved is what peft and diffusers load.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "student"
ATTENTION = r"(.*\.)?(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
"""The attention projections of diffusers' UNets and transformers, joint attention's second set included."""


class LoraError(ValueError):
    """Adapters that do not fit the network."""


def add_lora(
    network: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    target: str | None = None,
    name: str = ADAPTER,
    seed: int = 0,
) -> list[str]:
    """Freeze a network and put low-rank adapters beside its layers: W x becomes W x + alpha / rank B A x (Hu et al.
    2021, arXiv 2106.09685). B starts at 0, so the network computes at first what it did.

    Args:
        network: changed in place; its layers may be bitsandbytes'. Only the adapters, in fp32, require gradients then.
        alpha: None: rank, so that the factor is 1.
        target: regular expression that the whole name of a layer matches; None: ATTENTION.
        seed: of A, so that every run and every rank starts from the same adapters.

    Returns:
        The names of the layers that were adapted.

    Raises:
        LoraError: an invalid expression, or one that matches no linear layer and no convolution.
    """
    from peft import LoraConfig, inject_adapter_in_model

    target = ATTENTION if target is None else target
    # As named without adapters, which are layers of their own around the first.
    modules = [(key, layer) for key, layer in network.named_modules() if ".lora_" not in f".{key}"]
    layers = [key.removesuffix(".base_layer") for key, layer in modules if isinstance(layer, (nn.Linear, nn.Conv2d))]
    try:
        chosen = [key for key in layers if re.fullmatch(target, key)]
    except re.error as error:
        raise LoraError(f"{target!r} is not a regular expression: {error}") from None
    if not chosen:
        some = ", ".join(layers[:: max(1, len(layers) // 6)])
        raise LoraError(
            f"{target!r} is the whole name of none of the {len(layers)} layers that can be adapted in a "
            f"{type(network).__name__}; some of them are {some}"
        )
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=chosen, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, name)
    vars(network).pop("_lora_layers", None)
    return chosen


class activate:
    """Make one adapter the only active one of a network, or none: at once, and in a `with` block until its end.

    A network that is shared by roles needs the block. Gradient checkpointing runs the student's forward again during
    backward, with the adapters that are active then, so a reference that predicts in between must put them back.

    Which parameters require gradients stays as it is. (peft's own switches change it, and would so take the adapters
    out of a forward that is run again.)

    Args:
        network: with or without adapters, and with or without a DeepSpeed engine around it. Without: nothing happens.
        adapter: None switches all off.

    Raises:
        LoraError: the network has adapters, but not this one.
    """

    def __init__(self, network: nn.Module, adapter: str | None) -> None:
        self._layers = _layers(network)
        if not self._layers:
            return
        first = self._layers[0]
        if adapter is not None and adapter not in first.lora_A:
            raise LoraError(f"there is no adapter {adapter!r}; this network has {', '.join(first.lora_A)}")
        self._before = {key: vars(first)[key] for key in ("_active_adapter", "_disable_adapters")}
        state = {} if adapter is None else {"_active_adapter": [adapter]}
        self._switch(state | {"_disable_adapters": adapter is None})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        if self._layers:
            self._switch(self._before)

    def _switch(self, state: dict[str, Any]) -> None:
        # What peft's forward reads, written past nn.Module.__setattr__, which takes 20 times as long for SDXL's 560.
        for layer in self._layers:
            vars(layer).update(state)


def lora_state(network: nn.Module, name: str = ADAPTER) -> dict[str, Tensor]:
    """The tensors of one adapter, named as peft and diffusers name them in files: without the adapter's name.

    Args:
        network: whole, not partitioned by ZeRO-3.
    """
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network, adapter_name=name)


def load_lora_state(network: nn.Module, state: Mapping[str, Tensor], name: str = ADAPTER) -> None:
    """Write what `lora_state` gave into an adapter that `add_lora` made.

    Raises:
        LoraError: the tensors are those of other layers or of another rank.
    """
    from peft import set_peft_model_state_dict

    own = lora_state(network, name)
    wrong = [key for key in {*own, *state} if key not in own or key not in state or own[key].shape != state[key].shape]
    if wrong:
        raise LoraError(
            f"{len(wrong)} tensors do not fit the adapter {name!r}, the first is {min(wrong)}; "
            "it needs the rank and the layers that it was trained with"
        )
    set_peft_model_state_dict(network, dict(state), adapter_name=name)


def merged(network: nn.Module, name: str = ADAPTER) -> nn.Module:
    """A copy of a network with one adapter added to its weights, and no adapters.

    Args:
        network: whole, not partitioned by ZeRO-3; left as it is.

    Raises:
        LoraError: the layers are quantised; a sum would be rounded to 8 or 4 bits once more.
    """
    from peft.tuners.lora import Conv2d, Linear

    plain = copy.deepcopy(network)
    for key, layer in [(key, layer) for key, layer in plain.named_modules() if hasattr(layer, "lora_A")]:
        if not isinstance(layer, (Linear, Conv2d)):
            raise LoraError(
                f"{key} is quantised, and an adapter cannot be added to it without rounding; "
                "load the network in fp32 or bf16, add_lora and load_lora_state, and merge that"
            )
        layer.merge(adapter_names=[name])
        parent, _, child = key.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    for key in ("peft_config", "_lora_layers"):
        vars(plain).pop(key, None)
    return plain


def _layers(network: nn.Module) -> list[nn.Module]:
    # Remembered, as a walk over SDXL's modules takes 10 ms, and every prediction asks.
    if "_lora_layers" not in vars(network):
        vars(network)["_lora_layers"] = [layer for layer in network.modules() if hasattr(layer, "lora_A")]
    return vars(network)["_lora_layers"]
