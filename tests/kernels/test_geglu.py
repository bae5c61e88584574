import pytest
import torch
from diffusers.models.activations import GEGLU
from torch.nn import functional as F

from engine.kernels import backend
from engine.kernels.geglu import geglu

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def make(shape, dtype=F32, device="cpu", spread=2.0):
    """A projection (..., 2 D) as a leaf, and a gradient of the result (..., D)."""
    generator = torch.Generator().manual_seed(0)
    projected = (spread * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    return projected, torch.randn((*shape[:-1], shape[-1] // 2), generator=generator).to(device, dtype)


def composed(projected):
    hidden, gate = projected.chunk(2, -1)
    return hidden * F.gelu(gate)


def check(projected, d_y, truth):
    y = geglu(projected)
    (grad,) = torch.autograd.grad(y, projected, d_y)
    assert y.dtype == grad.dtype == projected.dtype
    assert y.is_contiguous()
    wide = truth.f64(projected).requires_grad_()
    expected = composed(wide)
    truth.assert_close(y, expected)
    truth.assert_close(grad, torch.autograd.grad(expected, wide, truth.f64(d_y))[0])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(2,), (14,), (3, 2), (2, 3, 96), (2, 1, 3, 10), (3, 2 * 1152), (2, 2 * 2053)])
def test_result_and_gradient_are_those_of_torchs_exact_gelu_in_float64(shape, dtype, device, truth):
    check(*make(shape, dtype, device), truth)


def test_gates_far_from_zero_close_or_open_entirely(device, truth):
    projected, d_y = make((2, 8), device=device)
    with torch.no_grad():
        projected[:, 4:] = torch.tensor([-100.0, 100.0, -1e20, 1e20])
    y = geglu(projected)
    assert torch.equal(y, torch.where(projected[:, 4:] > 0, projected[:, :4] * projected[:, 4:], 0.0))
    (grad,) = torch.autograd.grad(y, projected, d_y)
    open_gate = projected[:, 4:] > 0
    assert torch.equal(grad[:, :4], torch.where(open_gate, d_y * projected[:, 4:], 0.0))
    assert torch.equal(grad[:, 4:], torch.where(open_gate, d_y * projected[:, :4], 0.0))


@pytest.mark.parametrize("layout", ["rows apart", "tokens first", "channels apart", "expanded gradient"])
def test_tensors_of_any_layout_agree(layout, device, truth):
    projected, d_y = make((3, 5, 32), device=device)
    if layout == "rows apart":
        projected, d_y = torch.cat([projected, projected], -1)[..., :32], torch.cat([d_y, d_y], -1)[..., 8:24]
    elif layout == "tokens first":
        projected, d_y = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (projected, d_y))
    elif layout == "channels apart":
        projected, d_y = (torch.stack([t, t], -1)[..., 0] for t in (projected, d_y))
    else:
        d_y = torch.ones((), device=device).expand(3, 5, 16)
    check(projected.detach().requires_grad_(), d_y, truth)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_errors_are_at_most_twice_those_of_torchs_composition_in_the_same_dtype(dtype, device, truth):
    projected, d_y = make((7, 200), dtype, device)
    wide = truth.f64(projected).requires_grad_()
    true = composed(wide)
    true = [true, *torch.autograd.grad(true, wide, truth.f64(d_y))]
    results = [[y, *torch.autograd.grad(y, projected, d_y)] for y in (geglu(projected), composed(projected))]
    # the interpreter truncates to bf16 where a GPU rounds to nearest
    truncation = torch.finfo(BF16).eps / 2 if backend.INTERPRETED and dtype == BF16 else 0.0
    for mine, other, value in zip(*results, true, strict=True):
        mine, other = ((truth.f64(t) - value).abs().max() for t in (mine, other))
        assert mine <= 2 * other + truncation * value.abs().max()


def test_it_is_diffusers_geglu(device, truth):
    torch.manual_seed(0)
    module = GEGLU(12, 20).to(device)
    x = torch.randn(2, 5, 12, device=device, requires_grad=True)
    tensors = [x, *module.parameters()]
    ours, theirs = geglu(module.proj(x)), module(x)
    truth.assert_close(ours, truth.f64(theirs), tolerance=2e-6)
    grads, expected = (torch.autograd.grad(y.square().sum(), tensors) for y in (ours, theirs))
    for one, other in zip(grads, expected, strict=True):
        truth.assert_close(one, truth.f64(other), tolerance=1e-5)


def test_gradients_pass_gradcheck(torch_reference):
    assert torch.autograd.gradcheck(geglu, make((3, 8), F64)[0])


@pytest.mark.parametrize(
    ("projected", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "projected must be a tensor, got list"),
        (torch.ones(2, dtype=torch.int64), TypeError, "projected has dtype torch.int64; allowed are float32"),
        (torch.rand(2, 5), ValueError, r"projected has shape \(2, 5\); it must be \(..., 2 D\)"),
        (torch.tensor(1.0), ValueError, r"projected has shape \(\)"),
        (torch.rand(2, 0), ValueError, r"projected has shape \(2, 0\)"),
    ],
)
def test_mistakes_are_named(projected, error, message):
    with pytest.raises(error, match=message):
        geglu(projected)
