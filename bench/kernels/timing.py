"""Speed and peak memory on a GPU, in three states.

- cold: the device's own time with the inputs in its memory. Launches are replayed from a CUDA graph, and calls go round
  sets of inputs of together three times the L2 cache. What one launch leaves for the next may be cached, as in use.
- warm: the same graph over one set of inputs, which the L2 cache serves as far as they fit into it.
- launched: one call from Python at a time, host work included, after a write of the size of the L2 cache or more.

Every shape runs before it is timed. Figures are medians, in microseconds.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton

from .checking import WrongResult, check
from .operations import OPERATIONS, Row, prepare

GRAPH_US = 2000  # length of a graph: beside it, the start of a replay is short
MEASURE_MS = 50
# an operation on less than L2 / SETS cannot be timed cold: it would take more sets than are worth preparing
SETS = 512
CHECKED_ELEMENTS = 2**24  # float64 truths need some 30 tensors of 8 bytes an element


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy far beyond the caches: the ceiling that a kernel can reach."""
    size = min(2**30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), warmup=200, rep=200, return_mode="median")
    return 2 * size / (milliseconds * 1e-3)


def measure(row: Row) -> dict[str, Any]:
    """For each of eager, compile and ours: its ``speed``, or {"not measured": reason}."""
    operation = OPERATIONS[row.operation]
    torch._dynamo.reset()  # a shape compiled anew counts against a limit, beyond which it would run uncompiled
    implementations = {
        "eager": operation.eager,
        "compile": torch.compile(operation.eager, dynamic=False, fullgraph=True),
        "ours": operation.ours,
    }
    figures: dict[str, Any] = {}
    for name, function in implementations.items():
        try:
            if name == "ours":
                verify(row, device="cuda")
            figures[name] = speed(row, function)
        except WrongResult as wrong:
            figures[name] = {"refused": f"wrong results: {wrong}"}
        except torch.OutOfMemoryError:
            figures[name] = {"not measured": "it does not fit into the memory"}
        except Exception as error:  # one row must not take the others with it
            figures[name] = {"not measured": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        release_memory()
    return figures


def verify(row: Row, *, device: str) -> None:
    """Raise ``WrongResult`` unless our operation passes its check, on so many samples of the row as fit the truth."""
    batch = min(row.batch, max(1, CHECKED_ELEMENTS // math.prod(row.sample)))
    case = prepare(row, batch=batch, device=device, seed=1)
    outcome = check(case, case.run(case.operation.ours))
    if not outcome.passed:
        raise WrongResult(str(outcome))


def speed(row: Row, function: Callable[..., Any]) -> dict[str, Any]:
    """Medians of a row's time in the three states, [20 %, 80 %] quantiles, and peak memory beyond the inputs."""
    case = prepare(row, device="cuda")
    call = functools.partial(case.run, function)
    call()  # compiles
    figures: dict[str, Any] = {"peak_bytes": peak_memory(call)}
    quantiles = triton.testing.do_bench(call, warmup=25, rep=MEASURE_MS, quantiles=[0.5, 0.2, 0.8])
    figures["launched_us"], *spread = (1000 * value for value in quantiles)
    figures["launched_spread_us"] = spread
    warm = functools.partial(graph_time, needed=figures["peak_bytes"])
    estimate, _ = warm([call] * 10)
    calls = math.ceil(min(500, max(1, GRAPH_US / estimate)))
    figures["warm_us"], figures["warm_spread_us"] = warm([call] * calls)
    sets = math.ceil(3 * torch.cuda.get_device_properties().L2_cache_size / case.size)
    if sets > SETS:
        figures["cold_us"] = None
        return figures
    others = [prepare(row, device="cuda", seed=seed) for seed in range(1, sets)]
    cycle = [call, *(functools.partial(other.run, function) for other in others)]
    cold = cycle * math.ceil(calls / sets)
    figures["cold_us"], figures["cold_spread_us"] = graph_time(cold, needed=figures["peak_bytes"])
    return figures


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes that a call holds beyond what is allocated before it, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def graph_time(calls: list[Callable[[], Any]], *, needed: int) -> tuple[float, list[float]]:
    """Microseconds a call, median and [20 %, 80 %] quantiles, of one CUDA graph of all ``calls``.

    ``needed``: bytes that a call allocates.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a graph's memory is its own
    if torch.cuda.mem_get_info()[0] < 1.1 * needed:
        raise torch.OutOfMemoryError("a capture would run out of memory, and say so unclearly")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    replay_ms = _replay(graph)
    times = [_replay(graph) for _ in range(max(10, int(MEASURE_MS / replay_ms)))]
    low, *_, high = statistics.quantiles(times, n=5)
    median, low, high = (1000 * value / len(calls) for value in (statistics.median(times), low, high))
    return median, [low, high]


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def release_memory() -> None:
    """Give back what a measurement held, so that the next one starts like it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
