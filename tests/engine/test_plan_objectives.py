"""What the plan says of distillations, held against real runs of them: PyTorch's allocator and DeepSpeed's tensors."""

import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.plan_states import BUCKET, gradients_of, parameters_of, storages_of
from engine import load_config, zero
from engine.errors import EngineError
from engine.objectives.contract import STUDENT
from engine.plan import plan
from engine.planning.advice import advise
from engine.planning.objectives import STEPS, roles_of, steps_of
from engine.planning.phases import ACTIVATIONS, GRADIENTS, OPTIMIZER, PARAMETERS, SAMPLES, Memory, Phase, engines_of
from engine.planning.sizes import Sizes
from engine.planning.traces import network_key, networks_of

TOLERANCE = 0.1
SIZES = (
    "train.updates=1", "train.batch_size=24", "train.micro_batch=16", "rollout.conditions=4", "rollout.batch_size=8",
    "rollout.pool=24", "model.fused_kernels=off", "evaluation.every=0", "objective.dmd2.critic.warmup=0",
    "objective.flash_dmd.critic.warmup=0", "objective.diff_instruct.critic.warmup=0", "objective.dmd2.critic.updates=1",
    "objective.flash_dmd.critic.updates=1", "objective.diff_instruct.critic.updates=1",
    "objective.vardiu.posterior.width=8",
)  # fmt: skip
PIXELS = ("teacher.resolution=[16, 16]", "reward.terms={pixel: 1}")


@pytest.fixture
def trainer_of(start, tiny_pipeline, clip):
    """`trainer_of("unet" or "dit", "key=value", ...)`: a trainer, for the DiT with an autoencoder."""

    def make(family, *overrides):
        if family == "unet":
            return start(*SIZES, *overrides)
        encoder = f"objective.flash_dmd.encoder={{path: {clip}, layers: [1, 2]}}"
        return start(*SIZES, *PIXELS, encoder, f"teacher.path={tiny_pipeline('dit')}", *overrides)

    return make


@pytest.fixture(scope="module")
def of(tiny_pipeline):
    """`of("key=value", ...)`: the plan of a tiny DiT's run on a GPU of 24 GiB."""

    def make(*overrides, ranks=1):
        given = [*SIZES, *PIXELS, "precision=fp32", "teacher.steps=6", "student.steps=3", "rollout.group_size=4"]
        config = load_config({}, [*given, f"teacher.path={tiny_pipeline('dit')}", *overrides])
        return plan(config, gpu_bytes=24 * 2**30, ranks=ranks)

    return make


def phases_of(made):
    return {phase.name: phase.kinds for phase in made.memory.phases}


# ---------------------------------------------------------------------- activations


def allocated(computation, folder):
    """Most bytes that the CPU's allocator had given out at once in a second run, beyond those before, and those that
    stood when it was over."""
    computation()
    gc.collect()  # what other tests left would be freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = computation()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    del kept
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    size = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        size += event["args"]["Bytes"]
        most = max(most, size)
    return most, size


def drop(parameter):
    parameter.grad = None


def measured(part, learners, role, micro_batch, folder):
    """(most bytes while the examples of a role are drawn, their bytes, most bytes of a micro-batch)."""
    trained = [parameter for _, parameter in zero.trainable_parameters(learners[role].engine)]
    with ExitStack() as stack:
        for learner in learners.values():  # the trained one too, whose gradients DeepSpeed would keep
            stack.enter_context(learner.frozen())
        draw = torch.no_grad()(partial(part.objective.draw, role, 1))
        drawing, left = allocated(draw, folder)
        examples = next(draw().split(micro_batch))
        for parameter in trained:
            parameter.requires_grad_(True)
        hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
        peak, _ = allocated(lambda: part.objective.loss(role, examples).loss.backward(), folder)
        for hook in hooks:
            hook.remove()
    return drawing, left, peak


