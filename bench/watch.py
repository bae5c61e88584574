"""What happens inside the phases of a program: seconds, or operators, bytes, collectives and host reads.

A clock makes the device idle at every border of two phases, and a counter slows everything down, so an iteration is
watched by one of the two at a time.

A host read is a tensor on the device that Python needs a value of (`.item()`, `.tolist()`, `.cpu()`, `nonzero`, a mask
as index), so that the host waits for the device. On a CPU there is but one memory; there, what a GPU run would hold on
the device is told from what it would hold on the host: the tensors that `resident` names, those created with `device=`
or moved by `.to(device)` (which then really copies), and all that is computed from any of these.
"""

from __future__ import annotations

import sys
import time
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.kernels.counting import Counter, footprint
from bench.record import ROOT

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
MASKED = ("index", "index_put", "index_put_")
READING_METHODS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)
OURS = tuple(str(ROOT / folder) + "/" for folder in ("engine", "kernels", "models", "rl"))
DEEPSPEED = "/deepspeed/"


class Phases:
    """A stack of names; what is noted belongs to the innermost one.

    Args:
        changed: called with the phase that is left and the one that is entered.
    """

    def __init__(self, changed: Callable[[str, str], None] = lambda left, entered: None) -> None:
        self.stack = ["other"]
        self.changed = changed

    @property
    def current(self) -> str:
        return self.stack[-1]

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        self.changed(self.current, phase)
        self.stack.append(phase)
        yield
        left = self.stack.pop()
        self.changed(left, self.current)

    def rename(self, phase: str) -> None:
        """From here on, the innermost phase is another."""
        self.changed(self.current, phase)
        self.stack[-1] = phase


class Clock:
    """Seconds by phase, each phase without those inside it; called by `Phases` at each change.

    Args:
        synchronize: waits until the device is idle.
        now: the clock that is read.
    """

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        self.synchronize, self.now = synchronize, now
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.restart()

    def restart(self) -> None:
        self.synchronize()
        self.started = self.now()

    def __call__(self, left: str, entered: str) -> None:
        self.synchronize()
        now = self.now()
        self.seconds[left] += now - self.started
        self.started = now


class Watch(Counter):
    """Counts by phase what runs inside `with watch.on():`.

    An operator of `engine.kernels` counts as one, which on a GPU is one or two launches.

    Attributes:
        operators, bytes: phase -> operators that compute, and the bytes that they read and write, each operator's own.
        reads: (phase, place) -> host reads; the place is the innermost line of ours or of DeepSpeed's.
        uploads: phase -> tensors moved from the host to the device.
        collectives: (phase, name, payload in bytes) -> calls; the payload is of the whole, unpartitioned tensor.
    """

    def __init__(self, phases: Phases, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.phases = phases
        self.operators: Tally[str] = Tally()
        self.bytes_by_phase: Tally[str] = Tally()
        self.reads: Tally[tuple[str, str]] = Tally()
        self.uploads: Tally[str] = Tally()
        self.collectives: Tally[tuple[str, str, int]] = Tally()
        for tensor in resident:
            _mark(tensor)

    @contextmanager
    def on(self) -> Iterator[None]:
        with _Sides(self), self:
            yield

    def add(self, launches: int, size: int) -> None:
        self.operators[self.phases.current] += launches
        self.bytes_by_phase[self.phases.current] += size

    def read(self) -> None:
        self.reads[self.phases.current, _place()] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        device = [tensor for tensor in given if on_device(tensor)]
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            whole = args[1] if name.startswith(("reduce_scatter", "_reduce_scatter")) else args[0]
            payload = sum(map(footprint, _tensors(whole)))
            self.collectives[self.phases.current, name.strip("_"), payload] += 1
            return function(*args, **(kwargs or {}))
        if device and (name in READS or (name in MASKED and _is_masked(args[1])) or _leaves_device(name, kwargs)):
            self.read()
        results = super().__torch_dispatch__(function, types, args, kwargs)
        made = _tensors(results)
        if function._schema.is_mutable and not made:  # in place on lists of tensors: _foreach_add_, _fused_adamw_
            self.add(1, sum(map(footprint, given)) + sum(map(footprint, _tensors(args[0]))))
        if device and not _leaves_device(name, kwargs):
            for tensor in made:
                _mark(tensor)
        return results


class _Sides(TorchFunctionMode):
    """Keeps what a GPU run would hold on the host and on the device apart, on a machine with one memory."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if function in READING_METHODS and on_device(source) and source.device.type == "cpu":
            self.watch.read()
            result = function(*args, **kwargs)
            # .cpu() of a CPU tensor is the tensor itself, which would stay marked.
            return result.clone() if isinstance(result, Tensor) else result
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if function is Tensor.to:
            moves = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != "copy"})[0] is not None
            if moves and not on_device(source):
                self.watch.uploads[self.watch.phases.current] += 1
                result = result.clone() if _same_memory(result, source) else result
                _mark(result)
        elif kwargs.get("device") is not None:
            _mark(result)
        return result


def on_device(tensor: Tensor) -> bool:
    """Whether a run on a GPU holds the tensor there."""
    return tensor.device.type != "cpu" or getattr(tensor.untyped_storage(), "on_device", False)


def _mark(tensor: Tensor) -> None:
    tensor.untyped_storage().on_device = True


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _is_masked(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _leaves_device(name: str, kwargs: Any) -> bool:
    """A real copy from a GPU to the host."""
    device = (kwargs or {}).get("device")
    return name == "_to_copy" and device is not None and device.type == "cpu" and torch.cuda.is_available()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        if DEEPSPEED in path:
            return f"deepspeed/{path.rpartition(DEEPSPEED)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
