"""The samplers' coefficients against diffusers, against closed forms, and on schedules drawn at random."""

import math
from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rl import (
    GaussianPolicy,
    cps_policy,
    dance_sde_policy,
    ddim_policy,
    edm_ancestral_policy,
    flow_sde_policy,
    renoise_policy,
)
from engine.rl.policies import PREDICTION_TYPES

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW_BUILDERS = {
    "flow_sde": lambda sigmas, level, **k: flow_sde_policy(sigmas, noise_level=level, **k),
    "dance_sde": lambda sigmas, level, **k: dance_sde_policy(sigmas, eta=level, **k),
    "cps": lambda sigmas, level, **k: cps_policy(sigmas, noise_level=level, **k),
}
BUILDERS = FLOW_BUILDERS | {"edm_ancestral": lambda sigmas, level, **k: edm_ancestral_policy(sigmas, eta=level, **k)}


def linear_alphas(train_timesteps: int = 1000) -> torch.Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, train_timesteps, dtype=torch.float64), 0)


def karras_sigmas(steps: int) -> torch.Tensor:
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def step(policy: GaussianPolicy, index: int, x: torch.Tensor, pred: torch.Tensor, noise: torch.Tensor):
    return policy.a[index] * x + policy.b[index] * pred + policy.std[index] * noise


# DDIM against diffusers


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_is_the_step_of_diffusers(prediction_type, eta, set_alpha_to_one, spacing):
    scheduler = DDIMScheduler(
        **SD15,
        prediction_type=prediction_type,
        set_alpha_to_one=set_alpha_to_one,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
        clip_sample=False,
    )
    scheduler.set_timesteps(5)
    # its table is fp32, where 1 - alpha of the last timesteps keeps four digits; the formulas are compared in fp64
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    steps = scheduler.timesteps
    policy = ddim_policy(
        scheduler.alphas_cumprod,
        steps,
        eta=eta,
        prediction_type=prediction_type,
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
    )
    generator = torch.Generator().manual_seed(0)
    x, pred, noise = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    following = [*steps[1:].tolist(), None]
    for index, (t, t_next) in enumerate(zip(steps.tolist(), following, strict=True)):
        if spacing == "linspace" and t_next is not None:
            # diffusers steps back by train // steps, which misses the next kept timestep of this spacing by one
            scheduler.num_inference_steps = Fraction(1000, t - t_next)
        theirs = scheduler.step(pred, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        torch.testing.assert_close(step(policy, index, x, pred, noise), theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(policy.timesteps, steps)


def test_sd15_at_eta_1_has_the_stds_that_ddpo_trains_on():
    # ddpo-pytorch clamps the timestep before the first to 0: the final alpha is alphas_cumprod[0], also SD1.5's own
    # set_alpha_to_one=False, and not 1.
    alphas = DDIMScheduler(**SD15).alphas_cumprod
    policy = ddim_policy(alphas, [801, 601, 401, 201, 1], eta=1.0, final_alpha_cumprod=float(alphas[0]))
    assert policy.std.tolist() == pytest.approx([0.820, 0.654, 0.434, 0.0412, 0.0206], rel=0.02)
    assert (policy.b / policy.std).tolist() == pytest.approx([-2.0, -1.7, -1.8, -13.9, -1.0], abs=0.06)


def test_sd15_towards_the_clean_image_ends_deterministically():
    policy = ddim_policy(DDIMScheduler(**SD15).alphas_cumprod, [801, 601, 401, 201, 1], eta=1.0)
    assert policy.stochastic.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_starts_from_pure_noise(prediction_type):
    alphas = linear_alphas().clone()
    alphas[-1] = 0.0
    policy = ddim_policy(alphas, [999, 500, 0], eta=1.0, prediction_type=prediction_type)
    assert policy.std[0] == pytest.approx(math.sqrt(1 - alphas[500]))
    assert bool(policy.a.isfinite().all() & policy.b.isfinite().all())


def test_a_last_step_that_goes_nowhere_keeps_the_latent():
    alphas = linear_alphas()
    policy = ddim_policy(alphas, [500, 0], eta=1.0, final_alpha_cumprod=float(alphas[0]))
    assert (policy.a[-1].item(), policy.b[-1].item(), policy.std[-1].item()) == (1.0, 0.0, 0.0)


# The renoising sampler against diffusers


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [[999, 799, 599, 399, 199], [900, 450, 3, 1, 0], [700]])
def test_renoising_is_the_step_of_stock_lcm(prediction_type, steps):
    scheduler = LCMScheduler(**SD15, prediction_type=prediction_type)
    scheduler.set_timesteps(timesteps=steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    policy = renoise_policy(scheduler.alphas_cumprod, steps, prediction_type=prediction_type)
    x, pred = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index, timestep in enumerate(steps):
        theirs = scheduler.step(pred, timestep, x, torch.Generator().manual_seed(index), return_dict=False)[0]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index), dtype=x.dtype)
        torch.testing.assert_close(step(policy, index, x, pred, noise), theirs, rtol=1e-10, atol=1e-10)
    assert policy.stochastic.tolist() == [True] * (len(steps) - 1) + [False]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_renoising_outside_its_window_is_a_deterministic_ddim_step(prediction_type):
    # from timestep 19 on, the predicted image is the network's own but for 1e-5 of the latent
    alphas, steps = linear_alphas(), [999, 599, 199]
    window = renoise_policy(alphas, steps, prediction_type=prediction_type, stochastic_steps=[1])
    ddim = ddim_policy(alphas, steps, eta=0.0, prediction_type=prediction_type)
    assert window.stochastic.tolist() == [False, True, False]
    for name in ("a", "b", "std"):
        torch.testing.assert_close(getattr(window, name)[[0, 2]], getattr(ddim, name)[[0, 2]], rtol=0, atol=1e-6)


