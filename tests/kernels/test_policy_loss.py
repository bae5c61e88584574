import math

import pytest
import torch

from engine.kernels import PolicyLoss, policy_log_prob, policy_loss, policy_sample
from engine.kernels.policy_loss import LOG_RATIO_LIMIT

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(1, 1), (3, 2, 5, 7), (35, 3), (2, 5000)]
CASES = [
    {},
    {"guidance": 3.0},
    {"weight": True, "clip_range": (0.01, 0.03)},
    {"pred_ref": True},  # reported, not penalised
    {"pred_ref": True, "kl_coef": 0.3, "guidance": 2.0, "weight": True},
    {"pred_ref": True, "kl_coef": 0.3, "kl_kind": "renyi", "kl_alpha": 0.5, "clip_range": 0.01},
    {"pred_ref": True, "kl_coef": 0.3, "kl_kind": "chi2", "reduction": "sum"},
    {"pred_ref": True, "kl_coef": 0.3, "kl_kind": "power", "kl_alpha": 0.5, "clip_range": 0.01},
]


def both_losses(s, case, truth):
    """(ours, the float64 truth, ours' leaves, the truth's leaves), the old policy being a little off."""
    case = dict(case)
    leaves = [s.pred.requires_grad_()]
    keywords = {}
    if "guidance" in case:
        leaves.append(s.pred_uncond.requires_grad_())
        keywords["pred_uncond"] = s.pred_uncond
    if case.get("reduction") == "sum":
        s.pred_ref = (s.pred + (s.pred_ref - s.pred) / math.prod(s.x.shape[1:]) ** 0.5).detach()
    for name in ("weight", "pred_ref"):
        if case.pop(name, False):
            keywords[name] = getattr(s, name)
    step = (s.x, s.x_next, s.pred, s.a, s.b, s.std)
    names = ("pred_uncond", "guidance", "reduction")
    scoring = {key: value for key, value in (keywords | case).items() if key in names}
    old = policy_log_prob(*step, **scoring).detach() + s.shift
    ours = policy_loss(*step, old, s.advantage, **keywords, **case)

    wide = [truth.f64(leaf).requires_grad_() for leaf in leaves]
    keywords = {key: truth.f64(value) for key, value in keywords.items()}
    if len(wide) == 2:
        keywords["pred_uncond"] = wide[1]
    rows = (s.a, s.b, s.std, truth.f64(old), truth.f64(s.advantage))
    expected = truth.loss(truth.f64(s.x), truth.f64(s.x_next), wide[0], *rows, **keywords, **case)
    return ours, expected, leaves, wide


def ratio_tolerance(expected):
    """The ratio's relative error, and so the loss's, is the absolute error of the log-prob: it grows with its size."""
    return 5e-6 * max(1.0, expected[1].abs().max().item())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_statistics_and_gradients_are_those_of_float64_autograd(shape, case, device, truth):
    s = truth.batch(shape, device=device)
    ours, expected, leaves, wide = both_losses(s, case, truth)
    assert isinstance(ours, PolicyLoss)
    tolerance = ratio_tolerance(expected)
    for value, true_value in zip(ours, expected, strict=True):
        assert value.dtype == F32
        truth.assert_close(value, true_value.double(), tolerance=tolerance)
    ours.loss.backward()
    expected[0].backward()
    for leaf, true_leaf in zip(leaves, wide, strict=True):
        truth.assert_close(leaf.grad, true_leaf.grad, tolerance=tolerance)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"dtype": BF16},
        {"dtype": F16},
        {"dtype": F32, "pred": BF16, "pred_uncond": F16, "pred_ref": F16},
        {"dtype": BF16, "x": F32, "x_next": F32},
    ],
    ids=str,
)
def test_half_precision_and_mixtures_are_computed_in_float32(dtypes, device, truth):
    s = truth.batch((3, 2, 5, 7), device=device, **dtypes)
    ours, expected, leaves, wide = both_losses(s, CASES[4], truth)
    tolerance = ratio_tolerance(expected)
    for value, true_value in zip(ours, expected, strict=True):
        truth.assert_close(value, true_value.double(), tolerance=tolerance)
    ours.loss.backward()
    expected[0].backward()
    for leaf, true_leaf in zip(leaves, wide, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        truth.assert_close(leaf.grad, true_leaf.grad, tolerance=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_passes_gradcheck(case, torch_reference, truth):
    s = truth.batch((4, 2, 3), dtype=F64)
    s.std[1] = 0
    s.shift = torch.tensor([0.1, 0.1, -0.2, 0.005], dtype=F64)  # away from the kinks of the clip
    s.advantage = torch.tensor([1.0, -1.0, -2.0, 0.5])
    keywords = {key: value for key, value in case.items() if key not in ("weight", "pred_ref")}
    keywords |= {name: getattr(s, name) for name in ("weight", "pred_ref") if name in case}
    scoring = {key: value for key, value in case.items() if key in ("guidance", "reduction")}

    def loss(pred, uncond):
        guided = {"pred_uncond": uncond} if "guidance" in case else {}
        step = (s.x, s.x_next, pred, s.a, s.b, s.std)
        return policy_loss(*step, old, s.advantage, **guided, **keywords).loss

    guided = {"pred_uncond": s.pred_uncond} if "guidance" in case else {}
    old = policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std, **guided, **scoring) + s.shift
    assert torch.autograd.gradcheck(loss, (s.pred.requires_grad_(), s.pred_uncond.requires_grad_()), atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtypes", [{"dtype": F32}, {"dtype": BF16}, {"dtype": F32, "pred": BF16}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 5, 7), (2, 5000)])
def test_ratio_is_one_before_the_first_update_with_guidance(shape, dtypes, reduction, reference, device, truth):
    s = truth.batch(shape, device=device, **dtypes)
    guided = {"pred_uncond": s.pred_uncond, "guidance": 4.0, "reduction": reduction}
    x_next, old = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise, **guided)
    penalty = {"pred_ref": s.pred_ref, "kl_coef": 0.1} if reference else {}
    result = policy_loss(s.x, x_next, s.pred, s.a, s.b, s.std, old, s.advantage, **guided, **penalty)
    assert torch.equal(result.log_prob, old)
    assert (result.ratio == 1).all()
    assert result.clip_fraction == 0


def test_a_sample_has_the_same_log_prob_bits_in_a_loss_of_any_batch(device, truth):
    s = truth.batch((64, 1, 8, 8), device=device)
    old = policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std)
    for size in (1, 3, 64):
        step = [t[:size] for t in (s.x, s.x_next, s.pred, s.a, s.b, s.std, old, s.advantage)]
        result = policy_loss(*step, pred_ref=s.pred_ref[:size], kl_coef=0.1)
        assert torch.equal(result.log_prob, old[:size])
        assert (result.ratio == 1).all()


