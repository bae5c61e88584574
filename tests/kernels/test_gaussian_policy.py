import itertools
import math

import pytest
import torch

from engine.kernels import policy_log_prob, policy_sample

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# one element, odd rows, half a block, several programs a row: unaligned (2 of 2048 + 904) and aligned (2048 + 752)
SHAPES = [(1, 1), (3, 2, 5, 7), (2, 1, 8, 8), (2, 5000), (2, 2800)]
MIXTURES = [
    {"dtype": F32},
    {"dtype": BF16},
    {"dtype": F16},
    {"dtype": F32, "pred": BF16, "pred_uncond": F16},
    {"dtype": BF16, "x": F32, "noise": F32, "x_next": F16},
]


def channels_last(batch):
    for name in ("x", "pred", "pred_uncond", "pred_ref", "noise", "x_next"):
        setattr(batch, name, getattr(batch, name).to(memory_format=torch.channels_last))
    return batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("guidance", [None, 1.0, 3.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_the_density_of_the_guided_policy(shape, guidance, reduction, device, truth):
    s = truth.batch(shape, device=device)
    guided = {} if guidance is None else {"pred_uncond": s.pred_uncond, "guidance": guidance}
    log_prob = policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std, **guided, reduction=reduction)
    wide = {key: truth.f64(value) for key, value in guided.items()}
    expected = truth.log_prob(*map(truth.f64, (s.x, s.x_next, s.pred)), s.a, s.b, s.std, **wide, reduction=reduction)
    assert log_prob.dtype == F32
    truth.assert_close(log_prob, expected)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_both_predictions_are_those_of_autograd_in_float64(shape, dtypes, device, truth):
    s = truth.batch(shape, device=device, **dtypes)
    pred, uncond = s.pred.requires_grad_(), s.pred_uncond.requires_grad_()
    log_prob = policy_log_prob(s.x, s.x_next, pred, s.a, s.b, s.std, pred_uncond=uncond, guidance=2.5)
    (log_prob * s.weight).sum().backward()

    wide_pred, wide_uncond = (truth.f64(p).requires_grad_() for p in (pred, uncond))
    expected = truth.log_prob(
        truth.f64(s.x), truth.f64(s.x_next), wide_pred, s.a, s.b, s.std, pred_uncond=wide_uncond, guidance=2.5
    )
    (expected * truth.f64(s.weight)).sum().backward()
    truth.assert_close(log_prob, expected)
    assert (pred.grad.dtype, uncond.grad.dtype) == (pred.dtype, uncond.dtype)
    truth.assert_close(pred.grad, wide_pred.grad)
    truth.assert_close(uncond.grad, wide_uncond.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_passes_gradcheck(reduction, torch_reference, truth):
    s = truth.batch((3, 2, 3), dtype=F64)
    std = torch.tensor([0.7, 0.0, 1.3])

    def log_prob(pred, uncond):
        keywords = {"pred_uncond": uncond, "guidance": 2.5, "reduction": reduction}
        return policy_log_prob(s.x, s.x_next, pred, s.a, -0.4, std, **keywords)

    assert torch.autograd.gradcheck(log_prob, (s.pred.requires_grad_(), s.pred_uncond.requires_grad_()))


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_is_mean_plus_scaled_noise_in_the_dtype_of_x(shape, dtypes, device, truth):
    s = truth.batch(shape, device=device, **dtypes)
    x_next, _ = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise, pred_uncond=s.pred_uncond, guidance=1.5)
    x, pred, uncond = map(truth.f64, (s.x, s.pred, s.pred_uncond))
    policy = truth.policy(x, pred, s.a, s.b, s.std, uncond, 1.5)
    assert x_next.dtype == s.x.dtype
    truth.assert_close(x_next, policy.mean + policy.stddev * truth.f64(s.noise))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rollout_and_update_score_a_step_with_the_same_bits(shape, dtypes, guided, device, truth):
    s = truth.batch(shape, device=device, **dtypes)
    guidance = {"pred_uncond": s.pred_uncond, "guidance": 3.0} if guided else {}
    x_next, log_prob = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise, **guidance)
    again = policy_log_prob(s.x, x_next, s.pred, s.a, s.b, s.std, **guidance)
    assert torch.equal(log_prob, again)
    wide = {"pred_uncond": truth.f64(s.pred_uncond), "guidance": 3.0} if guided else {}
    truth.assert_close(log_prob, truth.log_prob(*map(truth.f64, (s.x, x_next, s.pred)), s.a, s.b, s.std, **wide))


