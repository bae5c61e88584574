"""What DeepSpeed keeps of the trained weights: parameters, gradients and optimizer states, to the byte.

Followed through DeepSpeed 0.19's sources (runtime/zero/stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py), torch's
AdamW and bitsandbytes' optimizers; tests/engine/test_plan_states.py holds every figure against real allocations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL = 4  # bytes of an fp32 element
BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit states
SMALL = 4096  # bitsandbytes keeps fp32 states for tensors with fewer elements
PAGED_FROM = 100_000  # elements from which bitsandbytes' paged states lie in managed memory
CODES = 1024  # bytes of a table that maps 8 bits to values
ALLREDUCE = 500_000_000  # elements that stage 0 reduces at a time (runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE)
KINDS = {"adamw": 2, "adamw8bit": 2, "paged_adamw8bit": 2, "lion": 1, "lion8bit": 1, "paged_lion8bit": 1}
"""optimizer.kind -> states of an element."""


@dataclass(frozen=True)
class Trained:
    """What the figures depend on.

    Attributes:
        trainable: elements of each trainable parameter, in the network's order.
        frozen: elements of each frozen parameter that DeepSpeed holds beside them; stage 3 partitions them too.
        weight_bytes: of an element of both: 4 (fp32) or 2.
        optimizer: optimizer.kind.
        zero: DeepSpeed's `zero_optimization`.
        master_bytes: of an element of the optimizer's own weights and gradients, where weight_bytes is 2.
        ranks: processes.
        accumulation: micro-batches per optimizer step.
    """

    trainable: Sequence[int]
    frozen: Sequence[int]
    weight_bytes: int
    optimizer: str
    zero: Mapping[str, Any]
    master_bytes: int = FULL
    ranks: int = 1
    accumulation: int = 1


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients and of the buckets that they are reduced in, during a backward pass.

    Attributes:
        standing: from the start: of earlier micro-batches, and buckets.
        growing: for each element whose gradient is ready.
        late: that are allocated together, once the first bucket is full.
        late_from: elements that fill it.
    """

    standing: int
    growing: int = 0
    late: int = 0
    late_from: int = 0

    def at(self, ready: int) -> int:
        """Bytes when the gradients of so many elements are ready."""
        return self.standing + self.growing * ready + (self.late if ready >= self.late_from else 0)


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, of the rank that needs most.

    Attributes:
        parameters: of the network, between optimizer steps.
        optimizer: master weights and states, from the first optimizer step on.
        gradients: that stand when a backward pass is over, the last one before a step included.
        kept: of the gradients, what stands at all times: stage 3's buffers.
        gathered: stage 3: the most that parameters of other ranks take during a pass; an upper bound.
        host: in host memory: what is offloaded, and paged states.
        backward: gradients while activations are still there.
        reduced: bytes of gradients and buckets at most, once the activations are gone.
        step: bytes of gradients and temporary tensors of the optimizer step.
    """

    parameters: int
    optimizer: int
    gradients: int
    kept: int
    gathered: int
    host: int
    backward: Gradients
    reduced: int
    step: int


def states(trained: Trained) -> States:
    """Bytes of parameters, gradients and optimizer states on one GPU."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(**trained.zero)
    stage = int(zero.stage)
    if not trained.trainable:
        return _frozen_alone(trained)
    return {0: _whole, 1: _flat, 2: _flat, 3: _partitioned}[stage](trained, zero)


def _frozen_alone(trained: Trained) -> States:
    return States(sum(trained.frozen) * trained.weight_bytes, 0, 0, 0, 0, 0, Gradients(0), 0, 0)


# ---------------------------------------------------------------------- the optimizer


def state_bytes(kind: str, tensors: Sequence[int], master_bytes: int = FULL) -> tuple[int, int]:
    """(resident, paged) bytes of an optimizer's states over tensors of these numbers of elements.

    torch's step counters are left out: they lie in host memory.
    """
    count = KINDS[kind]
    if kind in ("adamw", "lion"):  # torch's states are of the weights' type, bitsandbytes' full ones in fp32
        return (master_bytes if kind == "adamw" else FULL) * count * sum(tensors), 0
    resident = paged = 0
    for numel in tensors:
        quantized = numel >= SMALL
        size = count * numel * (1 if quantized else FULL)
        if kind.startswith("paged") and numel >= PAGED_FROM:
            paged += size
        else:
            resident += size
        resident += quantized * count * math.ceil(numel / BLOCK) * FULL
    if any(numel >= SMALL for numel in tensors):
        resident += 2 * CODES
    return resident, paged


def _temporary(kind: str, numel: int, master_bytes: int = FULL) -> int:
    """Bytes that a step over `numel` elements at once allocates on a GPU: torch's AdamW takes the root of the second
    state of all tensors together, bitsandbytes' kernels work in place."""
    return master_bytes * numel if kind == "adamw" else 0


# ---------------------------------------------------------------------- stage 0


def _whole(trained: Trained, zero: Any) -> States:
    weight, low = trained.weight_bytes, trained.weight_bytes < FULL
    count = sum(trained.trainable)
    resident, paged = state_bytes(trained.optimizer, trained.trainable)
    gradients = count * weight
    step = gradients + (FULL * count if low else 0) + _temporary(trained.optimizer, count)
    return States(
        parameters=(count + sum(trained.frozen)) * weight,
        optimizer=(FULL * count if low else 0) + resident,
        gradients=gradients,
        kept=0,
        gathered=0,
        host=paged,
        backward=Gradients(gradients) if trained.accumulation > 1 else Gradients(0, growing=weight),
        reduced=gradients + _first_fill(trained.trainable, ALLREDUCE) * weight,
        step=step,
    )


