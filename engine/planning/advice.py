"""What would make a run fit: changes of the configuration, cheapest in speed first, each planned before it is said.

How much a change slows an iteration down is an estimate from what it computes or moves more; it orders the advice and
is not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import Config, load_config
from engine.conflicts import conflicts
from engine.errors import EngineError
from engine.planning.phases import ACTIVATIONS, ENCODERS, GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, SAMPLES, Memory

SMALL_BUCKET = 20_000_000
"""Elements of a small reduce bucket: 40 MB in bf16, where DeepSpeed's own default takes 1 GB."""

LARGEST = 16
"""Rows of a pass beyond which a GPU gains little by more."""

CHAINS = ("regression", "draft", "vardiu")
"""Objectives whose gradients pass through several steps of the student."""

Overrides = dict[str, Any]
"""Dotted key -> value."""

Planned = Callable[[Config], Memory]
"""A configuration's memory on one GPU."""


@dataclass(frozen=True)
class Switch:
    """A change that saves memory.

    Attributes:
        name: what it is.
        slowdown: estimated time of an iteration over that without it.
        overrides: of a configuration and a number of ranks; None: it has nothing to change there.
        lowers: kinds of memory that it can lower.
        size: the key that is lowered, of those that can be lowered by halves.
        loses: what is given up beside speed; empty: nothing.
    """

    name: str
    slowdown: float
    overrides: Callable[[Config, int], Overrides | None]
    lowers: tuple[str, ...]
    size: str | None = None
    loses: str = ""


@dataclass(frozen=True)
class Advice:
    """Changes that together make a run fit.

    Attributes:
        switches: their names.
        overrides: as written on the command line.
        peak: bytes with them, planned.
        slowdown: estimated time of an iteration over that without them.
        loses: what is given up beside speed.
    """

    switches: tuple[str, ...]
    overrides: tuple[str, ...]
    peak: int
    slowdown: float
    loses: tuple[str, ...]


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _set(key: str, value: Any, *, unless: Callable[[Config], bool]) -> Callable[[Config, int], Overrides | None]:
    return lambda config, ranks: None if unless(config) else {key: value}


def _lowered(key: str) -> Callable[[Config, int], Overrides | None]:
    return lambda config, ranks: None if _value(config, key) == 1 else {key: 1}


def _low_precision(config: Config, ranks: int) -> Overrides | None:
    wanted: Overrides = {"precision": "bf16"} if config.precision == "fp32" else {}
    if config.teacher.precision == "fp32":
        wanted["teacher.precision"] = "bf16"
    return wanted or None


def _small_buckets(config: Config, ranks: int) -> Overrides | None:
    own = config.zero.deepspeed.get("zero_optimization", {})
    if config.zero.stage == 0 or own.get("reduce_bucket_size", 5e8) <= SMALL_BUCKET:
        return None
    return _zero_settings(config, {"reduce_bucket_size": SMALL_BUCKET})


def _zero_settings(config: Config, settings: Mapping[str, Any]) -> Overrides:
    extra = config.zero.deepspeed
    return {"zero.deepspeed": {**extra, "zero_optimization": {**extra.get("zero_optimization", {}), **settings}}}


def _stage(config: Config, ranks: int, stage: int) -> Overrides | None:
    if ranks == 1 or config.zero.stage >= stage:
        return None
    return {"zero.stage": stage, **_zero_settings(config, {"reduce_bucket_size": SMALL_BUCKET})}


def _offload_optimizer(config: Config, ranks: int) -> Overrides | None:
    if config.zero.offload != "none":
        return None
    settings = _zero_settings(config, {"reduce_bucket_size": SMALL_BUCKET})
    # the CPU steps torch's AdamW; bitsandbytes' states are made for a GPU
    return {"zero.stage": max(2, config.zero.stage), "zero.offload": "optimizer", "optimizer.kind": "adamw", **settings}


def _offload_parameters(config: Config, ranks: int) -> Overrides | None:
    if config.zero.offload == "parameters":
        return None
    live = {"stage3_max_live_parameters": 10**8, "stage3_max_reuse_distance": 10**8}
    settings = _zero_settings(config, {"reduce_bucket_size": SMALL_BUCKET, **live})
    return {"zero.stage": 3, "zero.offload": "parameters", "optimizer.kind": "adamw", **settings}