def test_equal_inputs_give_equal_bits(device, truth):
    s = truth.batch((40, 130), device=device)

    def run():
        ours, _, leaves, _ = both_losses(s, CASES[4], truth)
        return *ours, *torch.autograd.grad(ours.loss, leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_the_clip_cuts_the_gradient_only_where_moving_on_would_help(device, truth):
    s = truth.batch((4, 6), device=device)
    step = (s.x, s.x_next, s.pred.requires_grad_(), s.a, s.b, s.std)
    # ratio: above, above, below, below the clip range
    old = policy_log_prob(*step).detach() - torch.tensor([0.5, 0.5, -0.5, -0.5], device=device)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], device=device)
    result = policy_loss(*step, old, advantage, clip_range=0.2)
    result.loss.backward()
    moved = (s.pred.grad != 0).any(1)
    assert moved.tolist() == [False, True, True, False]
    assert result.clip_fraction == 0.5
    up, down = math.exp(0.5), math.exp(-0.5)
    assert result.loss.item() == pytest.approx((-1.2 + up - down + 0.8) / 4, rel=1e-5)


def test_the_two_sides_of_the_clip_are_separate(device, truth):
    s = truth.batch((2, 6), device=device)
    step = (s.x, s.x_next, s.pred, s.a, s.b, s.std)
    old = policy_log_prob(*step) - torch.tensor([0.1, -0.1], device=device)
    advantage = torch.tensor([1.0, -1.0], device=device)
    bounds = ((0.05, 0.5), (0.5, 0.05), 0.05, 0.5)
    fractions = [policy_loss(*step, old, advantage, clip_range=bound).clip_fraction.item() for bound in bounds]
    assert fractions == [0.5, 0.5, 1.0, 0.0]


def test_a_deterministic_step_has_ratio_one_no_kl_and_no_gradient(device, truth):
    s = truth.batch((3, 6), device=device)
    s.std[1] = 0
    pred = s.pred.requires_grad_()
    old = torch.tensor([0.0, 7.0, 0.0], device=device)  # whatever was stored for a step that is not scored
    result = policy_loss(
        s.x, s.x_next, pred, s.a, s.b, s.std, old, s.advantage, pred_ref=s.pred_ref, kl_coef=1.0, kl_kind="chi2"
    )
    result.loss.backward()
    assert (result.ratio[1], result.log_prob[1], result.kl[1]) == (1, 0, 0)
    assert (pred.grad[1] == 0).all()
    assert result.loss.isfinite()


def test_clip_fraction_counts_scored_samples_only(device, truth):
    s = truth.batch((4, 6), device=device)
    s.std[1:3] = 0
    step = (s.x, s.x_next, s.pred, s.a, s.b, s.std)
    old = policy_log_prob(*step) - torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
    advantage = torch.ones(4, device=device)
    assert policy_loss(*step, old, advantage, clip_range=0.1).clip_fraction == 0.5
    assert policy_loss(*step[:5], 0.0, old, advantage, clip_range=0.1).clip_fraction == 0


