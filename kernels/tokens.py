"""What the transformer operators share: tokens (B, L, D), and vectors (B, D), one for all tokens of a sample.

The gradient of such a vector is a sum over the sample's tokens, in two stages without atomics: SPLIT programs a sample
leave partial sums (B, SPLIT, D) and one more launch adds them up. How tokens are shared among programs and in which
order they are added follows from L and D alone, so a sample's gradients have the same bits in any batch.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import check_batch, check_floats, refuse_float64

# A program holds one token in registers; backwards, with its sums, more of it would spill.
MAX_CHANNELS = 8192


def check_tokens(name: str, value: object) -> None:
    """Raise unless ``value`` is a floating tensor (B, L, D) with L >= 1 and 1 <= D <= MAX_CHANNELS."""
    check_batch(name, value)
    if value.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be (B, L, D), samples of tokens of channels")
    if value.shape[2] > MAX_CHANNELS:
        raise ValueError(
            f"{name} has {value.shape[2]} channels; a token must fit into registers, {MAX_CHANNELS} at most. "
            "Compose wider ones from torch's functions"
        )


def vector_of(name: str, value: object, tokens: Tensor) -> Tensor:
    """``value``, a floating tensor (B, D) or (B, 1, D) for ``tokens`` (B, L, D), as a view (B, D)."""
    check_floats(name, value)
    batch, _, d = tokens.shape
    if value.shape not in ((batch, d), (batch, 1, d)):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but x has {tuple(tokens.shape)}; "
            f"pass one vector a sample, ({batch}, {d}) or ({batch}, 1, {d})"
        )
    if value.device != tokens.device:
        raise ValueError(f"{name} is on {value.device}, but x on {tokens.device}; move them to one device")
    return value if value.dim() == 2 else value.squeeze(1)


def sum_tokens(values: Tensor) -> Tensor:
    """(B, L, D) -> (B, D), sample by sample: how torch shares one sum of all among threads depends on B."""
    totals = values.new_empty(values.shape[0], values.shape[2])
    for total, sample in zip(totals, values, strict=True):
        torch.sum(sample, 0, out=total)
    return totals


# ---- Triton


def readable(x: Tensor) -> Tensor:
    """``x`` (..., D) itself where kernels can read its rows in place, whatever lies between them; else one copy.

    Rows of a multiple of 16 channels are always read in vectors: were it a matter of their address, so would be the
    order in which a row is summed.
    """
    refuse_float64(x)
    aligned = x.shape[-1] % 16 or (x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:-1]))
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def row_tiling(d: int) -> tuple[int, int]:
    """Block and warps of a program that holds a row of d elements: 8 a thread, so that bf16 loads are 128 bits wide."""
    block = max(128, triton.next_power_of_2(d))
    return block, min(16, max(1, block // 256))


@functools.cache
def split_of(length: int) -> int:
    """Programs that share a sample of ``length`` tokens when these are summed: 16 tokens each, more in long samples."""
    return min(128, triton.next_power_of_2(triton.cdiv(length, 16)))


@functools.cache
def total_block(d: int, split: int) -> int:
    """Channels that a program of the second stage adds up, by TOTAL_WARPS warps."""
    return min(triton.next_power_of_2(d), 1024, 4096 // split)


TOTAL_WARPS = 4


@triton.jit
def token_total(p_partial, i_sample, d, o, m, SPLIT: tl.constexpr):
    """Totals of one sample at the channels ``o``, from partial sums (B, SPLIT, D)."""
    o_split = i_sample * SPLIT + tl.arange(0, SPLIT)
    return tl.sum(tl.load(p_partial + o_split[:, None] * d + o[None, :], mask=m[None, :], other=0.0), 0)
