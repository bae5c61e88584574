"""The switches that trade time for memory, or the other way round, in networks and VAEs that diffusers made."""

from __future__ import annotations

import re

import torch
from torch import nn

COMPILED = frozenset(
    [
        "ResnetBlock2D",
        "BasicTransformerBlock",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    ]
)
"""Classes of the blocks that networks repeat, and in which they spend their time."""


def select_trainable(network: nn.Module, pattern: str | None) -> list[str]:
    """Let only some parameters require gradients.

    Args:
        network: changed in place.
        pattern: regular expression that is found in the name of a parameter that is trained; None: all are.

    Returns:
        The names of what is trained.

    Raises:
        ValueError: an invalid expression, or one that is found in no name.
    """
    names = [name for name, _ in network.named_parameters()]
    try:
        chosen = {name for name in names if re.search(pattern or "", name)}
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if not chosen:
        some = ", ".join(names[:: max(1, len(names) // 6)])
        raise ValueError(
            f"{pattern!r} is found in none of the {len(names)} names of parameters of a {type(network).__name__}; "
            f"some of them are {some}"
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def prepare_network(network: nn.Module, *, gradient_checkpointing: bool = False, compile: bool = False) -> None:
    """Set what a network does with memory and time; before DeepSpeed wraps it. Results stay, up to rounding.

    Args:
        network: a diffusers model, changed in place.
        gradient_checkpointing: keep the inputs of blocks for backward, and compute again what is inside.
        compile: torch.compile each repeated block: once for all blocks of the same widths and for all batch sizes.

    Raises:
        ValueError: names the switch that this network has no use for.
    """
    kind = type(network).__name__
    if gradient_checkpointing:
        if not getattr(network, "_supports_gradient_checkpointing", False):
            raise ValueError(f"gradient_checkpointing=true, but a {kind} has no blocks that can be checkpointed")
        network.enable_gradient_checkpointing()
    if compile:
        _compile_blocks(network)


def use_channels_last(network: nn.Module, *, frozen_only: bool = False) -> None:
    """Keep the weights of convolutions, and so what these compute, in the order (B, H, W, C).

    Args:
        network: changed in place; after DeepSpeed has wrapped it, as that reads weights in the default order.
        frozen_only: leave what requires gradients alone: ZeRO keeps it in a flat buffer, in the default order.

    Raises:
        ValueError: a network without chains of convolutions, as transformers are.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) < 2:  # transformers embed their patches by one
        raise ValueError(f"channels_last=true is for networks of convolutions, which a {type(network).__name__} is not")
    for convolution in convolutions:
        weight = convolution.weight
        if not (frozen_only and weight.requires_grad):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def prepare_vae(vae: nn.Module, *, slicing: bool = False, tiling: bool = False) -> None:
    """Let a VAE decode image by image (slicing), and large images in overlapping tiles that are blended (tiling).

    Slicing changes no image. Tiling changes those that are larger than a tile (the size that the VAE was trained at),
    as a tile does not see beyond its border.

    Raises:
        ValueError: the VAE cannot.
    """
    for asked, name in ((slicing, "enable_slicing"), (tiling, "enable_tiling")):
        if asked:
            if not hasattr(vae, name):
                raise ValueError(f"vae.{name.removeprefix('enable_')}=true, but a {type(vae).__name__} has no {name}")
            getattr(vae, name)()


def _compile_blocks(network: nn.Module) -> None:
    blocks = [module for module in network.modules() if type(module).__name__ in COMPILED]
    if not blocks:
        raise ValueError(
            f"compile=true, but a {type(network).__name__} has none of the blocks that are compiled: "
            + ", ".join(sorted(COMPILED))
        )
    # Blocks of a class share their variants: SDXL's resnets have 12 widths, each with and without gradients. Beyond
    # the limit, PyTorch would go on uncompiled without an error.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in blocks:
        # Rollout and update differ in batch size and in gradients, and so in which intermediate values are kept. That
        # would decide what is rounded to bf16, and the ratio would not be 1, were rounding not that of eager code.
        block.compile(dynamic=True, options={"emulate_precision_casts": True})