STEPPED = {
    "dit": ("objective.kind=regression", "objective.joined={draft: 1, progressive: 1, diff_instruct: 1}"),
    "dit renoising": (
        "objective.kind=consistency", "objective.joined={flash_dmd: 1, vardiu: 1}", "student.sampler=renoise",
    ),
    "dit with adapters": (
        "objective.kind=flash_dmd", "objective.joined={dmd2: 1}", "lora.rank=2", "teacher.guidance=3",
        "model.gradient_checkpointing=true",
    ),
    "unet": (
        "objective.kind=dmd2", "objective.joined={vardiu: 1, progressive: 1}", "objective.progressive.states=noised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPPED)
def test_the_steps_of_all_roles_are_within_a_tenth_of_the_allocators_peak(trainer_of, tmp_path, case):
    family = case.split()[0]
    trainer = trainer_of(family, *STEPPED[case])
    config = trainer.config
    for kind, part in trainer.parts.items():
        steps = steps_of(network_key(config, STEPS), Path(config.teacher.path), kind, 1)
        learners = {STUDENT: trainer.learner, **part.learners}
        assert set(steps.roles) == set(learners)
        part.objective.begin(0)
        for role, step in steps.roles.items():
            drawing, left, peak = measured(part, learners, role, config.train.micro_batch, tmp_path)
            assert max(size for size, _ in step.moments) == pytest.approx(peak, rel=TOLERANCE), (kind, role)
            assert step.examples == pytest.approx(left, rel=0.01), (kind, role)
            if family == "dit":  # of a UNet without gradients, the CPU's convolutions copy more than they return
                assert step.drawing > (1 - TOLERANCE) * drawing, (kind, role)


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.kind=regression", "objective.joined={dmd2: 1}"),
        ("objective.kind=grpo", "objective.joined={regression: 1, diff_instruct: 1}", "policy.window=1"),
    ],
    ids=["two distillations", "grpo and two distillations"],
)
def test_a_whole_iteration_is_within_a_tenth_of_the_allocators_peak(trainer_of, tmp_path, overrides):
    trainer = trainer_of("dit", *overrides, "train.micro_batch=8")
    made = plan(trainer.config, gpu_bytes=2**30)
    # the smaller of two: what Python's garbage collector leaves for later differs
    peak = min(allocated(trainer.train_iteration, tmp_path)[0] for _ in range(2))
    passing = (ACTIVATIONS, GRADIENTS, SAMPLES)
    planned = max(sum(phase.kinds.get(kind, 0) for kind in passing) for phase in made.memory.phases)
    assert planned == pytest.approx(peak, rel=TOLERANCE)


# ---------------------------------------------------------------------- what stands


