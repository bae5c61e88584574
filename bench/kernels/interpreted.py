"""Counts of our operations: their kernels really run, in Triton's interpreter, which is asked what they load and store.

Only lanes that a mask lets through count. As in the other counts, what a launch reads or writes more than once is
counted once (`bytes`); `requested_bytes` counts it each time, as if there were no caches. Operators of torch around the
kernels are counted as in eager mode. The samples of a batch are computed alike, so a few of them are enough for the
bytes per element; the results are checked on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from .checking import check
from .counting import Counter, answer, count_run
from .operations import Row, prepare

# the interpreter takes milliseconds for a block of 2048
ELEMENTS = 2**16


class KernelCounter(Counter):
    """Counts inside our operators too: the operators of torch that they run and, within ``watching``, their kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.inside_kernel = False
        self.requested = 0

    def take(self) -> dict[str, int]:
        counted = super().take() | {"requested_bytes": self.requested}
        self.requested = 0
        return counted

    def add(self, launches: int, size: int, requested: int | None = None) -> None:
        super().add(launches, size)
        self.requested += size if requested is None else requested

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside_kernel:  # the interpreter's own doings
            return function(*args, **(kwargs or {}))
        if function.namespace == "engine_kernels":
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


class Traffic:
    """The memory that a launch reads, or writes."""

    def __init__(self) -> None:
        self.requested = 0
        self.spans: list[np.ndarray] = []

    def add(self, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data].astype(np.int64)
        if not addresses.size:
            return
        self.requested += addresses.size * size
        addresses = np.unique(addresses)
        ends = np.flatnonzero(np.diff(addresses) > size)
        begins = np.concatenate([[0], ends + 1])
        ends = np.concatenate([ends, [addresses.size - 1]])
        self.spans.append(np.stack([addresses[begins], addresses[ends] + size], 1))

    def distinct(self) -> int:
        """Bytes of the union of all spans."""
        if not self.spans:
            return 0
        spans = np.concatenate(self.spans)
        begins, ends = spans[spans[:, 0].argsort()].T
        reached = np.maximum.accumulate(ends)
        before = np.concatenate([begins[:1], reached[:-1]])
        return int(np.maximum(reached - np.maximum(begins, before), 0).sum())


@contextmanager
def watching(counter: KernelCounter) -> Iterator[None]:
    """Count the kernels that the interpreter runs."""
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, grid.__call__
    loads, stores = Traffic(), Traffic()

    def watched_load(self, pointers, mask, *rest):
        loads.add(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        stores.add(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_call(self, *arguments, **keywords):
        nonlocal loads, stores
        loads, stores = Traffic(), Traffic()
        counter.inside_kernel = True
        try:
            call(self, *arguments, **keywords)
        finally:
            counter.inside_kernel = False
        counter.add(1, loads.distinct() + stores.distinct(), loads.requested + stores.requested)

    builder.create_masked_load, builder.create_masked_store, grid.__call__ = watched_load, watched_store, watched_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, grid.__call__ = load, store, call


def few(row: Row) -> Row:
    """The row with so many samples as are counted for it."""
    return row._replace(batch=min(row.batch, max(1, ELEMENTS // math.prod(row.sample))))


def count(row: Row) -> dict[str, Any]:
    """Counts of our operation, the batch that they were counted at, and how its check went."""
    case = prepare(row)
    counter = KernelCounter()
    with watching(counter):
        results, counts = count_run(counter, case, case.operation.ours)
    outcome = check(case, results)
    return counts | {"counted_batch": row.batch, "check": {"passed": outcome.passed, "outcome": str(outcome)}}


if __name__ == "__main__":
    answer(count)
