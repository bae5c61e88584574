"""Who predicts: which networks a run holds, what of them is trained, and that a written student is read as it is."""

import pytest
import torch

from engine import EngineError
from engine.models.loading import fingerprint
from engine.models.lora import ADAPTER
from engine.models.pipelines import load_pipeline
from engine.roles import fit, load_exported, load_roles, load_student, save_student

SMALLER = ("student.architecture={block_out_channels: [8, 8]}", "cloning.iterations=1")  # of [8, 16]
LORA = ("lora.rank=2", "lora.target=.*time_emb_proj")


@pytest.fixture
def configured(tiny_config, tmp_path):
    """`configured("key=value", ...)`: a configuration of the tiny teacher."""
    return lambda *overrides: tiny_config(tmp_path / "run", *overrides)


def trained_names(network) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def predict(denoiser) -> torch.Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser.predict(x, torch.tensor([900, 500, 20]), {"class_labels": torch.tensor([0, 4, 9])})[0]


# how many networks


@pytest.mark.parametrize(("coefficient", "count"), [(0.0, 2), (0.1, 3)])
def test_without_adapters_each_role_is_a_network_of_its_own(configured, coefficient, count):
    roles = load_roles(configured(f"objective.kl_coef={coefficient}"))
    present = [role for role in (roles.teacher, roles.student, roles.reference) if role is not None]
    assert len({id(role.network) for role in present}) == len(present) == count
    assert trained_names(roles.teacher.network) == set()
    assert trained_names(roles.student.network) == {name for name, _ in roles.student.network.named_parameters()}
    assert roles.reference is None or trained_names(roles.reference.network) == set()


def test_with_adapters_all_roles_are_one_network_of_which_the_adapters_are_trained(configured):
    roles = load_roles(configured(*LORA, "objective.kl_coef=0.1"))
    assert roles.teacher.network is roles.student.network is roles.reference.network
    assert (roles.teacher.adapter, roles.student.adapter, roles.reference.adapter) == (None, ADAPTER, None)
    trained = trained_names(roles.student.network)
    assert trained
    assert all("time_emb_proj.lora_" in name for name in trained)
    assert load_roles(configured(*LORA)).reference is None


def test_adapters_change_the_student_and_neither_teacher_nor_reference(configured, tiny_teacher):
    roles = load_roles(configured(*LORA, "objective.kl_coef=0.1"))
    plain = predict(load_pipeline(tiny_teacher).denoiser)
    assert torch.equal(predict(roles.student), plain)  # an adapter begins as nothing
    for name, parameter in roles.student.network.named_parameters():
        if name in trained_names(roles.student.network):
            parameter.data.add_(0.1)
    assert not torch.equal(predict(roles.student), plain)
    assert torch.equal(predict(roles.teacher), plain)
    assert torch.equal(predict(roles.reference), plain)


def test_the_reference_is_the_initial_student_wherever_that_comes_from(configured, tmp_path, write_teacher):
    from diffusers import DDIMScheduler

    other = write_teacher(tmp_path / "other", DDIMScheduler(clip_sample=False), seed=1)
    roles = load_roles(configured(f"student.init={other}", "objective.kl_coef=0.1"))
    assert torch.equal(predict(roles.student), predict(load_pipeline(other).denoiser))
    assert torch.equal(predict(roles.reference), predict(roles.student))
    assert not torch.equal(predict(roles.teacher), predict(roles.student))


@pytest.mark.parametrize("adapters", [(), LORA])
def test_the_fingerprint_is_of_the_teachers_weights_alone(configured, tiny_teacher, adapters):
    assert load_roles(configured(*adapters)).weights == fingerprint(load_pipeline(tiny_teacher).denoiser)


def test_the_teacher_is_held_in_its_own_precision_and_the_student_in_fp32_until_it_is_trained(configured):
    roles = load_roles(configured("teacher.precision=bf16", "objective.kl_coef=0.1", "precision=bf16"))
    dtypes = [next(role.network.parameters()).dtype for role in (roles.teacher, roles.student, roles.reference)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    full = load_roles(configured())
    assert next(full.teacher.network.parameters()).dtype == torch.float32
    assert roles.weights != full.weights  # rounded weights draw other targets


# what is trained


def test_a_pattern_chooses_what_is_trained_and_the_rest_stays(start):
    trainer = start("student.trainable=^up_blocks\\.\\d+\\.resnets")
    before = {name: value.clone() for name, value in trainer.engine.module.state_dict().items()}
    trainer.train_iteration()
    after = trainer.engine.module.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {name for name in before if name.startswith(("up_blocks.0.resnets", "up_blocks.1.resnets"))}


@pytest.mark.parametrize(("pattern", "reason"), [("attentions", "is found in none"), ("[", "no regular expression")])
def test_a_pattern_that_chooses_nothing_is_refused(configured, pattern, reason):
    with pytest.raises(EngineError) as error:
        load_roles(configured(f'student.trainable="{pattern}"'))
    assert str(error.value).startswith("student.trainable=")
    assert pattern in str(error.value)


@pytest.mark.parametrize("target", ["attentions", "["])
def test_adapters_for_no_layer_are_refused(configured, target):
    with pytest.raises(EngineError, match=r"lora\.target") as error:
        load_roles(configured("lora.rank=2", f'lora.target="{target}"'))
    assert target in str(error.value)


# another architecture


def test_a_smaller_student_copies_the_weights_that_fit_and_draws_the_others(configured, tiny_teacher):
    teachers = load_pipeline(tiny_teacher).denoiser.network.state_dict()
    student = load_student(configured(*SMALLER)).network
    assert tuple(student.config.block_out_channels) == (8, 8)
    copied, drawn = set(), set()
    for name, value in student.state_dict().items():
        same = name in teachers and teachers[name].shape == value.shape
        (copied if same else drawn).add(name)
        assert not same or torch.equal(value, teachers[name]), name
    assert {"conv_in.weight", "class_embedding.weight", "conv_out.bias"} <= copied
    assert {"mid_block.resnets.0.conv1.weight", "down_blocks.1.resnets.0.conv2.bias"} <= drawn
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def test_drawn_weights_depend_on_the_seed_of_the_run_alone(configured):
    state = torch.get_rng_state()
    first, again, other = (
        load_student(configured(*SMALLER, f"seed={seed}")).network.state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert any(not torch.equal(first[name], value) for name, value in other.items())


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("block_channels", "is no entry of a UNet2DModel"),
        ("in_channels", "must be the teacher's"),
        ("sample_size", "must be the teacher's"),
        ("num_class_embeds", "must be the teacher's"),
    ],
)
def test_an_architecture_by_a_key_that_may_not_differ_is_refused(configured, key, reason):
    with pytest.raises(EngineError) as error:
        load_roles(configured(f"student.architecture={{{key}: 4}}", "cloning.iterations=1"))
    message = str(error.value)
    assert message.startswith(f"student.architecture.{key} {reason}; allowed are ")
    allowed = message.partition("allowed are ")[2].split(", ")
    assert {"block_out_channels", "layers_per_block"} <= set(allowed)
    assert key not in allowed
    assert not any(name.startswith("_") for name in allowed)