def _first_fill(tensors: Sequence[int], bucket: int) -> int:
    """Elements of the tensors that fit a bucket one after the other."""
    return max((end for end in itertools.accumulate(tensors) if end <= bucket), default=min(bucket, sum(tensors)))


# ---------------------------------------------------------------------- stages 1 and 2


def _flat(trained: Trained, zero: Any) -> States:
    """All trainable parameters lie in one buffer, padded to 2 * ranks elements and cut into equal parts, one a rank."""
    weight, offloaded, stage = trained.weight_bytes, zero.offload_optimizer is not None, int(zero.stage)
    count = sum(trained.trainable)
    padded = math.ceil(count / (2 * trained.ranks)) * 2 * trained.ranks
    part = padded // trained.ranks
    owned, missing = _owned(trained.trainable, part, trained.ranks)
    resident, paged = state_bytes(trained.optimizer, [part], trained.master_bytes)
    master = part * trained.master_bytes
    bucket = int(zero.reduce_bucket_size) * weight * (2 if zero.overlap_comm else 1)
    largest = max(trained.trainable)
    own = owned * weight  # gradients of the parameters that a rank updates, in one buffer
    final, held, late = own + missing * weight, own if trained.accumulation > 1 else 0, own
    if offloaded:
        final = held = late = 0
    whole = count * weight
    if stage == 1:
        several = trained.accumulation > 1
        backward = Gradients(whole + bucket) if several else Gradients(bucket, growing=weight)
        fill = _first_fill(trained.trainable, int(zero.reduce_bucket_size)) * weight
        reduced = bucket + max(whole, whole - fill + late)
        gradients = max(final, whole + bucket if several else 0)
    else:
        backward = Gradients(held + bucket, late=late, late_from=min(int(zero.reduce_bucket_size), count))
        reduced = held + late + bucket
        gradients = final
    host = paged
    optimizer = master + resident
    step = 0
    if offloaded:
        # fp32 gradients too, those of earlier micro-batches, and buffers for copies: of the part's weights, and of the
        # largest gradient on either side
        host += optimizer + part * trained.master_bytes + part * weight + largest * weight
        host += own if stage == 2 and trained.accumulation > 1 else 0
        optimizer = largest * weight
    else:
        cast = part * trained.master_bytes if weight != trained.master_bytes else 0
        flatten = final + part * weight + cast
        step = max(flatten, part * trained.master_bytes + _temporary(trained.optimizer, part, trained.master_bytes))
    return States(
        parameters=(padded + sum(trained.frozen)) * weight,
        optimizer=optimizer,
        gradients=gradients,
        kept=0,
        gathered=0,
        host=host,
        backward=backward,
        reduced=reduced,
        step=step,
    )


def _owned(tensors: Sequence[int], part: int, ranks: int) -> tuple[int, int]:
    """Elements of the parameters that touch a rank's part, whole, and of the part that no parameter fills: of the rank
    where the sum is largest."""
    ends = list(itertools.accumulate(tensors))
    best = (0, 0)
    for rank in range(ranks):
        start, stop = rank * part, (rank + 1) * part
        touching = sum(n for n, end in zip(tensors, ends, strict=True) if end > start and end - n < stop)
        best = max(best, (touching, max(0, stop - max(start, ends[-1]))), key=sum)
    return best


# ---------------------------------------------------------------------- stage 3


def _partitioned(trained: Trained, zero: Any) -> States:
    """Every parameter is cut into equal parts, one a rank, and gathered where it is used."""
    weight, ranks = trained.weight_bytes, trained.ranks
    parts = [math.ceil(numel / ranks) for numel in trained.trainable]
    frozen = [math.ceil(numel / ranks) for numel in trained.frozen]
    offloaded, away = zero.offload_optimizer is not None, zero.offload_param is not None
    groups = _sub_groups(parts, int(zero.sub_group_size))
    resident, paged = state_bytes(trained.optimizer, groups, trained.master_bytes)
    count = sum(parts)
    optimizer, gradients = trained.master_bytes * count + resident, count * weight
    bucket = int(zero.reduce_bucket_size)
    everything = [*trained.trainable, *trained.frozen]
    # gathered once and kept: parameters of few elements
    kept = [n for n in everything if n <= zero.param_persistence_threshold] if ranks > 1 or away else []
    persistent = sum(math.ceil(numel / ranks) * ranks for numel in kept) * weight
    others = sum(everything) - sum(kept) if ranks > 1 or away else 0
    parameters = sum(parts + frozen) * weight
    host = paged
    largest = max(groups)
    step = largest * (weight + trained.master_bytes) + _temporary(trained.optimizer, largest, trained.master_bytes)
    if offloaded:
        host += optimizer + gradients + trained.master_bytes * count
        optimizer, gradients, step = 0, 0, 0
    if away:
        host, parameters = host + parameters, 0
    # a full bucket is copied to be scattered, and a rank's share comes back
    fill = min(bucket, sum(trained.trainable))
    standing, scattered = gradients + bucket * weight, (fill + fill // ranks) * weight
    return States(
        parameters=parameters + persistent,
        optimizer=optimizer,
        gradients=standing,
        kept=standing,
        gathered=min(others, int(zero.max_live_parameters)) * weight,
        host=host,
        backward=Gradients(standing, late=scattered, late_from=fill),
        reduced=standing + scattered,
        step=standing + step,
    )


def _sub_groups(parts: Sequence[int], most: int) -> list[int]:
    """Elements of the groups of parameters that are stepped one after the other; one group where all fit."""
    groups, current = [], 0
    for numel in parts:
        current += numel
        if current >= most:
            groups.append(current)
            current = 0
    return [*groups, current] if current else groups
