"""Peak memory of a computation, from a run on fake tensors: shapes and lifetimes, no data.

Every storage that an operator returns is counted until nothing refers to it any more, autograd's saved tensors too.
Not seen: workspaces inside an operator (cuDNN's, cuBLAS's), but for attention's, and the gaps of an allocator.

PyTorch built without CUDA cannot run autograd on fake CUDA tensors, so the tensors are fake CPU tensors everywhere.
Attention then runs the CPU's flash operator, which keeps what the GPU's flash and memory-efficient ones keep: query,
key, value, output, and one number a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.models.denoiser import Call, Condition

ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Its second argument is the query. Below fp32 the gradients are summed in fp32 first, the query's on a GPU."""


@dataclass(frozen=True)
class Trace:
    """What a computation takes beside what stood before it.

    Attributes:
        moments: (bytes, elements of which the gradient was ready), those that no other exceeds in both; the gradients
            that are ready are not among the bytes.
        left: bytes that stand when it is over: its result.
    """

    moments: tuple[tuple[int, int], ...]
    left: int

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return max(size for size, _ in self.moments)


def trace(
    computation: Callable[[], object], *, given: Iterable[Tensor] = (), network: nn.Module | None = None
) -> Trace:
    """Run a computation under a FakeTensorMode and follow its storages.

    Args:
        computation: returns its result, which counts as alive at the end.
        given: tensors that stand before it, such as weights and inputs; they are not counted.
        network: whose gradients are dropped as soon as they are ready, as DeepSpeed's hooks take them over.
    """
    counter = _Storages(given if network is None else [*given, *network.parameters(), *network.buffers()])
    hooks = []
    if network is not None:

        def take_over(parameter: Tensor) -> None:
            parameter.grad = None
            counter.ready += parameter.numel()

        hooks = [p.register_post_accumulate_grad_hook(take_over) for p in network.parameters() if p.requires_grad]
    try:
        with counter:
            result = computation()
        left = counter.live
        del result
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(counter.front(), left)


class Repeated:
    """A denoiser's `call` that is run once for all passes of the same sizes that keep nothing for a gradient: the
    others allocate at once the most that the first one did, and its prediction.

    Args:
        call: as `engine.models.denoiser.Denoiser.call`, always of the same adapter.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self._known: dict[tuple[int, torch.Size], tuple[int, torch.dtype]] = {}

    def __call__(
        self, network: nn.Module, x: Tensor, timestep: Tensor, condition: Condition, guidance: float | None
    ) -> Tensor:
        if torch.is_grad_enabled():
            return self.call(network, x, timestep, condition, guidance)
        key = id(network), x.shape
        if key not in self._known:
            made: list[Tensor] = []
            given = [*network.parameters(), *network.buffers(), x, timestep, *condition.values()]
            found = trace(
                lambda: made.append(self.call(network, x, timestep, condition, guidance)) or made, given=given
            )
            self._known[key] = found.peak, made[0].dtype
            return made[0]
        most, dtype = self._known[key]
        torch.empty(most, dtype=torch.uint8)
        return torch.empty(x.shape, dtype=dtype)


class Undecided(TorchDispatchMode):
    """Lets code that looks at numbers run on tensors without any; inside a FakeTensorMode and outside of a trace.

    What is computed from real tensors alone, as samplers and their steps are, stays real. Where a fake tensor's numbers
    decide, which are random in a run, the largest result is taken: every element is chosen, and all are alike. A number
    that is asked for is 0.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        tensors = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return function(*arguments, **keywords)
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if arguments[0].is_floating_point() else 0
        if function is torch.ops.aten.nonzero.default:
            return torch.empty(arguments[0].numel(), arguments[0].dim(), dtype=torch.int64)
        if function is torch.ops.aten._unique2.default:
            return arguments[0].flatten()[:1], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        return function(*arguments, **keywords)


class _Storages(TorchDispatchMode):
    """Bytes of the storages that operators return inside, while anything refers to them."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.ready = 0
        self._known: dict[int, weakref.ref] = {}
        self._highest: dict[int, int] = {0: 0}
        for tensor in given:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage, self._forget(id(storage), 0))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage())
        live = self.live
        if function is ATTENTION_BACKWARD and arguments[1].element_size() < 4:
            live += 4 * arguments[1].numel()
        if live > self._highest.get(self.ready, -1):
            self._highest[self.ready] = live
        return result

    def front(self) -> tuple[tuple[int, int], ...]:
        """(bytes, ready elements) that no other moment exceeds in both, with the most ready elements first."""
        front, most = [], -1
        for ready, size in sorted(self._highest.items(), reverse=True):
            if size > most:
                front.append((size, ready))
                most = size
        return tuple(front)

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._known:
            self._known[key] = weakref.ref(storage, self._forget(key, storage.nbytes()))
            self.live += storage.nbytes()

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self._known[key]
            self.live -= size

        return forget
