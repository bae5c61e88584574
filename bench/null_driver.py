"""A Triton driver without a GPU: kernels are compiled for a named one, launches are recorded and run nothing.

What the host does for a launch can so be measured and tested anywhere, up to the call into the GPU's own driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.kernels import backend


class NullDriver:
    """Stands in for Triton's CUDA driver.

    Attributes:
        launches: (kernel name, hash of its binary, grid, arguments) of every launch, with ``record``.
    """

    def __init__(self, capability: int = 90, *, record: bool = False) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.record = record
        self.launches: list[tuple[str, int, tuple[int, int, int], tuple]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            if self.record:
                self.launches.append((metadata.name, function, (x, y, z), arguments))

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads a program)"""
        return 0, hash(binary), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 228 * 1024}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _always(tensor: torch.Tensor) -> bool:
    return True  # a mock that returns it would take longer than the launch


@contextmanager
def null_driver(*, record: bool = False) -> Iterator[NullDriver]:
    """CPU tensors are launched on a ``NullDriver``; what they hold afterwards is meaningless."""
    active = NullDriver(record=record)
    with (
        mock.patch.object(backend, "runs_triton", _always),
        mock.patch.dict(backend._compiled, clear=True),
    ):
        driver.set_active(active)
        try:
            yield active
        finally:
            driver._active = None  # made anew on demand; reset_active() would make it now, and fail without a GPU
