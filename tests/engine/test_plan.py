"""`python -m engine.plan`: what it counts, what it advises, and what it says of bad input."""

import json

import pytest

from engine import load_config
from engine.errors import EngineError
from engine.models.families import FAMILIES
from engine.plan import SHARE, main, parse_bytes, plan
from engine.planning.networks import CONDITIONS
from engine.planning.phases import ACTIVATIONS, ENCODERS, GRADIENTS, OPTIMIZER, PARAMETERS, SAMPLES

GIB = 2**30
TEXT = (
    "precision=bf16",
    "teacher.precision=bf16",
    "teacher.steps=6",
    "teacher.guidance=5",
    "student.steps=3",
    "student.guidance=5",
    "rollout.conditions=2",
    "rollout.group_size=4",
    "rollout.pool=8",
    "train.micro_batch=2",
    "reward.terms={pixel: 1}",
)


@pytest.fixture(scope="module")
def of(tiny_pipeline):
    """`of(family, "key=value", ...)`: phase -> kind -> bytes of a tiny pipeline's run on a GPU of 24 GiB."""

    def make(family, *overrides, ranks=1):
        config = load_config({}, [f"teacher.path={tiny_pipeline(family)}", *TEXT, *overrides])
        made = plan(config, gpu_bytes=24 * GIB, ranks=ranks)
        return {phase.name: phase.kinds for phase in made.memory.phases}

    return make


def test_the_digits_fit_anywhere_and_the_phases_are_those_of_an_iteration():
    made = plan(load_config({}), gpu_bytes=GIB)
    assert made.fits
    assert [phase.name for phase in made.memory.phases] == [
        "teacher, rollout", "decode, reward", "update", "optimizer step",
    ]  # fmt: skip
    assert made.memory.worst.total == max(phase.total for phase in made.memory.phases)


def test_teacher_and_student_are_two_networks_in_full_and_one_with_adapters(of):
    full, lora = of("sd"), of("sd", "lora.rank=2")
    assert full["update"][PARAMETERS] > 1.9 * lora["update"][PARAMETERS]
    assert lora["update"][OPTIMIZER] < 0.1 * full["update"][OPTIMIZER]
    reference = of("sd", "objective.kl_coef=0.1")
    assert reference["update"][PARAMETERS] > 1.4 * full["update"][PARAMETERS]
    assert of("sd", "lora.rank=2", "objective.kl_coef=0.1")["update"][PARAMETERS] == lora["update"][PARAMETERS]


def test_text_encoders_are_counted_before_training_and_the_autoencoder_during_it(of):
    phases = of("sdxl")
    assert phases["encode prompts"][ENCODERS] > 0
    assert PARAMETERS not in phases["encode prompts"]
    assert phases["decode, reward"][ENCODERS] == phases["update"][ENCODERS] > 0


def test_guidance_doubles_the_passes(of):
    guided, plain = of("sd"), of("sd", "teacher.guidance=1", "student.guidance=1")
    assert guided["update"][ACTIVATIONS] == pytest.approx(2 * plain["update"][ACTIVATIONS], rel=0.15)


def test_activations_follow_the_micro_batch_and_samples_the_rollout(of):
    small, large = of("sd3", "policy.kind=flow_sde"), of("sd3", "policy.kind=flow_sde", "train.micro_batch=4")
    assert large["update"][ACTIVATIONS] == pytest.approx(2 * small["update"][ACTIVATIONS], rel=0.15)
    more = of("sd3", "policy.kind=flow_sde", "rollout.conditions=4")
    assert more["update"][SAMPLES] == 2 * small["update"][SAMPLES]


def test_ranks_divide_what_zero_partitions(of):
    bucket = "zero.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    one, four = (of("dit", "zero.stage=2", bucket, ranks=ranks)["update"] for ranks in (1, 2))
    assert four[OPTIMIZER] == pytest.approx(one[OPTIMIZER] / 2, rel=0.01)
    assert four[PARAMETERS] == pytest.approx(one[PARAMETERS], rel=0.01)


