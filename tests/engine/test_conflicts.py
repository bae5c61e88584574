"""Keys that exclude each other: each pair is refused, its neighbours are not, and the reason given is true."""

import pytest
import torch

from engine import load_config, ranks, zero
from engine.conflicts import conflicts
from engine.models.lora import add_lora
from engine.models.quantization import quantize

LORA = "lora.rank=4"
SMALLER = ("student.architecture={layers_per_block: 1}", "cloning.iterations=9")


def found(*overrides: str, device: str = "cuda") -> list[str]:
    return conflicts(load_config({}, overrides), device)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("student.init=runs/a", *SMALLER), "student.architecture with student.init=runs/a"),
        ((LORA, "student.init=runs/a"), "lora.rank=4 with student.init=runs/a"),
        ((LORA, *SMALLER), "lora.rank=4 with student.architecture"),
        ((LORA, "student.trainable=attn"), "lora.rank=4 with student.trainable='attn'"),
        ((LORA, "precision=bf16"), "teacher.precision=fp32 and precision=bf16"),
        ((LORA, "teacher.precision=bf16"), "teacher.precision=bf16 and precision=fp32"),
        ((LORA, "teacher.precision=int8", "zero.stage=3"), "teacher.precision=int8 and zero.stage=3"),
        (("optimizer.kind=paged_adamw8bit", "zero.stage=1", "zero.offload=optimizer"), "in CPU memory already"),
        (("optimizer.kind=paged_lion8bit", "precision=bf16"), "allocates the states twice"),
        (("zero.master_weights=bf16", "zero.stage=1"), "precision=fp32: DeepSpeed has them for precision=bf16 only"),
        (("zero.master_weights=bf16", "precision=bf16"), "zero.master_weights=bf16 with zero.stage=0"),
        (
            ("zero.master_weights=bf16", "precision=bf16", "zero.stage=2", "zero.offload=optimizer"),
            "with zero.offload=optimizer: DeepSpeed takes no optimizer but its own CPU Adam",
        ),
        (("model.compile=true", "zero.stage=3"), "model.compile=true with zero.stage=3"),
        (("model.compile=true", "model.attention=xformers"), "cannot be traced"),
        (("model.channels_last=true", "zero.stage=1"), "use zero.stage=0, or LoRA"),
        (("model.channels_last=true", LORA, "zero.stage=3"), "use zero.stage=0 to 2"),
        (("model.channels_last=true", "optimizer.kind=lion"), "use optimizer.kind=adamw, or LoRA"),
        (("policy.kind=renoise",), "policy.kind=renoise with student.sampler=ode"),
        (("policy.kind=ddim", "student.sampler=renoise"), "policy.kind=ddim with student.sampler=renoise"),
        (("student.sampler=renoise", "objective.kind=regression"), "fresh noise leads elsewhere"),
        (
            ("policy.kind=renoise", "student.sampler=renoise", "objective.joined={progressive: 1}"),
            "student.sampler=renoise with the objective progressive",
        ),
        (
            ("objective.progressive.stages=[10, 5]", "objective.kind=progressive", "student.guidance=2"),
            "use student.guidance=1",
        ),
        (("train.inner_epochs=2", "objective.kind=draft"), "there is no rollout to pass over again"),
        (("objective.kl_coef=0.1", "objective.kind=dmd2"), "the divergence is a term of grpo and ppo"),
    ],
)
def test_what_cannot_work_together_is_one_sentence_with_keys_values_and_a_way_out(overrides, message):
    [sentence] = found(*overrides)
    assert message in sentence
    problem, _, way_out = sentence.partition(": ")
    assert any(problem.startswith(override.partition("=")[0]) for override in overrides)
    assert any(word in way_out for word in ("use ", "set ", "leave ", "only"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (LORA,),
        (LORA, "teacher.precision=bf16", "precision=bf16"),
        (LORA, "teacher.precision=nf4", "precision=bf16", "zero.stage=3"),
        (LORA, "teacher.precision=int8", "zero.stage=2"),
        (LORA, "model.channels_last=true", "zero.stage=2", "optimizer.kind=lion"),
        ("student.sampler=renoise", "policy.kind=renoise"),
        ("student.sampler=renoise", "objective.kind=dmd2"),
        ("objective.kind=dmd2", "objective.joined={grpo: 1}", "objective.kl_coef=0.1", "train.inner_epochs=2"),
        ("objective.kind=progressive", "student.guidance=2"),
        ("teacher.precision=nf4", "precision=bf16"),  # a frozen teacher beside a student of its own
        (*SMALLER, "student.trainable=conv"),
        ("optimizer.kind=paged_adamw8bit", "zero.stage=1", "precision=bf16"),
        ("zero.master_weights=bf16", "precision=bf16", "zero.stage=1", "optimizer.kind=adamw8bit"),
        ("model.compile=true", "zero.stage=2", "model.gradient_checkpointing=true", LORA),
        ("model.channels_last=true",),
    ],
)
def test_what_works_together_is_not_refused(overrides):
    assert found(*overrides) == []


@pytest.mark.parametrize("kind", ["paged_adamw8bit", "paged_lion8bit"])
def test_paged_optimizers_need_a_gpu_and_fp16_does(kind):
    assert found(f"optimizer.kind={kind}") == []
    [sentence] = found(f"optimizer.kind={kind}", device="cpu")
    assert sentence.endswith(f"use {kind.removeprefix('paged_')}")
    for key in ("precision", "teacher.precision", "vae.precision"):
        assert found(f"{key}=fp16") == []
        assert found(f"{key}=fp16", device="cpu") == [f"{key}=fp16 needs a GPU; on a CPU use fp32 or bf16"]


def test_all_conflicts_are_found_at_once():
    assert len(found(LORA, "student.init=runs/a", "student.trainable=attn", "model.compile=true", "zero.stage=3")) == 3


# the reasons, where a CPU can show them


def start(network: torch.nn.Module, *overrides: str):
    ranks.start(1)
    partition_all = "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    config = load_config({}, [*overrides, *([partition_all] if "zero.stage=3" in overrides else [])])
    return zero.initialize(config, network, micro_batch=2, accumulation=1, world_size=1)


@pytest.mark.parametrize(
    "overrides", [("zero.stage=0",), ("zero.stage=1", "zero.offload=optimizer")], ids=["stage 0", "offload"]
)
def test_deepspeed_refuses_bf16_master_weights_there(overrides):
    with pytest.raises(AssertionError, match=r"(?i)master.weights"):
        start(torch.nn.Linear(4, 4), "precision=bf16", "zero.master_weights=bf16", *overrides)


def test_deepspeed_casts_the_frozen_part_of_a_network_too():
    network = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
    add_lora(network, rank=2)
    start(network, "precision=bf16")
    assert network.to_q.base_layer.weight.dtype == torch.bfloat16


def test_an_8_bit_weight_stays_whole_under_zero_3_and_a_4_bit_weight_does_not():
    whole = {}
    for kind in ("int8", "nf4"):
        network = torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 64)})
        quantize(network, kind, torch.float32)
        add_lora(network, rank=2)
        start(network, "zero.stage=3")
        with torch.no_grad():
            network.to_q(torch.randn(2, 64))
        layer = network.to_q.base_layer
        kept = layer.state.CB if kind == "int8" else layer.weight
        whole[kind] = kept is not None and kept.numel() > 0
    assert whole == {"int8": True, "nf4": False}
