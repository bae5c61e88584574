"""The one dispatch: which implementation an operator runs, and how operators are registered with torch.

GPU tensors run Triton. CPU tensors run the torch reference, or Triton when the process was started with
``TRITON_INTERPRET=1`` (Triton's own interpreter; it reads the variable when a kernel is decorated, so it must be set
before the first import). ``ENGINE_KERNELS=torch`` or ``ENGINE_KERNELS=triton`` overrides the choice at any time.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

VARIABLE = "ENGINE_KERNELS"
INTERPRETED = bool(triton.knobs.runtime.interpret)
_LIBRARY = torch.library.Library("engine_kernels", "DEF")
_NOTHING = contextlib.nullcontext()


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operator on ``tensor`` runs its Triton kernels (else its torch reference).

    Raises:
        ValueError: ``ENGINE_KERNELS`` is neither torch nor triton, or asks for Triton where it cannot run.
    """
    choice = os.environ.get(VARIABLE, "")
    can_run = tensor.is_cuda or INTERPRETED
    if choice == "":
        return can_run
    if choice == "torch":
        return False
    if choice != "triton":
        raise ValueError(f"{VARIABLE}={choice!r} is not a back end; set it to 'torch' or 'triton', or unset it")
    if not can_run:
        raise ValueError(
            f"{VARIABLE}=triton cannot run on a tensor on {tensor.device}; move it to a GPU, "
            "or start the process with TRITON_INTERPRET=1"
        )
    return True


def register(schema: str, *, reference: Callable, kernels: Callable, fake: Callable) -> Callable:
    """Define the operator ``engine_kernels::<schema>`` and return the function that calls it, positionally.

    Args:
        schema: torch schema without defaults; the first argument is a tensor and decides the back end.
        reference: the torch implementation.
        kernels: the Triton implementation.
        fake: shapes, dtypes and strides of the results, for fake tensors and ``torch.compile``.
    """

    def run(*arguments):
        return (kernels if runs_triton(arguments[0]) else reference)(*arguments)

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"engine_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.engine_kernels, name).default

    def call(*arguments):
        # The way through torch's dispatcher costs the host as much as a launch. Only who watches or traces needs it.
        first = arguments[0]
        if (
            type(first) in (Tensor, torch.nn.Parameter)
            and not first.is_meta
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
        ):
            return run(*arguments)
        return operator(*arguments)

    return call


_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any, programs: int, tensors: Sequence[Tensor], numbers: Sequence[float], *, num_warps: int, **constants: Any
) -> None:
    """Run ``programs`` programs of a Triton kernel on the device of its first tensor.

    Triton works out at every launch which of its compiled variants fits, which costs the host more than the launch
    itself. Here a variant is looked up by what it can depend on, once Triton has compiled it.

    Args:
        kernel: the decorated kernel; its parameters are tensors, numbers, ``tl.constexpr`` ones, in this order.
        programs: size of the grid, >= 1.
        tensors, numbers, constants: its arguments, in order. Ints are sizes; floats reach the kernel as fp32.
        num_warps: warps a program.
    """
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    key = (
        kernel, tensors[0].device, num_warps, *constants.values(), *[tensor.dtype for tensor in tensors],
        *[number for number in numbers if type(number) is int],
    )  # fmt: skip
    with launching_on(tensors[0]):
        compiled = _compiled.get(key)
        if compiled is not None and addresses % 16 == 0:
            compiled[programs, 1, 1](*tensors, *numbers, *constants.values())
            return
        # no fused multiply-add: which ones a compiler forms differs between kernels, and with it a row's bits
        compiled = kernel[(programs,)](*tensors, *numbers, **constants, num_warps=num_warps, enable_fp_fusion=False)
        # AMD's variants also depend on the size of the storage behind a pointer; the interpreter compiles nothing
        if addresses % 16 == 0 and torch.version.hip is None and not INTERPRETED:
            _compiled[key] = compiled


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on the device of ``tensor`` (it launches on the current one)."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING
