"""Keys that exclude each other, with the reason and what to use instead. Nothing is loaded to find them."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import Config

QUANTISED = ("int8", "nf4")


def conflicts(config: Config, device: str) -> list[str]:
    """Every combination of keys that cannot work together, one sentence each; an empty list if all can.

    Args:
        device: "cuda" or "cpu": what the run is on.
    """
    return [
        *_one_network(config),
        *_objectives(config),
        *_states(config, device),
        *_layouts(config),
        *_precisions(config, device),
    ]


def _one_network(config: Config) -> Iterator[str]:
    """What LoRA excludes, because one network is teacher and student; and what a student of its own does."""
    student, lora = config.student, config.lora
    if student.architecture and student.init != "teacher":
        yield (
            f"student.architecture with student.init={student.init}: that directory has an architecture already; "
            "leave one of the two out"
        )
    if not lora.rank:
        return
    given = f"lora.rank={lora.rank}"
    if student.init != "teacher":
        yield (
            f"{given} with student.init={student.init}: with LoRA one network is teacher and student, and its weights "
            "are the teacher's; use lora.rank=0, or merge that student and give it as teacher.path"
        )
    if student.architecture:
        yield (
            f"{given} with student.architecture: with LoRA one network is teacher and student, so both have the "
            "teacher's architecture; use lora.rank=0"
        )
    if student.trainable is not None:
        yield (
            f"{given} with student.trainable={student.trainable!r}: with LoRA the adapters are what is trained; "
            "choose their layers by lora.target, or use lora.rank=0"
        )
    if config.teacher.precision not in (*QUANTISED, config.precision):
        yield (
            f"{given} with teacher.precision={config.teacher.precision} and precision={config.precision}: with LoRA "
            "one network is teacher and student, and DeepSpeed casts all of it; set teacher.precision to "
            f"{config.precision}, int8 or nf4"
        )
    if config.teacher.precision == "int8" and config.zero.stage == 3:
        yield (
            f"{given} with teacher.precision=int8 and zero.stage=3: bitsandbytes keeps every 8-bit weight whole beside "
            "the parameter that DeepSpeed partitions, so nothing would be saved; use zero.stage=2, or nf4"
        )


def _objectives(config: Config) -> Iterator[str]:
    """What the objectives cannot learn under the other keys."""
    objective, sampler, kinds = config.objective, config.student.sampler, config.objective.kinds
    if objective.rewarded and (config.policy.kind == "renoise") != (sampler == "renoise"):
        fitting = "policy.kind=renoise" if sampler == "renoise" else "student.sampler=renoise"
        yield (
            f"policy.kind={config.policy.kind} with student.sampler={sampler}: the student would be trained with "
            f"another sampler than it is judged by; use {fitting}"
        )
    for kind in ("regression", "progressive"):
        if kind in kinds and sampler == "renoise":
            yield (
                f"student.sampler=renoise with the objective {kind}: it learns where the deterministic sampler ends, "
                "and fresh noise leads elsewhere; use student.sampler=ode"
            )
    if "progressive" in kinds and len(objective.progressive.stages or ()) > 1 and config.student.guidance != 1.0:
        yield (
            f"objective.progressive.stages={list(objective.progressive.stages)} with "
            f"student.guidance={config.student.guidance:g}: the first stage learns the guided teacher, so that later "
            "stages and the student need no guidance; use student.guidance=1"
        )
    if not objective.rewarded:
        if config.train.inner_epochs > 1:
            yield (
                f"train.inner_epochs={config.train.inner_epochs} with objective.kind={objective.kind}: there is no "
                "rollout to pass over again; use train.updates"
            )
        if objective.kl_coef:
            yield (
                f"objective.kl_coef={objective.kl_coef:g} with objective.kind={objective.kind}: the divergence is a "
                "term of grpo and ppo; use 0"
            )


def _states(config: Config, device: str) -> Iterator[str]:
    """What DeepSpeed and bitsandbytes can do with optimizer states and master weights."""
    kind, zero = config.optimizer.kind, config.zero
    if kind.startswith("paged_"):
        plain = kind.removeprefix("paged_")
        if device == "cpu":
            yield f"optimizer.kind={kind} on a CPU: it moves states out of GPU memory; use {plain}"
        if zero.offload != "none":
            yield (
                f"optimizer.kind={kind} with zero.offload={zero.offload}: the states are in CPU memory already; "
                f"use {plain}, or zero.offload=none"
            )
        if zero.stage == 0 and config.precision != "fp32":
            yield (
                f"optimizer.kind={kind} with zero.stage=0 and precision={config.precision}: DeepSpeed allocates the "
                "states twice there, and paged memory is not given back; use zero.stage=1"
            )
    if zero.master_weights == "bf16":
        given = "zero.master_weights=bf16"
        if config.precision != "bf16":
            yield f"{given} with precision={config.precision}: DeepSpeed has them for precision=bf16 only"
        if zero.stage == 0:
            yield f"{given} with zero.stage=0: DeepSpeed has them from stage 1 on; use zero.stage=1, on one GPU, too"
        if zero.offload != "none":
            yield (
                f"{given} with zero.offload={zero.offload}: DeepSpeed takes no optimizer but its own CPU Adam there; "
                "use one of the two"
            )


def _layouts(config: Config) -> Iterator[str]:
    """What changes how weights lie in memory, or how modules are called."""
    model, stage = config.model, config.zero.stage
    if model.compile and stage == 3:
        yield (
            "model.compile=true with zero.stage=3: DeepSpeed gathers weights in hooks of every module, and the graph "
            "breaks at each; use zero.stage=2 or model.compile=false"
        )
    if model.compile and model.attention == "xformers":
        yield (
            "model.compile=true with model.attention=xformers: how xformers chooses its operator cannot be traced; "
            "use model.attention=sdpa"
        )
    if model.channels_last and (stage == 3 or (stage > 0 and not config.lora.rank)):
        yield (
            f"model.channels_last=true with zero.stage={stage}: DeepSpeed lays the weights out in one flat buffer, in "
            "the default order; use zero.stage=0" + (" to 2" if config.lora.rank else ", or LoRA")
        )
    if model.channels_last and not config.lora.rank and config.optimizer.kind != "adamw":
        yield (
            f"model.channels_last=true with optimizer.kind={config.optimizer.kind}: bitsandbytes takes weights and "
            "gradients for plain memory of one order; use optimizer.kind=adamw, or LoRA"
        )


def _precisions(config: Config, device: str) -> Iterator[str]:
    if device == "cpu":
        precisions = {"precision": config.precision, "teacher.precision": config.teacher.precision}
        precisions["vae.precision"] = config.vae.precision
        for key, value in precisions.items():
            if value == "fp16":
                yield f"{key}=fp16 needs a GPU; on a CPU use fp32 or bf16"
