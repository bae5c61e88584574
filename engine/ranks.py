"""The processes of a run: start-up, who am I, and the few collectives that the trainer needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_imagined: int | None = None


def start(threads: int | None) -> None:
    """Join the process group of the launcher, or become a group of one; set the CPU threads of this rank.

    Args:
        threads: of this rank; None: the cores of the machine over its ranks. More threads than cores cost ten times
            their gain, because each parallel region waits for its slowest thread.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = get_accelerator().communication_backend_name()
    with _without("LOCAL_SIZE"):
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def stop() -> None:
    """Leave the process group at the end of a process. Left to the interpreter's exit, a thread of gloo sometimes
    aborts it ("terminate called without an active exception"), and a finished run would be told as a failed one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def imagined(count: int) -> Iterator[None]:
    """Inside, this process is the first of `count` ranks on the CPU that never meet, in a process group or without one:
    what plans a run of so many ranks."""
    global _imagined
    before, _imagined = _imagined, count
    try:
        yield
    finally:
        _imagined = before


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if _imagined:
        return torch.device("cpu")
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.device(name, int(os.environ["LOCAL_RANK"])) if name != "cpu" else torch.device("cpu")


def synchronize() -> None:
    """Wait until this rank's device is idle, so that a clock read next is right."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def rank() -> int:
    return 0 if _imagined else torch.distributed.get_rank()


def world_size() -> int:
    return _imagined or torch.distributed.get_world_size()


def is_first() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def broadcast(value: Any) -> Any:
    """A picklable value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks (sum of rows, ...), in the order of ranks, on every rank. Row counts may differ. Imagined ranks
    have their own rows alone."""
    if world_size() == 1 or _imagined:
        return tensor
    parts: list[Tensor] = [None] * world_size()  # type: ignore[list-item]
    torch.distributed.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts).to(tensor.device)


def share(count: int) -> slice:
    """This rank's contiguous part of `count` items: equal sizes where they divide, else sizes that differ by one."""
    bounds = [count * r // world_size() for r in (rank(), rank() + 1)]
    return slice(*bounds)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Inside, the environment lacks a variable. With the launcher's LOCAL_SIZE, DeepSpeed on CPUs gives each rank
    66 MiB of shared memory for its inference, which training never calls, and leaves it there when the process ends."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
