"""Discriminators: heads that read what they should, on every family's middle, and losses by their formulas."""

import math

import pytest
import torch

from engine.models.discriminator import (
    ClassifyingDenoiser,
    Head,
    Heads,
    bottleneck,
    discriminator_loss,
    generator_loss,
)

FAMILIES = ("class-unet", "sd", "sdxl", "dit", "pixart-alpha", "sd3", "sd35", "flux")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_the_prediction_and_logits_of_the_middle(tiny, family):
    case = tiny(family)
    plain = case.denoiser.predict(case.x, case.timestep, case.condition)[0]
    network = ClassifyingDenoiser(case.denoiser.network)
    x = case.x.clone().requires_grad_()
    prediction, _ = case.denoiser.with_network(network).predict(x, case.timestep, case.condition)
    assert torch.equal(prediction, plain)
    assert len(network.logits) == 2
    network.logits[0].sum().backward()
    assert x.grad[0].abs().max() > 0
    assert x.grad[1].abs().max() == 0
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("head.") for name in reached)
    after = ("conv_out", "up_blocks", "norm_out", "proj_out")  # what comes after the middle
    assert not [name for name in reached if name.startswith(tuple(f"network.{part}" for part in after))]


@pytest.mark.parametrize("family", ["sd", "dit"])
def test_gradient_checkpointing_changes_no_gradient_of_the_logits(tiny, family):
    gradients = []
    for checkpointing in (False, True):
        case = tiny(family)
        network = ClassifyingDenoiser(case.denoiser.network.train())
        torch.manual_seed(0)
        network.head = Head(network.head.hidden.in_features)
        if checkpointing:
            network.network.enable_gradient_checkpointing()
        x = case.x.clone().requires_grad_()
        case.denoiser.with_network(network).predict(x, case.timestep, case.condition)
        (gradient,) = torch.autograd.grad(generator_loss([network.logits]), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "place"), [("class-unet", "mid_block"), ("sd", "mid_block"), ("dit", "blocks.0")])
def test_the_middle_is_the_block_between_the_halves(tiny, family, place):
    network = tiny(family).denoiser.network
    expected = network.mid_block if place == "mid_block" else network.transformer_blocks[0]
    assert bottleneck(network) is expected


def test_a_network_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="a Linear has no middle"):
        bottleneck(torch.nn.Linear(1, 1))


def test_a_head_reads_maps_and_tokens_alike():
    head, features = Head(6), torch.randn(2, 6, 3, 4)
    tokens = features.flatten(2).transpose(1, 2)
    assert torch.equal(head(features), head(tokens))
    assert head(features).shape == (2, 12)


def test_heads_have_a_logit_for_each_position_of_each_map():
    shapes = [logits.shape for logits in Heads([4, 6])([torch.randn(3, 4, 2, 2), torch.randn(3, 7, 6)])]
    assert shapes == [(3, 4), (3, 7)]


def test_the_losses_are_cross_entropies_and_each_map_counts_the_same():
    real, fake = (
        [torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5]])],
        [torch.tensor([[0.3, 0.1]]), torch.tensor([[-4.0]])],
    )

    def log_d(logit):
        return -math.log(1 + math.exp(-logit))

    of_real = (-(log_d(2) + log_d(-1)) / 2 - log_d(0.5)) / 2
    of_fake = (-(log_d(-0.3) + log_d(-0.1)) / 2 - log_d(4)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(of_real + of_fake, rel=1e-6)
    assert generator_loss(fake).item() == pytest.approx((-(log_d(0.3) + log_d(0.1)) / 2 - log_d(-4)) / 2, rel=1e-6)


def test_both_losses_pull_logits_apart_and_the_generators_towards_real():
    real, fake = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    discriminator_loss([real], [fake]).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake.grad = None
    generator_loss([fake]).backward()
    assert (fake.grad < 0).all()