@pytest.mark.parametrize("shift", [-1e4, -25.0, 25.0, 1e4])
def test_huge_log_ratios_stay_finite_and_move_nothing(shift, device, truth):
    s = truth.batch((2, 6), device=device)
    pred = s.pred.requires_grad_()
    step = (s.x, s.x_next, pred, s.a, s.b, s.std)
    old = policy_log_prob(*step).detach() - shift
    for sign in (1.0, -1.0):
        result = policy_loss(*step, old, torch.full((2,), sign, device=device), clip_range=0.2)
        (gradient,) = torch.autograd.grad(result.loss, pred)
        assert result.loss.isfinite()
        assert result.ratio[0].item() == pytest.approx(math.exp(math.copysign(LOG_RATIO_LIMIT, shift)), rel=1e-5)
        assert (gradient == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "x_next", "pred", "pred_uncond", "pred_ref", "old", "advantage", "weight"])
def test_non_finite_inputs_make_the_loss_non_finite(name, value, device, truth):
    s = truth.batch((3, 5), device=device)
    s.old = policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std)
    getattr(s, name)[(1, 2) if getattr(s, name).dim() == 2 else 1] = value
    loss = policy_loss(
        s.x, s.x_next, s.pred, s.a, s.b, s.std, s.old, s.advantage,
        pred_uncond=s.pred_uncond, guidance=2.0, pred_ref=s.pred_ref, kl_coef=0.1, weight=s.weight,
    ).loss  # fmt: skip
    assert not loss.isfinite()


def test_an_empty_batch_has_loss_zero_with_a_graph(device, truth):
    s = truth.batch((0, 2, 3), device=device)
    pred = s.pred.requires_grad_()
    result = policy_loss(
        s.x, s.x_next, pred, s.a, s.b, s.std, s.shift, s.advantage, pred_ref=s.pred_ref, kl_coef=0.1, weight=s.weight
    )
    result.loss.backward()
    assert result.loss == 0
    assert result.clip_fraction == 0
    assert result.ratio.shape == (0,)
    assert pred.grad.shape == pred.shape


def test_only_the_loss_carries_gradient(device, truth):
    s = truth.batch((2, 3), device=device)
    result = policy_loss(s.x, s.x_next, s.pred.requires_grad_(), s.a, s.b, s.std, s.shift, s.advantage)
    assert [value.requires_grad for value in result] == [True, False, False, False, False]
    assert [value.dim() for value in result] == [0, 1, 1, 0, 1]


def test_a_scaled_loss_scales_its_gradient_and_repeats_it(device, truth):
    s = truth.batch((3, 70), device=device)
    pred = s.pred.requires_grad_()
    loss = policy_loss(s.x, s.x_next, pred, s.a, s.b, s.std, s.shift, s.advantage).loss
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 8, pred, retain_graph=True)
    assert torch.equal(once * 8, scaled)
    assert torch.equal(once, torch.autograd.grad(loss, pred)[0])


def test_channels_last_gradients_keep_the_layout_of_the_prediction(device, truth):
    s = truth.batch((2, 3, 4, 5), device=device)
    for name in ("x", "x_next", "pred", "pred_uncond", "pred_ref"):
        setattr(s, name, getattr(s, name).to(memory_format=torch.channels_last))
    ours, expected, leaves, wide = both_losses(s, CASES[4], truth)
    ours.loss.backward()
    expected[0].backward()
    for leaf, true_leaf in zip(leaves, wide, strict=True):
        assert leaf.grad.stride() == leaf.stride()
        truth.assert_close(leaf.grad, true_leaf.grad, tolerance=ratio_tolerance(expected))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1 needs pred_ref, the reference's prediction; pass it or kl_coef=0"),
        ({"kl_kind": "renyi"}, ValueError, "kl_kind='renyi' needs its order; pass kl_alpha"),
        ({"kl_kind": "tv"}, ValueError, "kl_kind='tv' is unknown"),
        ({"clip_range": (0.1,)}, ValueError, r"clip_range=\(0.1,\) must be one number or \(low, high\)"),
        ({"clip_range": -0.1}, ValueError, "clip_range=-0.1 must hold 0 <= low <= 1 and high >= 0"),
        ({"clip_range": "0.1"}, TypeError, "clip_range must be a number, got str"),
        ({"advantage": torch.rand(2, 1)}, ValueError, r"advantage has shape \(2, 1\), but the batch holds 2 samples"),
        ({"weight": torch.ones(2, dtype=torch.bool)}, TypeError, "weight has dtype torch.bool"),
        ({"old_log_prob": torch.rand(3)}, ValueError, r"old_log_prob has shape \(3,\)"),
        ({"std": -1.0}, ValueError, "std=-1.0 is negative"),
    ],
)
def test_mistakes_are_named(change, error, message):
    arguments = {name: torch.rand(2, 3) for name in ("x", "x_next", "pred")} | {"a": 1.0, "b": 1.0, "std": 1.0}
    arguments |= {"old_log_prob": torch.rand(2), "advantage": torch.rand(2)}
    with pytest.raises(error, match=message):
        policy_loss(**(arguments | change))