def test_renoising_of_a_flow_is_the_stochastic_step_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(5)
    policy = cps_policy(scheduler.sigmas.double(), noise_level=1.0)
    x, pred = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(scheduler.timesteps):
        generator = torch.Generator().manual_seed(index)
        theirs = scheduler.step(pred, timestep, x, generator=generator, return_dict=False)[0]
        noise = torch.randn(x.shape, generator=generator.manual_seed(index))
        torch.testing.assert_close(step(policy, index, x, pred, noise), theirs, rtol=0, atol=1e-5)


# What every sampler must keep: the marginals of the noising process


def descending(largest: int):
    return st.lists(st.integers(0, largest), min_size=2, max_size=12, unique=True).map(
        lambda s: sorted(s, reverse=True)
    )


schedules = descending(999)
flow_sigmas = descending(10**6).map(lambda s: [value / 10**6 for value in s])
edm_sigmas = descending(10**6).map(lambda s: [80 * value / 10**6 for value in s])


@settings(max_examples=60, deadline=None)
@given(steps=schedules, eta=st.floats(0, 1), prediction_type=st.sampled_from(PREDICTION_TYPES))
def test_ddim_keeps_signal_and_total_noise_for_any_eta(steps, eta, prediction_type):
    alphas = linear_alphas()
    policy = ddim_policy(alphas, steps, eta=eta, prediction_type=prediction_type)
    a_t, a_s = alphas[steps], torch.cat([alphas[steps][1:], torch.ones(1, dtype=torch.float64)])
    # x = sqrt(A) x0 + sqrt(1 - A) eps, and the prediction in the same two coordinates
    signal = {"epsilon": 0 * a_t, "v_prediction": -torch.sqrt(1 - a_t), "sample": torch.ones_like(a_t)}[prediction_type]
    noise = {"epsilon": torch.ones_like(a_t), "v_prediction": a_t.sqrt(), "sample": 0 * a_t}[prediction_type]
    torch.testing.assert_close(policy.a * a_t.sqrt() + policy.b * signal, a_s.sqrt(), rtol=0, atol=1e-9)
    kept = policy.a * torch.sqrt(1 - a_t) + policy.b * noise
    torch.testing.assert_close(kept**2 + policy.std**2, 1 - a_s, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(steps=schedules, eta=st.floats(0, 1), prediction_type=st.sampled_from(PREDICTION_TYPES))
def test_renoising_keeps_the_total_noise_of_what_it_takes_for_the_image(steps, eta, prediction_type):
    alphas = linear_alphas()
    policy = renoise_policy(alphas, steps, eta=eta, prediction_type=prediction_type)
    a_t, a_s = alphas[steps], torch.cat([alphas[steps][1:], torch.ones(1, dtype=torch.float64)])
    # a prediction that says: the image is 0.3, in the two coordinates image 0.3 and noise 1, and all of x is noise
    image, noise = 0.3, (1 - 0.3 * a_t.sqrt()) / (1 - a_t).sqrt()
    pred = {"epsilon": noise, "v_prediction": a_t.sqrt() * noise - (1 - a_t).sqrt() * image, "sample": image}
    scaled = 10.0 * torch.tensor(steps, dtype=torch.float64)
    # c_skip x + c_out image, with x = 1
    predicted = (0.25 + image * scaled * (scaled**2 + 0.25).sqrt()) / (scaled**2 + 0.25)
    mean = policy.a + policy.b * pred[prediction_type]
    kept = (1 - predicted * a_t.sqrt()) / (1 - a_t).sqrt()
    expected = a_s.sqrt() * predicted + (1 - a_s).sqrt() * math.sqrt(1 - eta**2) * kept
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(policy.std, eta * (1 - a_s).sqrt())


@settings(max_examples=60, deadline=None)
@given(sigmas=flow_sigmas, level=st.floats(0, 1))
def test_cps_keeps_the_coefficients_of_the_schedule(sigmas, level):
    policy = cps_policy(sigmas, noise_level=level)
    sigma, sigma_next = torch.tensor(sigmas[:-1], dtype=torch.float64), torch.tensor(sigmas[1:], dtype=torch.float64)
    # x = (1 - sigma) x0 + sigma n, v = n - x0
    torch.testing.assert_close(policy.a * (1 - sigma) - policy.b, 1 - sigma_next, rtol=0, atol=1e-12)
    kept = policy.a * sigma + policy.b
    torch.testing.assert_close(kept**2 + policy.std**2, sigma_next**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.2])
