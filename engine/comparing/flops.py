"""Floating-point operations as they are executed, forward and backward, by any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **more: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **more: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


_COUNTS = {
    **flop_registry,
    # PyTorch's own counter leaves out the attention of CPUs.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention that run inside `with counter:`.

    It counts by the table of `torch.utils.flop_counter`, two operations a multiplication with addition, and costs less
    time than `FlopCounterMode`, which also tells modules apart. Operations between elements count as none. Other
    threads are not seen.

    Attributes:
        total: operations so far, of all times that it was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        count = _COUNTS.get(function._overloadpacket)
        if count is not None:
            self.total += int(count(*args, **kwargs, out_val=out))
        return out
