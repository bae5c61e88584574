"""What can be counted without a GPU: launches, and the bytes that they read and write.

- eager: every aten operator of a CPU run is one launch, which reads its tensor inputs and writes its tensor outputs;
  views and allocations are free. Nothing is computed (the tensors are fake), so any size can be counted. A lower bound:
  a few operators take two launches on a GPU.
- compile: see `inductor.py`.   - ours: see `interpreted.py`.

In all three, what a launch reads more than once is counted once, and what two launches read is counted twice: caches
serve the one, and seldom the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .operations import Case, Row, prepare

ROOT = Path(__file__).parents[2]
# what leaves memory as it is
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# what writes its first argument without reading it
OVERWRITES = ("fill_", "zero_", "copy_", "uniform_", "normal_")


class Counter(TorchDispatchMode):
    """Counts launches and bytes of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def add(self, launches: int, size: int) -> None:
        self.launches += launches
        self.bytes += size

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted = {"launches": self.launches, "bytes": self.bytes}
        self.launches = self.bytes = 0
        return counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        mutates = function._schema.is_mutable
        is_view = not mutates and any(_shares_memory(one, other) for one in made for other in given)
        if made and not is_view and name not in ALLOCATIONS:
            if name.startswith("new_") or name.endswith("_like"):
                given = []  # only their shapes are read
            elif name in OVERWRITES:
                given = given[1:]
            self.add(1, sum(map(footprint, (*given, *made))))
        return results


def footprint(tensor: Tensor) -> int:
    """Bytes of memory behind the elements of ``tensor``; an expanded dimension has none of its own."""
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * tensor.element_size()


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def count_run(counter: Counter, case: Case, function: Callable[..., tuple[Tensor, ...]]) -> tuple[tuple, dict]:
    """Run ``function``; its results and gradients, and counts of its passes."""
    with counter:
        results = case.forward(function)
    counts = {"forward": counter.take()}
    with counter:
        gradients = case.backward(results)
    if gradients:
        counts["backward"] = counter.take()
    return (*results, *gradients), counts


def count_eager(row: Row) -> dict[str, Any]:
    """Counts of the eager formula, by pass."""
    with FakeTensorMode():
        case = prepare(row)
        return count_run(Counter(), case, case.operation.eager)[1]


def count_elsewhere(module: str, rows: Sequence[Row], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Counts of ``rows`` in order, by processes of ``python -m bench.kernels.<module>``, which start at once.

    {"not counted": reason} for a row that could not be counted.
    """
    processes = min(8, os.cpu_count() or 1, len(rows))
    parts = [rows[i::processes] for i in range(processes)]
    answers = [_answers(_start(module, part, environment), part) for part in parts]
    return (next(answers[i % processes]) for i in range(len(rows)))


def _start(module: str, rows: Sequence[Row], environment: dict[str, str]) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-m", f"bench.kernels.{module}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that is dead already is noticed below
        json.dump(rows, child.stdin)
    return child


def _answers(child: subprocess.Popen, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    with child:
        for _ in rows:
            line = child.stdout.readline()
            if line:
                yield json.loads(line)
            else:
                yield {"not counted": f"the counting process ended with exit status {child.wait()}"}


def answer(count: Callable[[Row], dict[str, Any]]) -> None:
    """The other end of ``count_elsewhere``: read rows, write a line of JSON for each."""
    for row in json.load(sys.stdin):
        row = Row(*row)
        try:
            counts = count(row)
        except Exception as error:  # internals of torch and Triton are read, which any release may change
            reason = " ".join(str(error).split())[:200]
            counts = {"not counted": f"{type(error).__name__} with torch {torch.__version__}: {reason}"}
        print(json.dumps(counts), flush=True)