def test_a_flow_sde_keeps_the_marginal_of_gaussian_data_to_first_order(kind, sigma):
    data_variance = 0.3

    def marginal(s):
        return (1 - s) ** 2 * data_variance + s**2

    def error(d):
        policy = FLOW_BUILDERS[kind]([sigma, sigma - d], 0.7)
        velocity = (sigma - (1 - sigma) * data_variance) / marginal(sigma)  # E[n - x0 | x] = velocity * x
        variance = (policy.a + policy.b * velocity) ** 2 * marginal(sigma) + policy.std**2
        return abs(float(variance) - marginal(sigma - d))

    assert error(1e-3) < 2e-5
    assert error(1e-3) / error(5e-4) == pytest.approx(4, rel=0.02)  # the error of one step is O(D^2)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_a_flow_sde_drifts_by_half_its_variance_along_the_score(kind):
    # For x = (1 - sigma) x0 + sigma n the score is -(x + (1 - sigma) v) / sigma (Flow-GRPO).
    sigmas = torch.tensor([0.95, 0.8, 0.4, 0.1], dtype=torch.float64)
    sigma = sigmas[:-1]
    noisy, ode = FLOW_BUILDERS[kind](sigmas, 0.7), FLOW_BUILDERS[kind](sigmas, 0.0)
    half = noisy.std**2 / 2
    torch.testing.assert_close(noisy.a - ode.a, half * (-1 / sigma))
    torch.testing.assert_close(noisy.b - ode.b, half * (-(1 - sigma) / sigma))


@settings(max_examples=60, deadline=None)
@given(sigmas=edm_sigmas, eta=st.floats(0, 3))
def test_edm_keeps_signal_and_total_noise_for_any_eta(sigmas, eta):
    policy = edm_ancestral_policy(sigmas, eta=eta)
    sigma, sigma_next = torch.tensor(sigmas[:-1], dtype=torch.float64), torch.tensor(sigmas[1:], dtype=torch.float64)
    # x = x0 + sigma n and f = x0: the signal's weight is a + b, the noise's a sigma
    torch.testing.assert_close(policy.a + policy.b, torch.ones_like(sigma))
    torch.testing.assert_close((policy.a * sigma) ** 2 + policy.std**2, sigma_next**2, rtol=1e-9, atol=1e-12)


def test_edm_is_the_formula_of_the_reference():
    sigmas = karras_sigmas(6)
    for eta in (0.0, 0.3, 1.0):
        policy = edm_ancestral_policy(sigmas, eta=eta)
        for index, (now, after) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
            up = min(after, eta * math.sqrt(after**2 * (now**2 - after**2) / now**2))
            down = math.sqrt(after**2 - up**2)
            assert policy.std[index].item() == pytest.approx(up, rel=1e-6)
            assert policy.a[index].item() == pytest.approx(down / now, rel=1e-6)
            assert policy.b[index].item() == pytest.approx(1 - down / now, rel=1e-6)


