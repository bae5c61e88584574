"""Puts the fused kernels into a diffusers model, and takes them out again.

A module is replaced by changing its class, to a subclass of its own that has another forward. Nothing else of it is
touched: not its parameters, their names, its hooks or its children. So state dicts, LoRA, gradient checkpointing,
ZeRO-3, copies and pickles need nothing of ours, and ``save_pretrained`` writes the stock model.
"""

import ast
import functools
import hashlib
import inspect
import logging
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

_LOGGER = logging.getLogger(__name__)


class _Replacement(NamedTuple):
    """A fused class, for modules of exactly the class that it derives from.

    Attributes:
        fused: replaces its base.
        applies: whether it computes what a module of the base computes, given how that is configured.
        written_for: digests of the forwards of the base that ``fused`` says in other words; empty where the base is a
            documented contract. A diffusers release with another forward leaves its modules as they are.
    """

    fused: type[nn.Module]
    applies: Callable[[nn.Module], bool] = lambda module: True
    written_for: tuple[str, ...] = ()


def patch(model: nn.Module) -> dict[str, int]:
    """Run the element-wise chains of a diffusers UNet, transformer or VAE on our kernels.

    Replaced are, in any model: ``GroupNorm``, with the SiLU behind it in ``ResnetBlock2D`` and at the end of a UNet;
    ``GEGLU``; the adaptive norms and gated residuals of ``BasicTransformerBlock`` (DiT, PixArt),
    ``JointTransformerBlock`` (SD3), ``FluxTransformerBlock`` and ``FluxSingleTransformerBlock``. Modules of other
    classes, subclasses included, stay as they are. Call it before the model is wrapped by FSDP; before or after LoRA,
    DeepSpeed and ``torch.compile``.

    Results and gradients agree with the stock model's up to rounding, and can be differentiated once. Forward hooks on
    a LayerNorm that its block absorbs no longer run.

    Args:
        model: changed in place; may be patched already.

    Returns:
        How many modules of each class now run fused kernels. A warning is logged for those that would, were it not for
        a forward of theirs that we do not know (another release of diffusers, an offloading hook).

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; of a pipeline, pass its unet or transformer"
        )
    from . import fused_unet

    replacements, left = _replacements(), Counter()
    modules = list(model.modules())
    for module in reversed(modules):  # the norms of a block before the block
        replacement = replacements.get(type(module))
        if replacement is None or not replacement.applies(module):
            continue
        obstacle = _obstacle(module, replacement)
        if obstacle is None:
            module.__class__ = replacement.fused
        else:
            left[type(module).__name__, obstacle] += 1
    for module in modules:
        if fused_unet.can_fuse_head(module):
            module.conv_norm_out.__class__ = fused_unet.GroupNormSiLU
            module.conv_act.__class__ = fused_unet.AbsorbedSiLU
    for (name, obstacle), count in left.items():
        _LOGGER.warning("%d %s left without fused kernels: %s", count, name, obstacle)
    fused = _fused_classes() - {fused_unet.AbsorbedSiLU}
    return dict(Counter(type(module).__name__ for module in modules if type(module) in fused))


def unpatch(model: nn.Module) -> None:
    """Give every module that ``patch`` replaced its stock class back."""
    fused = _fused_classes()
    for module in model.modules():
        if type(module) in fused:
            module.__class__ = type(module).__base__


@functools.cache
def _replacements() -> dict[type[nn.Module], _Replacement]:
    # diffusers takes seconds to import, and the other kernels do not need it
    from . import fused_transformer as transformer
    from . import fused_unet as unet

    table = (
        _Replacement(unet.GroupNorm),
        _Replacement(unet.ResnetBlock2D, unet.can_fuse_resnet, ("07da52b5b7d90ba7", "5c8d10a3fa490f93")),
        _Replacement(transformer.GEGLU, written_for=("3ba58963509c23d2",)),
        _Replacement(transformer.AdaLayerNormZero, transformer.has_plain_norm, ("ed3fcf94887ee959",)),
        _Replacement(transformer.AdaLayerNormZeroSingle, transformer.has_plain_norm, ("eae7328a603d18e8",)),
        _Replacement(transformer.AdaLayerNormContinuous, transformer.has_plain_norm, ("bbfa916f04cabd9d",)),
        _Replacement(transformer.SD35AdaLayerNormZeroX, transformer.has_plain_norm, ("43192016e74fd65b",)),
        _Replacement(transformer.BasicTransformerBlock, transformer.can_fuse_basic_block, ("ff47c1ae4db89798",)),
        _Replacement(transformer.JointTransformerBlock, transformer.has_plain_second_norms, ("a6e047ca07b44965",)),
        _Replacement(transformer.FluxTransformerBlock, transformer.has_plain_second_norms, ("4c6fe8ad80a9ec03",)),
        _Replacement(transformer.FluxSingleTransformerBlock, written_for=("4149a00e400fa349",)),
    )
    return {replacement.fused.__base__: replacement for replacement in table}


@functools.cache
def _fused_classes() -> frozenset[type[nn.Module]]:
    from . import fused_unet

    replaced = (replacement.fused for replacement in _replacements().values())
    return frozenset({*replaced, fused_unet.GroupNormSiLU, fused_unet.AbsorbedSiLU})


def _obstacle(module: nn.Module, replacement: _Replacement) -> str | None:
    """What keeps a module from running the forward of its fused class, if anything does."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance; patch the model before it is offloaded or hooked"
    if replacement.written_for and _digest(type(module).forward) not in replacement.written_for:
        return "its forward is not that of diffusers 0.36 to 0.42, which the fused one was written for"
    return None


@functools.cache
def _digest(function: Callable) -> str:
    """A hash of what a function does: of its source without annotations, docstring, comments and layout."""
    if hasattr(function, "__wrapped__"):  # the source would be that of the function inside
        return "wrapped"
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
    except (OSError, TypeError, ValueError, SyntaxError):  # without a source file, no Python, a lambda
        return "unreadable"
    return hashlib.sha256(repr(_form(definition)).encode()).hexdigest()[:16]


def _form(node: object) -> object:
    # ast.dump and ast.unparse write the same code differently from one Python to the next
    if isinstance(node, list):
        return [_form(element) for element in node]
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in ("annotation", "returns"))
    return type(node).__name__, [(name, _form(value)) for name, value in fields if value not in (None, [])]