@pytest.mark.parametrize("value", ["[8]", "[7, 9]", "many"])
def test_an_architecture_that_cannot_be_built_is_refused_with_the_reason(configured, value):
    with pytest.raises(EngineError, match=r"student\.architecture=\{'block_out_channels': .*\}: \w+"):
        load_roles(configured(f"student.architecture={{block_out_channels: {value}}}", "cloning.iterations=1"))


# writing and reading


@pytest.mark.parametrize("kind", [(), SMALLER, ("student.trainable=conv_out",), LORA, ("lora.rank=3", "lora.alpha=12")])
def test_a_written_student_predicts_as_the_trained_one_when_it_is_read(configured, tmp_path, tiny_pipeline, kind):
    if "lora.rank=3" in kind:
        kind = (*kind, f"teacher.path={tiny_pipeline('dit')}", "reward.terms={pixel: 1}")
    config = configured(*kind)
    roles = load_roles(config)
    names = trained_names(roles.student.network)
    values = {}
    for name, parameter in roles.student.network.named_parameters():
        if name in names:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            values[name] = parameter.detach().clone()
    save_student(config, roles.pipeline, values, tmp_path / "student")
    read = load_exported(config, tmp_path / "student")
    shape = roles.teacher.latent_shape
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": torch.tensor([0, 4, 9])}
    with torch.no_grad():
        ours, theirs, teachers = (
            role.predict(x, torch.tensor([900, 500, 20]), labels)[0] for role in (roles.student, read, roles.teacher)
        )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (teachers - ours).abs().max() > 1e-3


# what `model` asks for


@pytest.mark.parametrize(
    ("override", "family", "reason"),
    [
        ("model.channels_last=true", "dit", "channels_last"),
        ("model.attention=xformers", None, "attention=xformers"),
        ("model.compile=true", "dit", None),
    ],
)
def test_a_switch_that_a_network_has_no_use_for_is_refused(configured, tiny_pipeline, override, family, reason):
    teacher = [f"teacher.path={tiny_pipeline(family)}", "reward.terms={pixel: 1}"] if family else []
    config = configured(override, *teacher)
    roles = load_roles(config)
    if reason is None:
        assert fit(roles, config)
        return
    with pytest.raises(EngineError, match="model: ") as error:
        fit(roles, config)
    assert reason in str(error.value)


def test_the_autoencoder_is_held_and_run_as_asked(configured, tiny_pipeline):
    teacher = (f"teacher.path={tiny_pipeline('dit')}", "teacher.resolution=[16, 16]", "reward.terms={pixel: 1}")
    decoded = {}
    for switch in ("precision=fp32", "slicing=true", "tiling=true", "precision=bf16"):
        config = configured(*teacher, f"vae.{switch}")
        roles = load_roles(config)
        fit(roles, config)
        vae = roles.pipeline.vae
        assert vae.use_slicing == (switch == "slicing=true")
        assert vae.use_tiling == (switch == "tiling=true")
        assert next(vae.parameters()).dtype == (torch.bfloat16 if switch == "precision=bf16" else torch.float32)
        latents = torch.randn(2, *roles.teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        decoded[switch] = roles.decode(latents)
        assert decoded[switch].dtype == torch.float32
    torch.testing.assert_close(decoded["slicing=true"], decoded["precision=fp32"], rtol=1e-5, atol=1e-5)
    assert 0 < (decoded["precision=bf16"] - decoded["precision=fp32"]).abs().max() < 0.05


def test_gradient_checkpointing_and_channels_last_leave_the_figures_as_they_are(start):
    rows = []
    for switches in ((), ("model.gradient_checkpointing=true",), ("model.channels_last=true",)):
        trainer = start(*switches)
        assert trainer.engine.module.is_gradient_checkpointing == ("model.gradient_checkpointing=true" in switches)
        assert not trainer.collector.targets.teacher.network.is_gradient_checkpointing
        rows.append([trainer.train_iteration() for _ in range(2)][-1])
    for row in rows[1:]:
        for name in ("reward/mean", "reward/std", "grad_norm", "loss/loss"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-3, abs=1e-5)