def test_parts_of_a_rollout_hold_fewer_images_but_overlap_with_the_next_rollout(of):
    whole, parts = of("sd")["decode, reward"], of("sd", "rollout.chunks=2")["decode, reward"]
    assert parts[ACTIVATIONS] > of("sd")["teacher, rollout"][ACTIVATIONS] / 2
    assert parts[GRADIENTS] == whole[GRADIENTS]


def test_four_bit_weights_take_about_a_quarter(of):
    low = of("flux", "policy.kind=flow_sde", "lora.rank=2")["update"][PARAMETERS]
    nf4 = of("flux", "policy.kind=flow_sde", "lora.rank=2", "teacher.precision=nf4")["update"][PARAMETERS]
    assert nf4 < 0.5 * low  # the tables of a tiny network weigh more than those of a large one


def test_every_network_that_reads_text_has_a_known_condition():
    networks = {family.network for family in FAMILIES if family.encode is not None}
    assert networks == set(CONDITIONS)


# the command


def run(tiny_pipeline, *arguments):
    return main([f"teacher.path={tiny_pipeline('sd')}", *TEXT, *arguments])


def test_the_command_prints_phases_and_kinds_writes_them_and_tells_by_its_status_that_it_fits(
    tiny_pipeline, tmp_path, capsys
):
    file = tmp_path / "plan.json"
    assert run(tiny_pipeline, "--gpu", "8GiB", "--json", str(file)) == 0
    said, written = capsys.readouterr().out, json.loads(file.read_text())
    for word in ("encode prompts", "update", "optimizer step", *(k for k in (PARAMETERS, ACTIVATIONS)), "fits"):
        assert word in said
    assert written["budget"] == int(8 * GIB * SHARE)
    assert written["fits"] is True
    assert written["phases"]["update"]["total"] == sum(
        size for kind, size in written["phases"]["update"].items() if kind != "total"
    )


def test_what_does_not_fit_gets_advice_that_was_planned_cheapest_in_speed_first(tiny_pipeline):
    config = load_config({}, [f"teacher.path={tiny_pipeline('sd')}", *TEXT, "precision=fp32", "teacher.precision=fp32"])
    needed = plan(config, gpu_bytes=GIB).memory.worst.total
    made = plan(config, gpu_bytes=int(needed * 0.8 / SHARE))
    assert not made.fits
    assert made.advice
    assert [entry.slowdown for entry in made.advice] == sorted(entry.slowdown for entry in made.advice)
    for entry in made.advice:
        again = plan(load_config(config, entry.overrides), gpu_bytes=made.gpu_bytes)
        assert again.fits
        assert again.memory.worst.total == entry.peak


def test_no_advice_is_given_where_nothing_helps(tiny_pipeline, capsys):
    assert run(tiny_pipeline, "--gpu", "10kB") == 1
    assert "no combination" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu", "big"], "--gpu 'big'"),
        (["--gpu", "8GiB", "--ranks", "0"], "--ranks 0"),
        (["--gpu", "8GiB", "teacher.path=models/unheard-of"], "models/unheard-of does not exist"),
        (["--gpu", "8GiB", "--architecture", "unheard-of"], "--architecture: unheard-of does not exist"),
        (["--gpu", "8GiB", "lora.rank=2", "lora.target=nothing"], "lora.target"),
        (["--gpu", "8GiB", "reward.terms={clip: {path: nowhere}}"], "reward.terms.clip.path: nowhere"),
        (["--gpu", "8GiB", "zero.stagee=1"], "zero.stage"),
    ],
)
def test_bad_input_is_named_and_ends_with_status_2(tiny_pipeline, capsys, arguments, named):
    assert run(tiny_pipeline, *arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("8 gib", 8 * GIB), ("512", 512)]
)
def test_sizes_are_read_with_binary_and_decimal_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "8TiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(EngineError, match="is not a size"):
        parse_bytes(text)