def _eight_bit(config: Config, ranks: int) -> Overrides | None:
    if config.zero.offload != "none" or config.optimizer.kind not in ("adamw", "lion"):
        return None
    return {"optimizer.kind": f"{config.optimizer.kind}8bit"}


def _paged(config: Config, ranks: int) -> Overrides | None:
    if config.zero.offload != "none" or config.optimizer.kind.startswith("paged"):
        return None
    return {"optimizer.kind": f"paged_{config.optimizer.kind.removesuffix('8bit')}8bit"}


def _quantized(config: Config, ranks: int, kind: str) -> Overrides | None:
    return None if config.teacher.precision in (kind, "nf4") else {"teacher.precision": kind}


def _last_step(config: Config, ranks: int) -> Overrides | None:
    keys = [f"objective.{kind}.gradient_steps" for kind in config.objective.kinds if kind in CHAINS]
    if config.student.steps == 1 or all(_value(config, key) == 1 for key in keys):
        return None
    return dict.fromkeys(keys, 1)


SWITCHES = (
    Switch("bf16", 0.6, _low_precision, KINDS, loses="24 bits of mantissa for 8"),
    Switch(
        "gradients through the last step", 0.7, _last_step, (ACTIVATIONS,),
        loses="what the steps before the last would learn; on the digits the student was lost (docs/objectives.md)",
    ),
    Switch(
        "autoencoder in bf16", 0.98, _set("vae.precision", "bf16", unless=lambda c: c.vae.precision != "fp32"),
        (ENCODERS, ACTIVATIONS, SAMPLES), loses="rounding of the images",
    ),
    Switch("8-bit optimizer", 1.0, _eight_bit, (OPTIMIZER, ACTIVATIONS), loses="rounding of the optimizer's states"),
    Switch("smaller vae.batch_size", 1.01, _lowered("vae.batch_size"), (ACTIVATIONS,), size="vae.batch_size"),
    Switch("smaller reduce buckets", 1.02, _small_buckets, (GRADIENTS,)),
    Switch(
        "smaller rollout.batch_size", 1.03, _lowered("rollout.batch_size"), (ACTIVATIONS,), size="rollout.batch_size"
    ),
    Switch("smaller train.micro_batch", 1.05, _lowered("train.micro_batch"), (ACTIVATIONS,), size="train.micro_batch"),
    Switch(
        "autoencoder in tiles", 1.06, _set("vae.tiling", True, unless=lambda c: c.vae.tiling), (ACTIVATIONS,),
        loses="seams between tiles, barely visible",
    ),
    Switch("ZeRO stage 1", 1.06, lambda config, ranks: _stage(config, ranks, 1), (OPTIMIZER,)),
    Switch("ZeRO stage 2", 1.08, lambda config, ranks: _stage(config, ranks, 2), (OPTIMIZER, GRADIENTS)),
    Switch(
        "LoRA", 1.15, _set("lora.rank", 32, unless=lambda c: bool(c.lora.rank)), KINDS,
        loses="trains low-rank adapters instead of all weights",
    ),
    Switch("paged 8-bit optimizer", 1.2, _paged, (OPTIMIZER, ACTIVATIONS), loses="rounding of the optimizer's states"),
    Switch(
        "gradient checkpointing", 1.3,
        _set("model.gradient_checkpointing", True, unless=lambda c: c.model.gradient_checkpointing), (ACTIVATIONS,),
    ),
    Switch("ZeRO stage 3", 1.35, lambda config, ranks: _stage(config, ranks, 3), (PARAMETERS, OPTIMIZER, GRADIENTS)),
    Switch(
        "frozen weights in nf4", 1.4, lambda config, ranks: _quantized(config, ranks, "nf4"), (PARAMETERS,),
        loses="4-bit weights of the teacher",
    ),
    Switch(
        "frozen weights in int8", 1.45, lambda config, ranks: _quantized(config, ranks, "int8"), (PARAMETERS,),
        loses="8-bit weights of the teacher",
    ),
    Switch("optimizer states in host memory", 1.6, _offload_optimizer, (OPTIMIZER, GRADIENTS, ACTIVATIONS)),
    Switch("parameters in host memory", 3.0, _offload_parameters, (PARAMETERS, OPTIMIZER, GRADIENTS, ACTIVATIONS)),
)  # fmt: skip
"""Cheapest in speed first."""


