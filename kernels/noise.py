"""Standard normal noise from counters: an element's value is a function of its address, not of who drew before it.

The bits are Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11): the key is a
sample's seed, the counter (element // 4, 0, offset, offset >> 32). The four words of a counter are two pairs, each made
two normals by Box & Muller 1958 with the sine and cosine of an angle that is drawn in quarter turns, which spares the
slow path of the library's functions: it would need memory of its own for every thread. Largest value: 6.66.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
# Taylor's, for angles up to pi/4, where what they leave out is below 3e-9 (sine) and 3e-8 (cosine)
_SINE = tuple((-1) ** (i // 2) / math.factorial(i) for i in (1, 3, 5, 7, 9))
_COSINE = tuple((-1) ** (i // 2) / math.factorial(i) for i in (0, 2, 4, 6, 8))


class Noise(NamedTuple):
    """Noise of a batch: ``given``, or drawn from seeds and offsets."""

    given: Tensor | None
    seed: Tensor | None
    """(B,) int64, or () for all samples"""
    offset: Tensor | None
    """(B,) int64, or (): sample i draws from offset + i"""


def standard_normal_reference(seed: Tensor, offset: Tensor, rows: int, n: int) -> Tensor:
    """(rows, n) float32, see ``Noise`` for seed and offset."""
    if offset.dim() == 0:
        offset = offset + torch.arange(rows, device=offset.device)
    element = torch.arange(-(-n // 4), device=seed.device)
    seed, offset = seed.expand(rows).unsqueeze(1), offset.unsqueeze(1)
    words = philox(element & _WORD, element >> 32, offset & _WORD, offset >> 32 & _WORD, seed)
    pairs = [value for i in (0, 2) for value in _box_muller(*words[i : i + 2])]
    return torch.stack(pairs, -1).flatten(1)[:, :n]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of counters (words in int64 tensors that broadcast) and a 64-bit key."""
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        # products wrap in int64, which leaves both of their words right
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = second >> 32 & _WORD ^ c1 ^ k0, first >> 32 & _WORD ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def _box_muller(word: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    radius = word.float().add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = ((turn & 0x3FFFFFFF) - 0x20000000).float().mul_(2.0 * math.pi / 2.0**32)
    square = angle * angle
    sine, cosine = (_polynomial(square, terms) for terms in (_SINE, _COSINE))
    sine = sine.mul_(angle).mul_(radius)
    cosine = cosine.mul_(radius) * torch.where(turn >> 31 == 1, -1.0, 1.0)
    swap = turn >> 30 & 1 == 1
    return torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)


def _polynomial(x: Tensor, terms: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, terms[-1])
    for term in terms[-2::-1]:
        value = value.mul_(x).add_(term)
    return value


# ---- Triton

_S1, _S3, _S5, _S7, _S9 = map(tl.constexpr, _SINE)
_C0, _C2, _C4, _C6, _C8 = map(tl.constexpr, _COSINE)
_RADIANS = tl.constexpr(2.0 * math.pi / 2.0**32)


@triton.jit
def standard_normal(seed, offset, start, SIZE: tl.constexpr):
    """Elements start ... start + SIZE - 1 of a sample, fp32. Seed and offset: int64; start and SIZE: multiples of 4."""
    element = (start // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    none = element * 0
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32 & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, element, none, none + low, none + high)
    n0, n1 = _normals(w0, w1)
    n2, n3 = _normals(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [SIZE])


@triton.jit
def _normals(word, turn):
    radius = tl.sqrt(tl.log((word.to(tl.float32) + 1.0) * (1.0 / 4294967296.0)) * -2.0)
    angle = ((turn & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * _RADIANS
    square = angle * angle
    sine = ((((_S9 * square + _S7) * square + _S5) * square + _S3) * square + _S1) * angle * radius
    cosine = ((((_C8 * square + _C6) * square + _C4) * square + _C2) * square + _C0) * radius
    cosine = tl.where(turn >> 31 == 1, -cosine, cosine)
    swap = (turn >> 30 & 1) == 1
    return tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
