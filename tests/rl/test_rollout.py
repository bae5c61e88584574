"""Rollouts: what is drawn, what is recorded of it, and that the update scores the same thing again."""

import copy
import math
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from engine.kernels import policy_log_prob
from engine.models.digits import TEACHER_DIR
from engine.models.pipelines import load_pipeline
from engine.rl import ddim_policy, flow_sde_policy
from engine.rl.losses import pair_loss
from engine.rl.rollout import coefficients, default_ratio_tolerance, first_pass_error, predict_step, rollout

ROWS, GROUP, STEPS = 3, 4, 5
SAMPLES = ROWS * GROUP
SHAPE = (1, 8, 8)


class Watched(nn.Module):
    """A network that remembers how often each latent was put through it, per timestep."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows, self.inputs = network, 0, []

    def forward(self, x, timestep, **condition):
        self.rows += len(x)
        self.inputs.append((x.detach().clone(), timestep.clone(), condition["class_labels"].clone()))
        return self.network(x, timestep, **condition)


class Exact(nn.Module):
    """A network whose fp32 output does not depend on the batch: in fp64 inside, where batches round alike to fp32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).double()

    def forward(self, x, timestep, **condition):
        return self.network(x.double(), timestep, **condition).sample.float()


@pytest.fixture(scope="module")
def denoiser():
    return load_pipeline(TEACHER_DIR).denoiser


@pytest.fixture(scope="module")
def exact(denoiser):
    return denoiser.with_network(Exact(denoiser.network))


def make_policy(denoiser, *, eta=0.6, steps=STEPS, window=None):
    schedule = denoiser.schedule
    return ddim_policy(
        schedule.alphas_cumprod,
        schedule.timesteps(steps),
        eta=eta,
        prediction_type=schedule.prediction_type,
        final_alpha_cumprod=schedule.final_alpha_cumprod,
        stochastic_steps=window,
    )


def start(rows: int = ROWS, *, seed: int = 0):
    initial = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return initial, {"class_labels": torch.arange(rows) * 3 % 10}


def step_noise(step: int, samples: int = SAMPLES):
    return torch.randn(samples, *SHAPE, generator=torch.Generator().manual_seed(1000 + step))


def draw(denoiser, policy, *, guidance=1.0, group_size=GROUP, batch_size=None, noise=step_noise):
    initial, condition = start()
    return rollout(
        denoiser,
        policy,
        initial,
        condition,
        guidance=guidance,
        group_size=group_size,
        step_noise=noise,
        batch_size=batch_size,
    )


def of_samples(condition, group_size=GROUP):
    return {name: value.repeat_interleave(group_size, 0) for name, value in condition.items()}


def shuffled_pairs(trajectory):
    return torch.randperm(len(trajectory.step), generator=torch.Generator().manual_seed(3))


def ratios(denoiser, policy, trajectory, *, guidance, batch_size):
    """Ratios as the update computes them, over shuffled pairs."""
    condition = of_samples(start()[1])
    advantage = torch.ones(SAMPLES)
    return torch.cat(
        [
            pair_loss(
                denoiser, policy, trajectory, pairs, condition, advantage, guidance=guidance, clip_range=0.1
            ).ratio
            for pairs in shuffled_pairs(trajectory).split(batch_size)
        ]
    )


