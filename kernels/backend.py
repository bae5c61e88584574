"""The one dispatch: which implementation an operator runs, and how operators are registered with torch.

GPU tensors run Triton. CPU tensors run the torch reference, or Triton when the process was started with
``TRITON_INTERPRET=1`` (Triton's own interpreter; it reads the variable when a kernel is decorated, so it must be set
before the first import). ``ENGINE_KERNELS=torch`` or ``ENGINE_KERNELS=triton`` overrides the choice at any time.
"""

import contextlib
import os
from collections.abc import Callable

import torch
import triton
from torch import Tensor

VARIABLE = "ENGINE_KERNELS"
INTERPRETED = bool(triton.knobs.runtime.interpret)
_LIBRARY = torch.library.Library("engine_kernels", "DEF")


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
    """Define the operator ``engine_kernels::<schema>`` and return its overload, to be called positionally.

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
    return getattr(torch.ops.engine_kernels, name).default


def launching_on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on the device of ``tensor`` (it launches on the current one)."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
