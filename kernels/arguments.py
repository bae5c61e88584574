"""Checks of what callers pass: every error names the argument, its value, and a way out."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floats(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are float32, bfloat16, float16 (float64 on CPU)")


def check_batch(name: str, value: object) -> None:
    """Raise unless ``value`` is a floating tensor (B, ...) whose samples hold at least one element."""
    check_floats(name, value)
    if value.dim() == 0 or 0 in value.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be (B, ...), with an element or more a sample"
        )


def check_like(name: str, value: object, like_name: str, like: Tensor) -> None:
    """Raise unless ``value`` is a floating tensor of the shape and on the device of ``like``."""
    check_floats(name, value)
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but {like_name} has {tuple(like.shape)}; they must be equal"
        )
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but {like_name} on {like.device}; move them to one device")


def check_channels(name: str, value: object, channels: int, x: Tensor) -> None:
    """Raise unless ``value`` is a floating tensor (channels,) on the device of ``x``."""
    check_floats(name, value)
    if value.shape != (channels,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but x has {channels} channels; pass ({channels},)")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but x on {x.device}; move them to one device")


def refuse_float64(x: Tensor) -> None:
    """TypeError for float64, which Triton's kernels would round to float32."""
    if x.dtype == torch.float64:
        raise TypeError("float64 is computed by the torch reference only; pass float32, or set ENGINE_KERNELS=torch")


def per_sample(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """One number for each sample of ``like`` (B, ...): a contiguous float tensor (B,) on its device.

    A scalar costs a fill; a (B,) tensor on the right device passes through untouched, whatever its float dtype.
    """
    batch = like.shape[0]
    if isinstance(value, Tensor):
        check_floats(name, value)
        if value.dim() == 0:
            value = value.expand(batch)
        elif value.shape != (batch,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but the batch holds {batch} samples; "
                f"pass a scalar or a tensor of shape ({batch},)"
            )
        return value.to(like.device).contiguous()
    number = check_number(name, value)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((batch,), number, dtype=dtype, device=like.device)


def per_sample_int(name: str, value: Tensor | int, like: Tensor) -> Tensor:
    """An int64 tensor on the device of ``like`` (B, ...): (B,), or () for one number. An int costs a fill."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}; it must be int64")
        if value.dim() and value.shape != like.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but the batch holds {like.shape[0]} samples; "
                f"pass an int or a tensor of shape () or ({like.shape[0]},)"
            )
        return value.to(like.device).contiguous()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value} does not fit into 64 bits; pass a number from -2**63 to 2**63 - 1")
    return torch.full((), value, dtype=torch.int64, device=like.device)


def check_std(std: Tensor | float) -> None:
    """Raise when a scalar std is negative. A tensor is not read back from its device: its negatives give nan."""
    if not isinstance(std, Tensor) and check_number("std", std) < 0:
        raise ValueError(f"std={std} is negative; pass a standard deviation >= 0 (0 = a deterministic step)")


def check_number(name: str, value: object) -> float:
    """``value`` as a float; TypeError unless it is a python int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_finite(name: str, value: object) -> float:
    """``value`` as a float; an error unless it is a finite python number."""
    number = check_number(name, value)
    # math.isfinite would break the graph where torch.compile traces the number as a symbol
    if not abs(number) < math.inf:
        raise ValueError(f"{name}={number} must be finite")
    return number


def choose(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """``value`` when it is one of ``allowed``, else ValueError."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    return value


def reduction_factors(reduction: str, x: Tensor) -> tuple[float, float]:
    """(scale, count): a reduced sum of squares is multiplied by ``scale``, a constant per element by ``count``."""
    elements = math.prod(x.shape[1:])
    if choose("reduction", reduction, ("mean", "sum")) == "mean":
        return 1.0 / elements, 1.0
    return 1.0, float(elements)
