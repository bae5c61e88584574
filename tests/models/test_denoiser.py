"""Denoisers: passes and guidance of every kind, and roles that are adapters of one network."""

import pytest
import torch
from torch import nn

from engine.models.denoiser import check_guidance
from engine.models.loading import LoadingError
from engine.models.lora import ADAPTER, LoraError, activate, add_lora
from engine.models.pipelines import load_pipeline

TIMESTEP = torch.tensor([500, 250])

pytestmark = pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")


@pytest.fixture
def make(tiny_pipeline):
    """Maps a family to (denoiser, latents of two samples, their condition)."""

    def call(family):
        pipeline = load_pipeline(tiny_pipeline(family), resolution=(16, 16))
        denoiser = pipeline.denoiser
        x = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        if denoiser.classes is not None:
            return denoiser, x, {"class_labels": torch.tensor([3, 500])}
        return denoiser, x, pipeline.encode(["a red cat", "dog"], ["tree", "the blue house"], "cpu")

    return call


@pytest.fixture
def roles(make):
    """Maps a family to (teacher, student, latents, condition): one network, whose adapter does something."""

    def call(family):
        teacher, x, condition = make(family)
        add_lora(teacher.network, rank=2)
        generator = torch.Generator().manual_seed(1)
        for name, value in teacher.network.named_parameters():
            if "lora_B" in name:
                value.data = 0.3 * torch.randn(value.shape, generator=generator)
        return teacher, teacher.with_adapter(ADAPTER), x, condition

    return call


def counted(denoiser):
    calls = []
    denoiser.network.register_forward_hook(lambda module, arguments, output: calls.append(output[0].shape[0]))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd", "sdxl", "dit", "pixart-alpha", "sd3"])
