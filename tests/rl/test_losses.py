"""The loss of a micro-batch against the published formula, written out in float64 and differentiated by torch."""

import copy
import math

import pytest
import torch

from engine.models.digits import TEACHER_DIR
from engine.models.pipelines import load_pipeline
from engine.rl import ddim_policy, flow_sde_policy
from engine.rl.losses import pair_loss, step_weights
from engine.rl.rollout import rollout

ROWS, GROUP = 3, 4
SAMPLES = ROWS * GROUP
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def scene():
    """A rollout by one student, and the same student after some updates, so that ratios differ from 1."""
    before = load_pipeline(TEACHER_DIR).denoiser
    schedule = before.schedule
    policy = ddim_policy(schedule.alphas_cumprod, schedule.timesteps(4), eta=0.6)
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(ROWS, *SHAPE, generator=generator)
    noise = torch.randn(4, SAMPLES, *SHAPE, generator=generator)
    labels = torch.tensor([3, 0, 7])

    def make(guidance):
        return rollout(
            before,
            policy,
            initial,
            {"class_labels": labels},
            guidance=guidance,
            group_size=GROUP,
            step_noise=lambda step: noise[step],
        )

    moved = copy.deepcopy(before.network)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(3e-4 * torch.randn(parameter.shape, generator=generator))
    advantage = torch.randn(SAMPLES, generator=generator)
    condition = {"class_labels": labels.repeat_interleave(GROUP)}
    return {
        "before": before,
        "after": before.with_network(moved),
        "policy": policy,
        "trajectory": make,
        "condition": condition,
        "advantage": advantage,
        "pairs": torch.randperm(3 * SAMPLES, generator=generator)[:20],
    }


def published_loss(scene, trajectory, network, reference, *, guidance, clip, kl_coef, divergence, weights):
    """Mean over pairs of weight * (max(-A r, -A clip(r)) + kl_coef D), r = exp(log p_new - log p_old), in float64."""
    policy, pairs = scene["policy"], scene["pairs"]
    sample, step = trajectory.sample[pairs], trajectory.step[pairs]
    x, x_next = trajectory.latents[pairs].double(), trajectory.next_latents[pairs].double()
    a, b, std = (getattr(policy, name)[step].view(-1, 1, 1, 1) for name in ("a", "b", "std"))
    labels = scene["condition"]["class_labels"][sample]

    def guided(net):
        time = policy.timesteps[step]
        cond = net(x, time, class_labels=labels).sample
        uncond = net(x, time, class_labels=torch.full_like(labels, 10)).sample
        return uncond + guidance * (cond - uncond)

    f = guided(network)
    density = -((x_next - (a * x + b * f)) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    ratio = torch.exp(density.flatten(1).mean(1) - trajectory.log_prob[pairs].double())
    advantage = scene["advantage"][sample].double()
    low, high = clip
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if kl_coef:
        with torch.no_grad():
            g = guided(reference)
        d = (b**2 * (f - g) ** 2 / std**2).flatten(1).mean(1)
        loss = loss + kl_coef * divergence(d)
    if weights:
        loss = loss * (policy.std[step] / policy.std[policy.std > 0].mean())
    return loss.mean(), ratio


DIVERGENCES = {
    ("kl", None): lambda d: d / 2,
    ("renyi", 0.5): lambda d: 0.5 * d / 2,
    ("chi2", None): lambda d: torch.exp(d) - 1,
    ("power", 2.0): lambda d: (torch.exp(d) - 1) / 2,
}


@pytest.mark.parametrize(
    ("guidance", "kl_coef", "weights", "clip_range", "divergence"),
    [
        (1.0, 0.0, False, 2e-3, ("kl", None)),
        (1.0, 0.7, True, (1e-3, 4e-3), ("kl", None)),
        (2.5, 0.0, True, (4e-3, 1e-3), ("kl", None)),
        (2.5, 0.7, False, 2e-3, ("kl", None)),
        (2.5, 0.7, False, 2e-3, ("renyi", 0.5)),
        (2.5, 0.7, False, 2e-3, ("chi2", None)),
        (2.5, 0.7, False, 2e-3, ("power", 2.0)),
    ],
)
def test_gradient_is_that_of_the_published_formula_in_float64(
    scene, guidance, kl_coef, weights, clip_range, divergence
):
    student = scene["after"].with_network(copy.deepcopy(scene["after"].network))
    trajectory = scene["trajectory"](guidance)
    result = pair_loss(
        student,
        scene["policy"],
        trajectory,
        scene["pairs"],
        scene["condition"],
        scene["advantage"],
        guidance=guidance,
        clip_range=clip_range,
        reference=scene["before"],
        kl_coef=kl_coef,
        kl_kind=divergence[0],
        kl_alpha=divergence[1],
        weights=step_weights(scene["policy"], "std" if weights else "none"),
    )
    result.loss.backward()

    network, reference = (copy.deepcopy(scene[name].network).double() for name in ("after", "before"))
    expected, ratio = published_loss(
        scene,
        trajectory,
        network,
        reference,
        guidance=guidance,
        clip=clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range),
        kl_coef=kl_coef,
        divergence=DIVERGENCES[divergence],
        weights=weights,
    )
    expected.backward()
    assert 0 < result.clip_fraction < 1  # both branches of the surrogate are in the comparison
    torch.testing.assert_close(result.ratio.double(), ratio, rtol=0, atol=1e-4)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    wanted = dict(network.named_parameters())
    scale = max(parameter.grad.abs().max() for parameter in wanted.values())
    for name, parameter in student.network.named_parameters():
        error = (parameter.grad.double() - wanted[name].grad).abs().max() / scale
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_divergence_pulls_the_student_and_leaves_the_reference_alone(scene, guidance):
    student = scene["after"].with_network(copy.deepcopy(scene["after"].network))
    reference = scene["before"].with_network(copy.deepcopy(scene["before"].network))
    arguments = (scene["policy"], scene["trajectory"](guidance), scene["pairs"], scene["condition"])
    result = pair_loss(
        student,
        *arguments,
        torch.zeros(SAMPLES),  # no advantage: the divergence is the whole loss
        guidance=guidance,
        clip_range=0.1,
        reference=reference,
        kl_coef=1.0,
    )
    result.loss.backward()
    assert all(parameter.grad is None for parameter in reference.network.parameters())
    gradient = [parameter.grad for parameter in student.network.parameters()]
    assert all(value is not None for value in gradient)
    assert sum(value.square().sum() for value in gradient) > 0
    # and downhill is towards the reference
    with torch.no_grad():
        for parameter, value in zip(student.network.parameters(), gradient, strict=True):
            parameter.sub_(1e-6 * value)
        nearer = pair_loss(
            student,
            *arguments,
            torch.zeros(SAMPLES),
            guidance=guidance,
            clip_range=0.1,
            reference=reference,
            kl_coef=1.0,
        )
    assert nearer.kl.mean() < result.kl.mean()