def test_edm_at_eta_1_with_four_steps_throws_the_direction_away():
    sigmas = karras_sigmas(4)
    policy = edm_ancestral_policy(sigmas, eta=1.0)
    assert (policy.a * sigmas[:-1]).tolist() == pytest.approx([3.84, 0.361, 0.0115, 2.4e-5], rel=0.03)
    gentle = edm_ancestral_policy(sigmas, eta=0.3)
    assert (gentle.a * sigmas[:-1]).tolist() == pytest.approx([16.8, 2.40, 0.162, 0.0019], rel=0.01)


# The deterministic samplers


@pytest.mark.parametrize("kind", FLOW_BUILDERS)
def test_flow_policies_without_noise_are_the_euler_step_of_diffusers(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    policy = FLOW_BUILDERS[kind](scheduler.sigmas, 0.0)
    generator = torch.Generator().manual_seed(0)
    x, velocity, noise = torch.randn(3, 2, 3, 4, 4, generator=generator)
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        torch.testing.assert_close(step(policy, index, x, velocity, noise), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.timesteps, scheduler.timesteps.double(), rtol=1e-6, atol=0)
    assert not bool(policy.stochastic.any())


def test_flow_sde_starts_at_sigma_1_with_the_next_sigma_below_the_fraction():
    policy = flow_sde_policy([1.0, 0.75, 0.5], noise_level=0.8)
    q = [0.8 * math.sqrt(1 / 0.25), 0.8 * math.sqrt(0.75 / 0.25)]
    assert policy.std.tolist() == pytest.approx([q[0] * 0.5, q[1] * 0.5])
    assert policy.a.tolist() == pytest.approx([1 - q[0] ** 2 * 0.25 / 2, 1 - q[1] ** 2 * 0.25 / 1.5])
    assert policy.b.tolist() == pytest.approx([-0.25, -0.25 * (1 + q[1] ** 2 * 0.25 / 1.5)])


def test_a_single_flow_step_from_noise_to_image_is_finite():
    for kind, build in FLOW_BUILDERS.items():
        policy = build([1.0, 0.0], 0.5)
        assert bool(policy.a.isfinite().all()), kind


def test_cps_and_edm_are_deterministic_into_the_clean_image_and_the_sdes_are_not():
    sigmas = [1.0, 0.5, 0.0]
    ends = {kind: bool(build(sigmas, 0.5).stochastic[-1]) for kind, build in BUILDERS.items()}
    assert ends == {"flow_sde": True, "dance_sde": True, "cps": False, "edm_ancestral": False}


# All samplers: no nan, windows, errors


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(list(BUILDERS)), sigmas=flow_sigmas, level=st.floats(0, 1))
def test_coefficients_are_finite_float64_and_zero_noise_is_deterministic(kind, sigmas, level):
    policy = BUILDERS[kind](sigmas, level)
    for vector in (policy.a, policy.b, policy.std):
        assert vector.dtype == torch.float64
        assert vector.shape == (len(sigmas) - 1,)
        assert bool(vector.isfinite().all())
    assert bool((policy.std >= 0).all())
    assert not bool(BUILDERS[kind](sigmas, 0.0).stochastic.any())


@pytest.mark.parametrize("kind", BUILDERS)
def test_steps_outside_of_the_window_are_the_deterministic_sampler(kind):
    sigmas = [0.99, 0.7, 0.4, 0.1]
    noisy, ode = BUILDERS[kind](sigmas, 0.6), BUILDERS[kind](sigmas, 0.0)
    window = BUILDERS[kind](sigmas, 0.6, stochastic_steps=[1])
    assert window.stochastic.tolist() == [False, True, False]
    for name in ("a", "b", "std"):
        expected = torch.where(window.stochastic, getattr(noisy, name), getattr(ode, name))
        assert torch.equal(getattr(window, name), expected), name
    assert not torch.equal(noisy.a, ode.a)  # or the window would have nothing to change


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_steps_outside_of_the_window_are_eta_0(prediction_type):
    arguments = {"alphas_cumprod": linear_alphas(), "timesteps": [900, 500, 100], "prediction_type": prediction_type}
    window = ddim_policy(**arguments, eta=0.8, stochastic_steps=[0])
    noisy, still = ddim_policy(**arguments, eta=0.8), ddim_policy(**arguments, eta=0.0)
    assert window.stochastic.tolist() == [True, False, False]
    assert (window.b[0], window.std[0]) == (noisy.b[0], noisy.std[0])
    assert torch.equal(window.b[1:], still.b[1:])
    assert ddim_policy(**arguments, eta=0.8, stochastic_steps=[]).stochastic.sum() == 0


