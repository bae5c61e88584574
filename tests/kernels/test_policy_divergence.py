import math

import pytest
import torch

from engine.kernels import policy_divergence
from engine.kernels.policy_divergence import EXPONENT_LIMIT

KINDS = [("kl", None), ("renyi", 0.5), ("renyi", 3.0), ("chi2", None), ("power", 0.5), ("power", 3.0), ("power", -1.0)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 5, 7), (2, 5000)])
@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_value_and_gradient_are_those_of_the_closed_form_in_float64(kind, alpha, shape, reduction, device, truth):
    s = truth.batch(shape, device=device)
    if reduction == "sum":  # keep exponents within reason
        s.pred_ref = s.pred + (s.pred_ref - s.pred) / math.prod(shape[1:]) ** 0.5
    pred = s.pred.requires_grad_()
    keywords = {"kind": kind, "alpha": alpha, "reduction": reduction}
    value = policy_divergence(pred, s.pred_ref, s.b, s.std, **keywords)
    (value * s.weight).sum().backward()
    wide = truth.f64(pred).requires_grad_()
    expected = truth.divergence(wide, truth.f64(s.pred_ref), s.b, s.std, **keywords)
    (expected * truth.f64(s.weight)).sum().backward()
    assert value.dtype == torch.float32
    assert (value >= 0).all()
    truth.assert_close(value, expected)
    truth.assert_close(pred.grad, wide.grad)


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_divergence_passes_gradcheck(kind, alpha, torch_reference, truth):
    s = truth.batch((3, 2, 3), dtype=torch.float64)
    std = torch.tensor([0.9, 0.0, 1.3])

    def divergence(pred):
        return policy_divergence(pred, s.pred_ref, -0.4, std, kind=kind, alpha=alpha, reduction="sum")

    assert torch.autograd.gradcheck(divergence, (s.pred.requires_grad_(),))


@pytest.mark.parametrize(
    ("kind", "alpha", "integrand"),
    [
        ("kl", None, lambda p, q: p * (p / q).log()),
        ("chi2", None, lambda p, q: (p - q) ** 2 / q),
        ("renyi", 0.5, lambda p, q: p**0.5 * q**0.5),
        ("power", 0.5, lambda p, q: q * (((p / q) ** 0.5 - 1) / (0.5 * -0.5))),
        ("power", 3.0, lambda p, q: q * (((p / q) ** 3 - 1) / (3 * 2))),
    ],
)
def test_closed_forms_are_the_integrals_that_define_them(kind, alpha, integrand, device):
    mean, reference, std = 0.3, -0.2, 0.7
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, std).log_prob(z).exp() for m in (mean, reference))
    integral = torch.trapezoid(integrand(p, q), z)
    if kind == "renyi":
        integral = integral.log() / (alpha - 1)
    pred, pred_ref = (torch.tensor([[m]], device=device) for m in (mean, reference))
    value = policy_divergence(pred, pred_ref, 1.0, std, kind=kind, alpha=alpha)
    assert value.item() == pytest.approx(integral.item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_power_of_order_0_and_1_is_the_kl(alpha, device, truth):
    s = truth.batch((2, 9), device=device)
    step = (s.pred, s.pred_ref, s.b, s.std)
    assert torch.equal(policy_divergence(*step, kind="power", alpha=alpha), policy_divergence(*step))


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_tiny_divergences_keep_their_relative_accuracy(kind, alpha, device, truth):
    pred = torch.full((1, 4), 1e-5, device=device)
    value = policy_divergence(pred, torch.zeros_like(pred), 1.0, 1.0, kind=kind, alpha=alpha)
    distance = 1e-10
    rate = {"kl": 0.5, "renyi": (alpha or 0) / 2, "chi2": 1.0, "power": 0.5}[kind]
    assert value.item() == pytest.approx(rate * distance, rel=1e-5)


@pytest.mark.parametrize(("kind", "alpha"), [("chi2", None), ("power", 3.0)])
def test_exponents_stop_at_the_limit_and_so_does_the_gradient(kind, alpha, device):
    pred = torch.tensor([[1e3], [1e-1]], device=device, requires_grad=True)
    value = policy_divergence(pred, torch.zeros_like(pred), 1.0, 1.0, kind=kind, alpha=alpha)
    value.sum().backward()
    factor = 1.0 if kind == "chi2" else 1 / 6
    assert value[0].item() == pytest.approx(factor * math.exp(EXPONENT_LIMIT), rel=1e-4)
    assert pred.grad[0] == 0
    assert pred.grad[1] > 0


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_predictions_are_not_hidden(kind, alpha, value, device):
    pred = torch.tensor([[1.0, value], [1.0, 2.0]], device=device)
    result = policy_divergence(pred, torch.zeros_like(pred), 1.0, 1.0, kind=kind, alpha=alpha)
    assert result.isfinite().tolist() == [False, True]


def test_a_deterministic_step_has_no_divergence_and_no_gradient(device, truth):
    s = truth.batch((2, 3), device=device)
    s.std[0] = 0
    pred = s.pred.requires_grad_()
    value = policy_divergence(pred, s.pred_ref, s.b, s.std, kind="chi2")
    value.sum().backward()
    assert value[0] == 0
    assert (pred.grad[0] == 0).all()
    assert value[1] > 0


@pytest.mark.parametrize("dtypes", [{"dtype": torch.bfloat16}, {"dtype": torch.float16, "pred_ref": torch.float32}])
def test_half_precision_is_upcast_before_the_difference(dtypes, device, truth):
    s = truth.batch((2, 3, 40), device=device, **dtypes)
    value = policy_divergence(s.pred, s.pred_ref, s.b, s.std)
    truth.assert_close(value, truth.divergence(truth.f64(s.pred), truth.f64(s.pred_ref), s.b, s.std))


def test_an_empty_batch_has_an_empty_divergence(device):
    pred = torch.rand(0, 3, device=device, requires_grad=True)
    value = policy_divergence(pred, pred.detach(), 1.0, 1.0)
    value.sum().backward()
    assert value.shape == (0,)
    assert pred.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"kind": "js"}, ValueError, "kind='js' is unknown; choose one of 'kl', 'renyi', 'chi2', 'power'"),
        ({"kind": "renyi"}, ValueError, "kind='renyi' needs its order; pass alpha"),
        ({"kind": "power"}, ValueError, "kind='power' needs its order; pass alpha"),
        ({"kind": "renyi", "alpha": 0.0}, ValueError, "alpha=0.0 is no order of a Renyi divergence"),
        ({"kind": "power", "alpha": math.inf}, ValueError, "alpha=inf must be finite"),
        ({"alpha": 2.0}, ValueError, "alpha=2.0 has no meaning for kind='kl'"),
        ({"std": -1.0}, ValueError, "std=-1.0 is negative"),
        ({"pred_ref": torch.rand(3, 2)}, ValueError, r"pred_ref has shape \(3, 2\), but pred has \(2, 3\)"),
    ],
)
def test_mistakes_are_named(keywords, error, message):
    arguments = {"pred": torch.rand(2, 3), "pred_ref": torch.rand(2, 3), "b": 1.0, "std": 1.0}
    with pytest.raises(error, match=message):
        policy_divergence(**(arguments | keywords))