def test_the_reference_is_not_run_without_a_coefficient(scene):
    def refuse(*_, **__):
        raise AssertionError("the reference was run")

    reference = scene["before"].with_network(torch.nn.Module())
    reference.network.forward = refuse
    result = pair_loss(
        scene["after"],
        scene["policy"],
        scene["trajectory"](1.0),
        scene["pairs"],
        scene["condition"],
        scene["advantage"],
        guidance=1.0,
        clip_range=0.1,
        reference=reference,
    )
    assert result.kl.tolist() == [0.0] * len(scene["pairs"])


def test_a_batch_of_zero_advantages_has_a_zero_gradient_and_no_nan(scene):
    student = scene["after"].with_network(copy.deepcopy(scene["after"].network))
    result = pair_loss(
        student,
        scene["policy"],
        scene["trajectory"](1.0),
        scene["pairs"],
        scene["condition"],
        torch.zeros(SAMPLES),
        guidance=1.0,
        clip_range=1e-2,
    )
    result.loss.backward()
    assert result.loss == 0
    assert all(bool((parameter.grad == 0).all()) for parameter in student.network.parameters())


def test_std_weights_are_the_std_over_the_mean_std_of_the_stochastic_steps():
    policy = flow_sde_policy([1.0, 0.75, 0.5, 0.25, 0.0], noise_level=0.7, stochastic_steps=[1, 2])
    std = policy.std.tolist()
    mean = (std[1] + std[2]) / 2
    weights = step_weights(policy, "std")
    assert weights.tolist() == pytest.approx([0.0, std[1] / mean, std[2] / mean, 0.0], rel=1e-6)
    assert weights[policy.stochastic].mean() == pytest.approx(1.0)
    assert step_weights(policy, "none") is None