def log_prob_float64(policy, x, x_next, pred, step):
    """The density as it is printed in any book, with the policy's float64 coefficients."""
    a, b, std = (getattr(policy, name)[step].view(-1, 1, 1, 1) for name in ("a", "b", "std"))
    mean = a * x.double() + b * pred.double()
    density = -((x_next.double() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


# rule 1: rollout and update run the same function


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", [None, (0,), (1, 2)])
@pytest.mark.parametrize(("drawn_in", "updated_in"), [(None, 1), (5, 48)])
def test_ratio_is_one_before_the_first_update(exact, guidance, window, drawn_in, updated_in):
    policy = make_policy(exact, window=window)
    trajectory = draw(exact, policy, guidance=guidance, batch_size=drawn_in)
    ratio = ratios(exact, policy, trajectory, guidance=guidance, batch_size=updated_in)
    assert len(ratio) == SAMPLES * int(policy.stochastic.sum())
    assert (ratio - 1).abs().max() <= 1e-6


def test_ratio_is_one_before_the_first_update_of_a_flow(exact):
    policy = flow_sde_policy(torch.linspace(1, 0, STEPS + 1, dtype=torch.float64), noise_level=0.7)
    trajectory = draw(exact, policy, guidance=2.0, batch_size=5)
    assert (ratios(exact, policy, trajectory, guidance=2.0, batch_size=11) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("drawn_in", "updated_in"), [(None, 1), (1, 48), (5, 7)])
def test_ratio_error_of_an_fp32_unet_is_its_rounding_in_other_batches(denoiser, guidance, drawn_in, updated_in):
    # Its prediction differs by 2e-7 from one batch size to another, and a step multiplies that by |b| / std: by 10
    # at the first step, by 240 at the last scored one (t = 200 -> 0). Seen: 1.7e-6 and 4.9e-5; equal batches give 0.
    policy = make_policy(denoiser, eta=0.3)
    trajectory = draw(denoiser, policy, guidance=guidance, batch_size=drawn_in)
    error = (ratios(denoiser, policy, trajectory, guidance=guidance, batch_size=updated_in) - 1).abs()
    amplification = (policy.b.abs() / policy.std)[trajectory.step[shuffled_pairs(trajectory)]]
    assert (error / amplification).max() <= 1e-6


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ratio_without_the_guidance_of_the_rollout_is_far_from_one(denoiser, guidance):
    policy = make_policy(denoiser)
    trajectory = draw(denoiser, policy, guidance=guidance)
    ratio = ratios(denoiser, policy, trajectory, guidance=2.0, batch_size=48)
    assert (ratio - 1).abs().max() > 0.05


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("drawn_in", "updated_in"), [(None, 1), (1, 48), (5, 7)])
def test_ratio_error_of_a_bf16_unet_is_within_the_stated_tolerance(denoiser, guidance, drawn_in, updated_in):
    half = denoiser.with_network(copy.deepcopy(denoiser.network).bfloat16())
    policy = make_policy(half, eta=0.3)
    trajectory = draw(half, policy, guidance=guidance, batch_size=drawn_in)
    error = (ratios(half, policy, trajectory, guidance=guidance, batch_size=updated_in) - 1).abs().max()
    # 0.05 is the trainer's bound. Seen on a CPU: 0, as all its batches round to the same bf16.
    assert error <= 0.05


def test_first_pass_error_is_the_largest_ratio_error_of_the_update(exact):
    policy = make_policy(exact)
    trajectory = draw(exact, policy, guidance=2.0)
    arguments = {"guidance": 2.0, "batch_size": 7}
    condition = of_samples(start()[1])
    assert first_pass_error(exact, policy, trajectory, condition, **arguments) <= 1e-6
    moved = copy.deepcopy(exact.network)
    with torch.no_grad():
        moved.network.conv_out.weight.mul_(1.001)
    student = exact.with_network(moved)
    found = first_pass_error(student, policy, trajectory, condition, **arguments)
    expected = (ratios(student, policy, trajectory, **arguments) - 1).abs().max().item()
    assert expected > 1e-3
    assert found == pytest.approx(expected, rel=1e-3)


def test_first_pass_error_of_a_network_that_gives_nan_is_infinite(denoiser):
    policy = make_policy(denoiser)
    trajectory = draw(denoiser, policy)
    broken = copy.deepcopy(denoiser.network)
    nn.init.constant_(broken.conv_out.bias, math.nan)
    condition = of_samples(start()[1])
    error = first_pass_error(denoiser.with_network(broken), policy, trajectory, condition, guidance=1.0, batch_size=16)
    assert error == math.inf


# rule 2: the log-prob is of the stored tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_is_the_density_of_the_stored_tensors(denoiser, dtype):
    student = denoiser.with_network(copy.deepcopy(denoiser.network).to(dtype))
    policy = make_policy(student)
    trajectory = draw(student, policy)
    pred, _ = predict_step(
        student,
        policy,
        trajectory.latents,
        trajectory.step,
        {"class_labels": of_samples(start()[1])["class_labels"][trajectory.sample]},
        1.0,
    )
    expected = log_prob_float64(policy, trajectory.latents, trajectory.next_latents, pred, trajectory.step)
    # the prediction is made again here in another batch; in fp32 that is 2e-7 |b| / std, see above
    torch.testing.assert_close(trajectory.log_prob.double(), expected, rtol=0, atol=5e-5)


def test_log_prob_is_of_the_rounded_sample_even_where_rounding_is_larger_than_the_noise(denoiser):
    # std is about 1e-7, and so are the steps of fp32 next to 1: what is stored is not the noise that was asked for
    policy = make_policy(denoiser, eta=2e-7)
    trajectory = draw(denoiser, policy)
    step = trajectory.step
    asked = torch.cat([step_noise(i) for i in policy.stochastic.nonzero().flatten().tolist()]).double()
    std = policy.std[step]
    before_rounding = (-(asked**2) / 2).flatten(1).mean(1) - std.log() - 0.5 * math.log(2 * math.pi)
    assert (trajectory.log_prob.double() - before_rounding).abs().max() > 0.01
    for i in step.unique().tolist():
        here = step == i
        x, x_next, labels = trajectory.latents[here], trajectory.next_latents[here], of_samples(start()[1])
        pred, _ = predict_step(denoiser, policy, x, i, labels, 1.0)  # the very batch of the rollout
        scored = policy_log_prob(x, x_next, pred, *coefficients(policy, step[here]))
        assert torch.equal(scored, trajectory.log_prob[here])


# rule 3: a deterministic step is sampled, never scored


@pytest.mark.parametrize(("window", "scored"), [(None, {0, 1, 2, 3}), ((0,), {0}), ((1, 2), {1, 2}), ((3,), {3})])
def test_only_stochastic_steps_are_recorded(denoiser, window, scored):
    policy = make_policy(denoiser, window=window)  # its last step, to the image itself, has std 0
    trajectory = draw(denoiser, policy)
    assert set(trajectory.step.tolist()) == scored
    counts = Counter(zip(trajectory.sample.tolist(), trajectory.step.tolist(), strict=True))
    assert counts == {(sample, step): 1 for sample in range(SAMPLES) for step in scored}
    for tensor in (trajectory.latents, trajectory.next_latents, trajectory.log_prob, trajectory.final):
        assert bool(tensor.isfinite().all())
        assert not tensor.requires_grad
    # a step that is sampled though not scored: what follows the last scored latent moves on
    last = trajectory.next_latents[trajectory.step == max(scored)]
    assert (trajectory.final - last).abs().max() > 0.01


def test_a_policy_of_deterministic_steps_alone_has_no_pairs_and_asks_for_no_noise(denoiser):
    policy = make_policy(denoiser, eta=0.0)
    trajectory = draw(denoiser, policy, noise=None)
    assert trajectory.log_prob.shape == trajectory.sample.shape == trajectory.step.shape == (0,)
    assert trajectory.latents.shape == trajectory.next_latents.shape == (0, *SHAPE)
    assert trajectory.final.shape == (SAMPLES, *SHAPE)
    assert bool(trajectory.final.isfinite().all())


def test_noise_is_asked_for_stochastic_steps_only(denoiser):
    asked = []

    def noise(step):
        asked.append(step)
        return step_noise(step)

    draw(denoiser, make_policy(denoiser, window=(1, 2)), noise=noise)
    assert asked == [1, 2]


# groups


def test_samples_of_a_group_are_contiguous_and_start_from_the_noise_of_their_row(denoiser):
    trajectory = draw(denoiser, make_policy(denoiser))
    initial, _ = start()
    first = trajectory.step == 0
    assert trajectory.sample[first].tolist() == list(range(SAMPLES))
    for sample, x in zip(trajectory.sample[first].tolist(), trajectory.latents[first], strict=True):
        assert torch.equal(x, initial[sample // GROUP])
    assert len(trajectory.next_latents[first].unique(dim=0)) == SAMPLES  # and part at once


def test_every_latent_is_predicted_with_the_condition_of_its_row(denoiser):
    network = Watched(denoiser.network)
    draw(denoiser.with_network(network), make_policy(denoiser), guidance=2.0)
    labels = of_samples(start()[1])["class_labels"].tolist()
    _, _, at_last_step = network.inputs[-1]
    assert at_last_step.tolist() == labels + [denoiser.classes] * SAMPLES  # both halves of guidance in one pass


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("window", [(0,), (2,), (1, 3)])
def test_the_shared_prefix_changes_no_sample(denoiser, guidance, window):
    policy = make_policy(denoiser, window=window)
    shared = draw(denoiser, policy, guidance=guidance)
    initial, condition = start()
    separate = rollout(
        denoiser,
        policy,
        initial.repeat_interleave(GROUP, 0),
        of_samples(condition),
        guidance=guidance,
        step_noise=step_noise,
    )
    for name in ("sample", "step"):
        assert torch.equal(getattr(shared, name), getattr(separate, name))
    for name in ("latents", "next_latents", "log_prob", "final"):
        torch.testing.assert_close(getattr(shared, name), getattr(separate, name), rtol=0, atol=1e-5)


# independence of the computation's batches


def test_step_noise_is_addressed_so_batch_size_changes_nothing(denoiser):
    policy = make_policy(denoiser, window=(1, 2))
    whole = draw(denoiser, policy)
    for batch_size in (1, 5, SAMPLES):
        parts = draw(denoiser, policy, batch_size=batch_size)
        assert parts.passes == whole.passes
        for name in ("sample", "step"):
            assert torch.equal(getattr(parts, name), getattr(whole, name))
        for name in ("latents", "next_latents", "log_prob", "final"):
            # convolutions of other batch sizes round differently; other noise would differ by 1
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-5)


# against diffusers


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_rollout_at_eta_0_is_the_ddim_loop_of_diffusers(denoiser, guidance):
    scheduler = DDIMScheduler.from_pretrained(TEACHER_DIR, subfolder="scheduler")
    scheduler.set_timesteps(10)
    initial, condition = start()
    labels = condition["class_labels"]
    x = initial.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            pred = denoiser.network(x, t, class_labels=labels).sample
            if guidance != 1:
                uncond = denoiser.network(x, t, class_labels=torch.full_like(labels, 10)).sample
                pred = uncond + guidance * (pred - uncond)
            x = scheduler.step(pred, t, x, eta=0.0).prev_sample
    ours = rollout(denoiser, make_policy(denoiser, eta=0.0, steps=10), initial, condition, guidance=guidance)
    torch.testing.assert_close(ours.final, x, rtol=0, atol=1e-4)  # its tables are fp32


# passes


@pytest.mark.parametrize(("guidance", "per_latent"), [(1.0, 1), (2.0, 2)])
@pytest.mark.parametrize(
    ("window", "latents"),
    [(None, STEPS * SAMPLES), ((0,), STEPS * SAMPLES), ((2,), 2 * ROWS + 3 * SAMPLES), ((), STEPS * ROWS)],
)
def test_passes_are_the_rows_that_went_through_the_network(denoiser, guidance, per_latent, window, latents):
    network = Watched(denoiser.network)
    trajectory = draw(
        denoiser.with_network(network), make_policy(denoiser, window=window), guidance=guidance, batch_size=5
    )
    assert trajectory.passes == network.rows == latents * per_latent


def test_the_default_tolerance_follows_what_a_step_makes_of_rounding():
    alphas = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    mild, steep = (ddim_policy(alphas, torch.tensor(steps), eta=1.0) for steps in ([900, 500], [900, 500, 1, 0]))
    worst = max(abs(b) / s for b, s in zip(steep.b.tolist(), steep.std.tolist(), strict=True) if s > 0)
    assert default_ratio_tolerance(steep, "fp32") == pytest.approx(max(1e-5, 1e-6 * worst))
    assert default_ratio_tolerance(mild, "fp32") == 1e-5
    assert default_ratio_tolerance(steep, "bf16") == 0.05