def test_the_guidance_pair_is_two_separate_predictions_in_one_pass(make, family):
    denoiser, x, condition = make(family)
    calls = counted(denoiser)
    pred, uncond = denoiser.predict(x, TIMESTEP, condition, guidance=3.0)
    assert len(calls) == 1
    alone, none = denoiser.predict(x, TIMESTEP, condition)
    assert none is None
    nothing, _ = denoiser.predict(x, TIMESTEP, {**condition, **denoiser.unconditional(condition)})
    torch.testing.assert_close(pred, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(uncond, nothing, rtol=1e-5, atol=1e-5)
    assert (pred - uncond).abs().max() > 1e-2
    assert [denoiser.passes(guidance) for guidance in (0.0, 1.0, 3.0)] == [2, 1, 2]


@torch.no_grad()
def test_embedded_guidance_is_one_pass_in_which_the_network_is_told(make):
    denoiser, x, condition = make("flux")
    told = []
    denoiser.network.register_forward_pre_hook(
        lambda module, arguments, keywords: told.append(keywords["guidance"].tolist()), with_kwargs=True
    )
    predictions = [denoiser.predict(x, TIMESTEP, condition, guidance=guidance) for guidance in (1.0, 3.5)]
    assert told == [[1.0, 1.0], [3.5, 3.5]]
    assert [uncond for _, uncond in predictions] == [None, None]
    assert (predictions[0][0] - predictions[1][0]).abs().max() > 1e-2
    assert denoiser.passes(3.5) == 1


@pytest.mark.parametrize(
    ("family", "allowed", "refused", "message"),
    [
        ("sd", (0.0, 1.0, -1.0, 7.5), (float("nan"), float("inf")), "any finite number; 1 is no guidance"),
        ("dit", (1.0, 4.0), (float("nan"),), "any finite number"),
        ("flux", (0.0, 1.0, 3.5), (-1.0, float("inf")), "a finite number >= 0, which the network is told"),
        ("flux-schnell", (1.0,), (0.0, 3.5), "allowed: 1, as this network was distilled to sample without guidance"),
    ],
)
def test_guidance_that_a_network_cannot_follow_is_refused(make, family, allowed, refused, message):
    denoiser = make(family)[0]
    for guidance in allowed:
        check_guidance(denoiser, guidance)
    for guidance in refused:
        with pytest.raises(LoadingError, match=f"guidance={guidance} is not possible; .*{message}"):
            check_guidance(denoiser, guidance)


def test_guidance_without_a_negative_prompt_says_what_is_missing(make):
    denoiser, x, condition = make("sd")
    with pytest.raises(ValueError, match=r"guidance needs the negative prompt, .* only encoder_hidden_states"):
        denoiser.predict(x, TIMESTEP, {"encoder_hidden_states": condition["encoder_hidden_states"]}, guidance=2.0)


@torch.no_grad()
def test_entries_that_the_network_does_not_read_are_ignored(make):
    for family in ("sd", "pixart-alpha", "flux", "dit"):
        denoiser, x, condition = make(family)
        want = denoiser.predict(x, TIMESTEP, condition, guidance=2.0)[0]
        got = denoiser.predict(x, TIMESTEP, {**condition, "negative_other": x, "other": x}, guidance=2.0)[0]
        assert torch.equal(want, got)


@torch.no_grad()
def test_latents_and_conditions_are_seen_in_the_dtype_of_the_network(make):
    denoiser, x, condition = make("pixart-alpha")
    denoiser.network.to(torch.bfloat16)
    assert denoiser.predict(x.double(), TIMESTEP, condition, guidance=2.0)[0].dtype == torch.bfloat16
    assert condition["encoder_hidden_states"].dtype == torch.float32


class Engine(nn.Module):
    """What DeepSpeed puts around a network: its own `config`, and everything else passed on."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.config = {"train_batch_size": 1}

    def forward(self, *arguments, **keywords):
        return self.module(*arguments, **keywords)


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd", "sdxl", "dit", "pixart-alpha", "sd3", "flux", "flux-schnell"])
def test_a_network_inside_an_engine_predicts_the_same(roles, family):
    teacher, student, x, condition = roles(family)
    guidance = 1.0 if family == "flux-schnell" else 2.0
    for role in (teacher, student):
        inside = role.with_network(Engine(role.network))
        want, got = (d.predict(x, TIMESTEP, condition, guidance=guidance)[0] for d in (role, inside))
        assert torch.equal(want, got)


# ---------------------------------------------------------------------- adapters


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd", "dit", "flux"])
def test_a_role_predicts_with_its_own_adapter_whoever_predicted_before(make, roles, family):
    plain, x, condition = make(family)
    without = plain.predict(x, TIMESTEP, condition, guidance=2.0)[0]
    teacher, student, *_ = roles(family)
    first = student.predict(x, TIMESTEP, condition, guidance=2.0)[0]
    torch.testing.assert_close(teacher.predict(x, TIMESTEP, condition, guidance=2.0)[0], without)
    assert torch.equal(student.predict(x, TIMESTEP, condition, guidance=2.0)[0], first)
    assert (first - without).abs().max() > 1e-2


def test_an_adapter_that_is_not_there_is_refused(roles):
    teacher, _, x, condition = roles("dit")
    with pytest.raises(LoraError, match="there is no adapter 'other'; this network has student"):
        teacher.with_adapter("other").predict(x, TIMESTEP, condition)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_teacher_may_predict_between_forward_and_backward_of_a_checkpointed_student(roles, family):
    gradients = []
    for checkpointing in (False, True):
        teacher, student, x, condition = roles(family)
        if checkpointing:
            student.network.enable_gradient_checkpointing()
        activate(student.network, None)  # whoever used the network last may have left the adapters off
        loss = student.predict(x, TIMESTEP, condition, guidance=2.0)[0].square().mean()
        with torch.no_grad():
            teacher.predict(x, TIMESTEP, condition)
        loss.backward()
        gradients.append([value.grad for value in student.network.parameters() if value.requires_grad])
    assert len(gradients[0]) > 4
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-4