def reachable(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in an optimizer's attributes and their containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from reachable(key, seen)
            yield from reachable(entry, seen)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from reachable(entry, seen)
    elif hasattr(value, "param_groups"):
        yield from reachable(vars(value), seen)


def watch_gradients(engine) -> list[int]:
    """Bytes of an engine's gradients behind each of its backward passes, to be filled in."""
    found, backward = [], engine.backward

    def watched(*arguments, **options):
        backward(*arguments, **options)
        found.append(sum(storages_of(gradients_of(engine)).values()))

    engine.backward = watched
    return found


def standing(engine) -> dict[str, int]:
    """Bytes of parameters and of what the optimizer keeps, between two steps."""
    parameters, buffers = storages_of(parameters_of(engine)), storages_of(gradients_of(engine))
    states = storages_of(reachable(engine.optimizer, set()))
    known = {*parameters, *buffers}
    last = [parameter for _, parameter in zero.trainable_parameters(engine)][-1]
    # Stages 1 and 2 keep the last parameter's own tensor when they lay all of them out in one buffer.
    spare = last.numel() * last.element_size() if engine.zero_optimization_stage() in (1, 2) else 0
    return {
        "parameters": sum(parameters.values()),
        "optimizer": sum(size for place, size in states.items() if place not in known) - spare,
    }


BYTES = (
    "precision=bf16", "train.batch_size=8", "train.micro_batch=4", "objective.progressive.stages=[5, 3]",
    f"zero.deepspeed={{zero_optimization: {{reduce_bucket_size: {BUCKET}}}}}", "iterations=9",
)  # fmt: skip
EVERY = ("objective.kind=dmd2", "objective.joined={flash_dmd: 1, vardiu: 1, progressive: 1, consistency: 1}")
ADAPTED = (
    "objective.kind=dmd2", "objective.joined={vardiu: 1, consistency: 1}", "lora.rank=2", "teacher.precision=bf16",
)  # fmt: skip


@pytest.mark.parametrize("stage", range(4))
def test_every_role_of_a_unet_is_planned_to_the_byte_as_deepspeed_holds_it(trainer_of, stage):
    fewer = ("objective.joined={vardiu: 1}",) if stage == 3 else ()  # which takes seconds for each network
    assert_planned_to_the_byte(trainer_of("unet", *EVERY, *fewer, *BYTES, f"zero.stage={stage}"))


@pytest.mark.parametrize("stage", [0, 2])  # at stage 3, DeepSpeed refuses gradients through another engine's adapters
def test_every_role_of_a_dit_with_adapters_is_planned_to_the_byte_as_deepspeed_holds_it(trainer_of, stage):
    assert_planned_to_the_byte(trainer_of("dit", *ADAPTED, *BYTES, f"zero.stage={stage}"))


def assert_planned_to_the_byte(trainer):
    config = trainer.config
    learners = {STUDENT: trainer.learner}
    for kind, part in trainer.parts.items():
        learners |= {f"{kind}: {name}": learner for name, learner in part.learners.items()}
    trainer.train_iteration()  # the states are allocated by the first step
    gradients = {name: watch_gradients(learner.engine) for name, learner in learners.items()}
    trainer.train_iteration()

    key, directory = network_key(config, STEPS), Path(config.teacher.path)
    nets, roles = networks_of(network_key(config), directory), roles_of(key, directory)
    engines = engines_of(config, nets, roles, Sizes.of(config, nets, 1), 1)
    apart = {f"{kind}: {name}": role.apart for kind, own in roles.items() for name, role in own.items()}
    assert set(engines) == set(learners)
    for name, held in engines.items():
        planned = {"parameters": held.parameters + apart.get(name, 0), "optimizer": held.optimizer + held.host}
        assert planned == standing(learners[name].engine), name
        assert held.gradients == max(gradients[name]), name
    for kind, part in trainer.parts.items():
        for name, network in part.networks.items():
            assert apart[f"{kind}: {name}"] == sum(storages_of([*network.parameters(), *network.buffers()]).values())


def test_the_networks_of_roles_are_added_up_and_adapters_make_them_smaller(of):
    one, critic = (phases_of(of(f"objective.kind={kind}"))["update"] for kind in ("regression", "diff_instruct"))
    assert critic[PARAMETERS] == pytest.approx(one[PARAMETERS] * 3 / 2, rel=0.01)  # teacher and student, and a critic
    assert critic[OPTIMIZER] == 2 * one[OPTIMIZER]
    small = phases_of(of("objective.kind=diff_instruct", "lora.rank=2"))["update"]
    assert small[PARAMETERS] < 0.7 * critic[PARAMETERS]
    assert small[OPTIMIZER] < 0.1 * critic[OPTIMIZER]


def test_stages_of_progressive_and_the_average_of_consistency_are_networks_of_their_own(of):
    one, two = (
        phases_of(of("objective.kind=progressive", f"objective.progressive.stages={stages}"))["update"]
        for stages in ("[3]", "[5, 3]")
    )
    assert two[PARAMETERS] == pytest.approx(one[PARAMETERS] * 3 / 2, rel=0.01)
    without, averaged = (
        of("objective.kind=consistency", f"objective.consistency.decay={decay}") for decay in ("0", "0.9")
    )
    networks = [phases_of(made)["update"][PARAMETERS] for made in (without, averaged)]
    assert networks[1] == pytest.approx(networks[0] * 3 / 2, rel=0.01)
    assert averaged.memory.host > without.memory.host


def test_trajectories_of_the_pool_are_in_host_memory(of):
    noised, kept = (
        of("objective.kind=progressive", f"objective.progressive.states={s}") for s in ("noised", "trajectory")
    )
    assert kept.memory.host - noised.memory.host == 24 * (3 + 1) * 4 * 8 * 8 * 4  # pool, states, and fp32 latents


# ---------------------------------------------------------------------- phases


def test_objectives_that_take_turns_need_no_more_than_the_larger_of_them(of):
    alone = {kind: phases_of(of(f"objective.kind={kind}"))["update"] for kind in ("regression", "consistency")}
    kinds = ("objective.kind=regression", "objective.joined={consistency: 1}")
    together, turns = (
        phases_of(of(*kinds, *more))["update"] for more in ((), ("objective.turns={regression: 1, consistency: 1}",))
    )
    assert turns[ACTIVATIONS] == max(kinds[ACTIVATIONS] for kinds in alone.values())
    assert together[ACTIVATIONS] == turns[ACTIVATIONS]  # micro-batches follow one another
    assert together[SAMPLES] == sum(kinds[SAMPLES] for kinds in alone.values())  # drawn before the first of them
    assert turns[SAMPLES] < together[SAMPLES]


def test_ranks_share_the_examples_of_a_step(of):
    one, two = (phases_of(of("objective.kind=regression", ranks=ranks))["update"] for ranks in (1, 2))
    assert two[SAMPLES] == one[SAMPLES] / 2
    assert two[ACTIVATIONS] == pytest.approx(one[ACTIVATIONS] * 12 / 16, rel=0.05)  # of 12 examples, not of 16


def test_fewer_steps_with_gradients_keep_less(of):
    all_steps, last = (
        phases_of(of("objective.kind=draft", f"objective.draft.gradient_steps={steps}"))["update"][ACTIVATIONS]
        for steps in ("null", "1")
    )
    assert last < 0.8 * all_steps


def test_a_distillation_decodes_only_where_it_is_judged_on_held_out_conditions(of):
    assert "decode, reward" not in phases_of(of("objective.kind=regression"))
    assert "decode, reward" in phases_of(of("objective.kind=regression", "evaluation.every=1"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("objective.kind=draft", "reward.terms={mine: {kind: 'module:function', differentiable: true}}"),
            r"draft cannot be planned with reward\.terms\.mine",
        ),
        (("objective.kind=draft", "reward.terms={jpeg: 1}"), "draft needs the reward's gradient"),
        (("objective.kind=flash_dmd",), r"objective\.flash_dmd\.encoder\.path is not set"),
        (
            ("objective.kind=flash_dmd", "objective.flash_dmd.encoder.path=nowhere"),
            r"objective\.flash_dmd\.encoder\.path: nowhere does not exist",
        ),
        (("objective.kind=progressive", "objective.progressive.stages=[2, 3]"), r"objective\.progressive\.stages"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(of, overrides, says):
    with pytest.raises(EngineError, match=says):
        of(*overrides)


def test_a_batch_that_ranks_cannot_share_is_refused(of):
    with pytest.raises(EngineError, match=r"train\.batch_size=24 is not a multiple of the 5 ranks"):
        of("objective.kind=regression", ranks=5)


def test_gradients_through_fewer_steps_are_advised_where_they_make_a_run_fit():
    def planned(config):
        every = any(getattr(config.objective, kind).gradient_steps != 1 for kind in ("draft", "vardiu"))
        return Memory((Phase("update", {ACTIVATIONS: 3 if every else 1}),), 0, ())

    config = load_config({}, ["objective.kind=draft", "objective.joined={vardiu: 1}"])
    (found,) = advise(config, 1, 2, planned)
    assert found.overrides == ("objective.draft.gradient_steps=1", "objective.vardiu.gradient_steps=1")
    assert not list(advise(load_config({}, ["objective.kind=dmd2"]), 1, 0, planned))
