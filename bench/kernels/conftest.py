"""`pytest bench/kernels`: one benchmark for each operation, implementation, latent and dtype.

On a GPU with its kernels, else with the torch reference of the same names; host work and launches are part of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from . import timing
from .operations import Row, prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["eager", "compile", "ours"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "compile" and DEVICE == "cpu":
        pytest.skip("what Inductor makes for a CPU says nothing of a GPU")
    return request.param


@pytest.fixture(params=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["sd15", "sd3"])
def latent(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def measure(benchmark, implementation: str) -> Callable[..., None]:
    """Benchmark an operation on a batch, ours only if its results are right."""

    def run(operation: str, latent: str, dtype: str, *, batch: int = 8) -> None:
        row = Row(operation, latent, batch, dtype)
        if implementation == "ours":
            timing.verify(row, device=DEVICE)
        case = prepare(row, device=DEVICE)
        function = case.operation.ours if implementation == "ours" else case.operation.eager
        if implementation == "compile":
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False, fullgraph=True)

        def call() -> None:
            case.run(function)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        call()
        benchmark.group = f"{row}, {DEVICE}"
        benchmark(call)

    return run