def test_noise_above_ddims_room_is_an_error_only_where_it_is_asked_for():
    alphas = linear_alphas()
    with pytest.raises(ValueError, match=r"eta=1.5 .*eta <= 1 is always allowed"):
        ddim_policy(alphas, [900, 500, 100], eta=1.5)
    assert bool(ddim_policy(alphas, [900, 899, 898], eta=1.5).stochastic[0])  # close steps leave room above 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddim_policy(linear_alphas(), [5, 1], eta=-0.1), r"eta=-0.1 must be a finite number >= 0"),
        (lambda: ddim_policy(linear_alphas(), [5, 1], eta=math.nan), r"eta=nan"),
        (lambda: ddim_policy(linear_alphas(), [1, 5], eta=0), r"timesteps must descend strictly, got \[1, 5\]"),
        (lambda: ddim_policy(linear_alphas(), [5, 5], eta=0), r"descend strictly"),
        (lambda: ddim_policy(linear_alphas(), [1000, 5], eta=0), r"integers in 0..999"),
        (lambda: ddim_policy(linear_alphas(), [5.5, 1], eta=0), r"integers in 0..999"),
        (lambda: ddim_policy(linear_alphas(), [], eta=0), r"timesteps is empty"),
        (
            lambda: ddim_policy(linear_alphas(), [5, 1], eta=0, prediction_type="v"),
            r"'v' is not one of epsilon,",
        ),
        (lambda: ddim_policy(linear_alphas(), [5, 1], eta=0, final_alpha_cumprod=0.0), r"final_alpha_cumprod=0.0"),
        (lambda: ddim_policy(linear_alphas(), [5, 1], eta=0, final_alpha_cumprod=0.5), r"must remove noise"),
        (lambda: ddim_policy(linear_alphas().flip(0), [5, 1], eta=0), r"must remove noise"),
        (lambda: ddim_policy([0.9, 0.0], [1, 0], eta=0), r"alphas_cumprod is 0 at timestep 1.*v_prediction"),
        (lambda: ddim_policy([1.0, 0.9], [1, 0], eta=0), r"alphas_cumprod must be in \[0, 1\)"),
        (lambda: ddim_policy(torch.ones(2, 2), [1, 0], eta=0), r"one vector of finite numbers, got shape \(2, 2\)"),
        (lambda: ddim_policy(linear_alphas(), [5, 1], eta=1, stochastic_steps=[2]), r"\[2\] are not among .*0..1"),
        (lambda: flow_sde_policy([1.0], noise_level=0.5), r"sigmas has 1 entries"),
        (lambda: flow_sde_policy([0.0, 1.0], noise_level=0.5), r"descend strictly"),
        (lambda: flow_sde_policy([2.0, 1.0], noise_level=0.5), r"sigmas must be in \[0, 1\]"),
        (lambda: flow_sde_policy([1.0, math.nan], noise_level=0.5), r"finite"),
        (lambda: flow_sde_policy([1.0, 0.5], noise_level=-1), r"noise_level=-1"),
        (lambda: dance_sde_policy([1.0, 0.5], eta=math.inf), r"eta=inf"),
        (lambda: cps_policy([1.0, 0.5], noise_level=1.5), r"noise_level=1.5 must be in \[0, 1\]"),
        (lambda: edm_ancestral_policy([80.0, -1.0], eta=0), r"sigmas must be >= 0"),
        (lambda: edm_ancestral_policy([80.0, 1.0], eta=1, stochastic_steps=[-1]), r"stochastic_steps \[-1\]"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_policy_of_unequal_or_unusable_vectors_is_refused():
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="four vectors of one length"):
        GaussianPolicy(ones, ones, ones[:2], ones)
    with pytest.raises(ValueError, match="std must be >= 0"):
        GaussianPolicy(ones, ones, ones, -ones)
    with pytest.raises(ValueError, match="b must be finite float64"):
        GaussianPolicy(ones, ones, ones.float(), ones)