def advise(config: Config, ranks: int, budget: int, plan: Planned) -> Iterator[Advice]:
    """What would make a run fit a budget of bytes: single changes, and where none is enough, a combination.

    Each was planned with `plan`; sizes are lowered no further than needed.
    """
    base, single = plan(config), False
    for switch in SWITCHES:
        if _hope(base, switch.lowers) > budget:
            continue
        changed = _apply(config, [switch], ranks)
        if changed is not None and plan(changed).worst.total <= budget:
            single = True
            yield _relaxed(config, [switch], ranks, budget, plan)
    combined = [] if single else _combine(config, ranks, budget, plan)
    if combined:
        yield _relaxed(config, combined, ranks, budget, plan)


def _hope(memory: Memory, kinds: tuple[str, ...]) -> int:
    """Bytes of the worst phase if all of some kinds were gone; those of the text encoders stay."""
    return max(sum(size for kind, size in phase.kinds.items() if kind not in kinds) for phase in memory.phases)


def _combine(config: Config, ranks: int, budget: int, plan: Planned) -> list[Switch]:
    """The cheapest changes that lower what is too much, one after the other until it fits, without those that turn out
    to be needless; empty: all of them are not enough."""
    chosen: list[Switch] = []
    memory = plan(config)
    for switch in SWITCHES:
        changed = _apply(config, [*chosen, switch], ranks)
        tried = None if changed is None else plan(changed)
        if tried is not None and _excess(tried, budget) < _excess(memory, budget):
            chosen, memory = [*chosen, switch], tried
        if _excess(memory, budget) == 0:
            break
    else:
        return []
    for switch in sorted(chosen[:-1], key=lambda switch: -switch.slowdown):
        changed = _apply(config, [other for other in chosen if other is not switch], ranks)
        if changed is not None and _excess(plan(changed), budget) == 0:
            chosen.remove(switch)
    return chosen


def _excess(memory: Memory, budget: int) -> int:
    """Bytes beyond the budget, of all phases."""
    return sum(max(0, phase.total - budget) for phase in memory.phases)


def _relaxed(config: Config, switches: list[Switch], ranks: int, budget: int, plan: Planned) -> Advice:
    """Advice of changes that fit, with sizes as large as they can be."""
    overrides = _overridden(config, switches, ranks)
    needed = plan(_changed(config, overrides)).worst.total
    for key in [switch.size for switch in switches if switch.size]:
        given = _value(config, key)
        while given is None or overrides[key] * 2 < given:
            larger = {**overrides, key: overrides[key] * 2}
            memory = plan(_changed(config, larger))
            if memory.worst.total > budget or overrides[key] >= LARGEST:
                break
            overrides, needed = larger, memory.worst.total
    slowdown = 1.0
    for switch in switches:
        slowdown *= switch.slowdown
    return Advice(
        switches=tuple(switch.name for switch in switches),
        overrides=tuple(f"{key}={_text(value)}" for key, value in overrides.items()),
        peak=needed,
        slowdown=slowdown,
        loses=tuple(switch.loses for switch in switches if switch.loses),
    )


def _apply(config: Config, switches: list[Switch], ranks: int) -> Config | None:
    """The changed configuration; None: a change has nothing to change, or the changes conflict."""
    overrides = _overridden(config, switches, ranks)
    if overrides is None:
        return None
    try:
        changed = _changed(config, overrides)
    except EngineError:
        return None
    return None if conflicts(changed, "cuda") else changed


def _overridden(config: Config, switches: list[Switch], ranks: int) -> Overrides | None:
    merged: Overrides = {}
    for switch in switches:
        own = switch.overrides(_changed(config, merged), ranks)
        if own is None:
            return None
        merged |= own
    return merged


def _changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    return load_config(config, [f"{key}={_text(value)}" for key, value in overrides.items()])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