@pytest.mark.parametrize("shape", [(64, 1), (64, 5), (64, 1, 8, 8), (64, 2096)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_sample_has_the_same_bits_in_any_batch(shape, dtype, device, truth):
    s = truth.batch(shape, dtype=dtype, device=device)
    x_next, whole = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise)
    for size, start in itertools.product((1, 3), (0, 7)):
        part = slice(start, start + size)
        step = (s.x[part], s.pred[part], s.a[part], s.b[part], s.std[part])
        some_next, log_prob = policy_sample(*step, noise=s.noise[part])
        assert torch.equal(some_next, x_next[part])
        assert torch.equal(log_prob, whole[part])
        assert torch.equal(policy_log_prob(step[0], x_next[part], *step[1:]), whole[part])


def test_a_row_too_long_for_its_programs_takes_several_rounds(device, truth):
    # 66 blocks, of which 64 programs sum up to two each
    s = truth.batch((1, 65 * 2048 + 5), device=device)
    pred = s.pred.requires_grad_()
    log_prob = policy_log_prob(s.x, s.x_next, pred, s.a, s.b, s.std)
    log_prob.sum().backward()
    wide = truth.f64(pred).requires_grad_()
    expected = truth.log_prob(truth.f64(s.x), truth.f64(s.x_next), wide, s.a, s.b, s.std)
    expected.sum().backward()
    truth.assert_close(log_prob, expected)
    truth.assert_close(pred.grad, wide.grad)


def test_long_rows_keep_their_bits_on_several_threads(torch_reference, truth):
    # torch splits one long reduction over threads, but not several: the very trap of batch size 1
    s = truth.batch((16, 70_001))  # so many samples, as the bits of one may agree by luck
    step = (s.x, s.x_next, s.pred, s.a, s.b, s.std)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = policy_log_prob(*step)
        alone = torch.cat([policy_log_prob(*(t[i : i + 1] for t in step)) for i in range(len(s.x))])
        torch.set_num_threads(1)
        single = policy_log_prob(*step)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)
    assert torch.equal(whole, single)
    truth.assert_close(whole, truth.log_prob(*map(truth.f64, (s.x, s.x_next, s.pred)), s.a, s.b, s.std))


def test_deterministic_steps_are_sampled_and_never_scored(device, truth):
    s = truth.batch((3, 2, 3), device=device)
    s.std[1] = 0
    x_next, log_prob = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise)
    assert torch.equal(x_next[1], s.x[1] * s.a[1] + s.pred[1] * s.b[1])
    assert log_prob[1] == 0
    pred = s.pred.requires_grad_()
    # far from the mean: a step that is not scored must not notice
    log_prob = policy_log_prob(s.x, x_next + 5, pred, s.a, s.b, s.std)
    log_prob.sum().backward()
    assert log_prob[1] == 0
    assert (pred.grad[1] == 0).all()
    assert (pred.grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_channels_last_is_kept_and_scored_alike(dtype, device, truth):
    s = channels_last(truth.batch((2, 3, 4, 5), dtype=dtype, device=device))
    x_next, log_prob = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise)
    assert x_next.stride() == s.x.stride()
    assert torch.equal(policy_log_prob(s.x, x_next, s.pred, s.a, s.b, s.std), log_prob)
    pred = s.pred.requires_grad_()
    policy_log_prob(s.x, x_next, pred, s.a, s.b, s.std).sum().backward()
    assert pred.grad.stride() == pred.stride()
    truth.assert_close(log_prob, truth.log_prob(*map(truth.f64, (s.x, x_next, s.pred)), s.a, s.b, s.std))


def test_inputs_of_different_layouts_agree(device, truth):
    s = truth.batch((3, 4, 6, 5), device=device)
    pred = s.pred.to(memory_format=torch.channels_last).requires_grad_()
    x = s.x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)  # dense, but the batch is not outermost
    x_next = torch.stack([s.x_next, s.x_next], -1)[..., 0]  # not dense
    log_prob = policy_log_prob(x, x_next, pred, s.a, s.b, s.std)
    log_prob.sum().backward()
    wide = truth.f64(pred).requires_grad_()
    expected = truth.log_prob(truth.f64(s.x), truth.f64(s.x_next), wide, s.a, s.b, s.std)
    expected.sum().backward()
    truth.assert_close(log_prob, expected)
    truth.assert_close(pred.grad, wide.grad)
    assert pred.grad.stride() == pred.stride()
    sampled, _ = policy_sample(x, pred, s.a, s.b, s.std, noise=x_next)
    assert sampled.stride() == x.stride()
    assert torch.equal(sampled, policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.x_next)[0])


def test_a_non_contiguous_gradient_of_the_log_prob_is_read_right(device, truth):
    s = truth.batch((4, 6), device=device)
    pred = s.pred.requires_grad_()
    weights = torch.rand(4, 3, device=device)[:, 1]
    policy_log_prob(s.x, s.x_next, pred, s.a, s.b, s.std).backward(weights)
    wide = truth.f64(pred).requires_grad_()
    truth.log_prob(truth.f64(s.x), truth.f64(s.x_next), wide, s.a, s.b, s.std).backward(truth.f64(weights))
    truth.assert_close(pred.grad, wide.grad)


