"""Counts of `torch.compile`: the CUDA code that Inductor generates for the eager formula, generated without a GPU.

The formula is traced on fake CPU tensors, whose graphs (Inductor's own passes over them done) are moved to fake CUDA
tensors before they are lowered; the device that Inductor asks about is described here. Launches are the calls in the
generated code, bytes Inductor's own count of what its kernels read and write.

All of this leans on internals of torch, which is why it has a process of its own and may fail without harm.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import _prims
from torch._dynamo import device_interface
from torch._functorch import config as aot_config
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, inductor_prims
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.utils import _triton

from .counting import answer
from .operations import Row, prepare

CUDA = torch.device("cuda", 0)
# of an H200, where reductions are split over its processors
DEVICE = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)
LAUNCH = re.compile(r"^ +(?:\w+ = )?(?:\w+\.run|extern_kernels\.\w+|(?:torch\.ops\.)?aten\.[\w.]+)\(", re.MULTILINE)


class Hopper(device_interface.CudaInterface):
    """What Inductor may ask about ``DEVICE``."""

    get_device_properties = staticmethod(lambda *_: DEVICE)
    get_compute_capability = staticmethod(lambda *_: 10 * DEVICE.major + DEVICE.minor)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda *_, **__: True)
    current_device = staticmethod(lambda: CUDA.index)

    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda *_: DEVICE)
        current_device = staticmethod(lambda: CUDA.index)


def pretend() -> None:
    """Let Inductor believe in ``DEVICE``, for the rest of this process."""
    list(device_interface.get_registered_device_interfaces())  # registers the real ones, which would replace ours later
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Hopper)
    torch.cuda.get_device_capability = lambda *_: (DEVICE.major, DEVICE.minor)
    inductor_prims.lookup_seed.prim_meta_impl = lambda seeds, index: _prims.TensorMeta(seeds.select(0, index))
    _triton.triton_hash_with_backend = lambda: "no driver"  # part of a cache key


class _Generated(Exception):
    """The code is there; nothing is run."""


def count(row: Row) -> dict[str, Any]:
    """Counts of the compiled formula."""
    torch._dynamo.reset()
    counts: dict[str, Any] = {}

    def generate(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        launches = len(LAUNCH.findall(code.value))
        size, *_ = graph.count_bytes()
        counts["backward" if graph.is_backward else "forward"] = {"launches": launches, "bytes": int(size)}

        def call(_: Any) -> None:
            raise _Generated

        return SimpleNamespace(call=call, __file__=None)

    with FakeTensorMode():
        case = prepare(row)
    compiled = torch.compile(case.operation.eager, backend=_compile, dynamic=False, fullgraph=True)
    original, GraphLowering.compile_to_module = GraphLowering.compile_to_module, generate
    try:
        with (
            aot_config.patch(force_non_lazy_backward_lowering=True),
            inductor_config.patch(fx_graph_cache=False, compile_threads=1),
        ):
            case.forward(compiled)
    except _Generated:
        pass
    finally:
        GraphLowering.compile_to_module = original
    if len(counts) != 1 + bool(case.operation.gradients):
        raise RuntimeError(f"Inductor generated only {list(counts)}")
    return counts


def _compile(graph: Any, inputs: Any) -> Any:
    return compile_fx.compile_fx(graph, inputs, inner_compile=_lower_on_cuda)


def _lower_on_cuda(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
    mode = detect_fake_mode(inputs)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return CUDA
        if isinstance(value, torch.Tensor):
            with mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        return value

    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
    return compile_fx.compile_fx_inner(graph, [moved(value) for value in inputs], **options)


if __name__ == "__main__":
    pretend()
    answer(count)