def test_per_sample_scalars_may_be_numbers_or_tensors_of_any_float_dtype(device, truth):
    s = truth.batch((3, 4), device=device)
    step = (s.x, s.x_next, s.pred)
    expected = policy_log_prob(*step, 0.75, -0.5, 0.25)
    for dtype in (F64, F32, BF16):
        numbers = [torch.full((3,), value, dtype=dtype, device=device) for value in (0.75, -0.5, 0.25)]
        assert torch.equal(policy_log_prob(*step, *numbers), expected)
    assert torch.equal(policy_log_prob(*step, *torch.tensor([0.75, -0.5, 0.25], dtype=F64)), expected)
    assert torch.equal(policy_log_prob(*step, 0.75, -0.5, torch.rand(9, device=device)[::3] * 0 + 0.25), expected)


def test_an_empty_batch_samples_and_scores_nothing(device, truth):
    s = truth.batch((0, 2, 3), device=device)
    x_next, log_prob = policy_sample(s.x, s.pred, s.a, s.b, s.std)
    assert (x_next.shape, log_prob.shape) == ((0, 2, 3), (0,))
    pred = s.pred.requires_grad_()
    policy_log_prob(s.x, x_next, pred, s.a, s.b, s.std, pred_uncond=s.pred_uncond, guidance=2.0).sum().backward()
    assert pred.grad.shape == pred.shape


def test_the_generator_decides_the_noise(device, truth):
    s = truth.batch((2, 3, 4), device=device, dtype=BF16)

    def sample(seed):
        return policy_sample(s.x, s.pred, s.a, s.b, s.std, generator=torch.Generator(device).manual_seed(seed))[0]

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    noise = torch.randn(s.x.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    assert torch.equal(sample(1), policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=noise)[0])


def test_sampling_records_no_graph(device, truth):
    s = truth.batch((2, 3), device=device)
    x_next, log_prob = policy_sample(s.x, s.pred.requires_grad_(), s.a, s.b, s.std)
    assert not x_next.requires_grad
    assert not log_prob.requires_grad


def test_only_the_prediction_that_asks_gets_a_gradient(device, truth):
    s = truth.batch((2, 3), device=device)
    uncond = s.pred_uncond.requires_grad_()
    policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std, pred_uncond=uncond, guidance=3.0).sum().backward()
    alone, uncond.grad = uncond.grad, None
    pred = s.pred.requires_grad_()
    policy_log_prob(s.x, s.x_next, pred, s.a, s.b, s.std, pred_uncond=uncond, guidance=3.0).sum().backward()
    assert torch.equal(alone, uncond.grad)
    truth.assert_close(uncond.grad, truth.f64(pred.grad) * (1 - 3.0) / 3.0)


def test_backward_twice_gives_the_same_gradient_twice(device, truth):
    s = truth.batch((2, 70), device=device)
    pred = s.pred.requires_grad_()
    log_prob = policy_log_prob(s.x, s.x_next, pred, s.a, s.b, s.std).sum()
    (first,) = torch.autograd.grad(log_prob, pred, retain_graph=True)
    (second,) = torch.autograd.grad(log_prob, pred)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["x", "x_next", "pred"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_inputs_reach_the_log_prob_of_their_sample_only(name, value, device, truth):
    s = truth.batch((3, 5), device=device)
    getattr(s, name)[1, 2] = value
    finite = policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std).isfinite()
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_next": torch.rand(2, 4)}, ValueError, r"x_next has shape \(2, 4\), but x has \(2, 3\)"),
        ({"pred": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "pred has dtype torch.int64; allowed are float32"),
        ({"pred_uncond": 1.0}, TypeError, "pred_uncond must be a tensor, got float"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\); it must be \(B, ...\)"),
        ({"x": torch.rand(2, 0)}, ValueError, r"x has shape \(2, 0\)"),
        ({"a": torch.rand(3)}, ValueError, r"a has shape \(3,\), but the batch holds 2 samples; pass a scalar or"),
        ({"b": "1"}, TypeError, "b must be a number, got str"),
        ({"std": -0.5}, ValueError, "std=-0.5 is negative; pass a standard deviation >= 0"),
        ({"guidance": math.nan}, ValueError, "guidance=nan must be finite"),
        ({"reduction": "max"}, ValueError, "reduction='max' is unknown; choose one of 'mean', 'sum'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    arguments = {name: torch.rand(2, 3) for name in ("x", "x_next", "pred")} | {"a": 1.0, "b": 1.0, "std": 1.0}
    with pytest.raises(error, match=message):
        policy_log_prob(**(arguments | change))
