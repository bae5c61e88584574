import pytest
import torch

from engine.kernels import backend
from engine.kernels.gated_residual import gated_residual

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# one element, odd sizes, several programs a sample (2 and 4) of unequal shares, DiT-XL's width
SHAPES = [(2, 1, 1), (1, 3, 7), (3, 5, 100), (2, 17, 48), (1, 33, 16), (2, 2, 1152)]
DTYPES = [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (F32, BF16, BF16), (BF16, F32, F16)]


def make(shape, dtypes=(F32,) * 3, device="cpu"):
    """x (B, L, D), gate (B, D), branch (B, L, D) as leaves, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (shape[0], shape[2]), shape]
    values = [
        torch.randn(size, generator=generator).to(device, dtype).requires_grad_()
        for size, dtype in zip(shapes, dtypes, strict=True)
    ]
    return *values, torch.randn(shape, generator=generator).to(device, dtypes[0])


def check(x, gate, branch, d_y, truth):
    y = gated_residual(x, gate, branch)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    wide = [truth.f64(t).requires_grad_() for t in (x, gate, branch)]
    expected = wide[0] + wide[1].reshape(x.shape[0], 1, -1) * wide[2]
    truth.assert_close(y, expected)
    grads = torch.autograd.grad(y, (x, gate, branch), d_y)
    for tensor, ours, theirs in zip(
        (x, gate, branch), grads, torch.autograd.grad(expected, wide, truth.f64(d_y)), strict=True
    ):
        assert ours.dtype == tensor.dtype
        truth.assert_close(ours, theirs)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_autograd_in_float64(shape, dtypes, device, truth):
    check(*make(shape, dtypes, device), truth)


@pytest.mark.parametrize("layout", ["token dimension", "chunk", "part of a joint sequence", "channels apart"])
def test_tensors_of_any_layout_agree(layout, device, truth):
    x, gate, branch, d_y = make((2, 5, 48), device=device)
    if layout == "token dimension":
        gate = gate.detach().unsqueeze(1).requires_grad_()
    elif layout == "chunk":
        gate = torch.cat([gate, gate, gate], 1).detach().requires_grad_().chunk(3, 1)[1]
    elif layout == "part of a joint sequence":
        x, branch, d_y = (torch.cat([t, t], 1).detach()[:, 3:8] for t in (x, branch, d_y))
    else:
        x, branch, d_y = (torch.stack([t, t], -1).detach()[..., 0] for t in (x, branch, d_y))
    check(x.requires_grad_(), gate, branch.requires_grad_(), d_y, truth)


def test_an_expanded_gradient_is_read_right(device, truth):
    x, gate, branch, _ = make((2, 3, 7), device=device)
    check(x, gate, branch, torch.ones((), device=device).expand(2, 3, 7), truth)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_errors_are_at_most_twice_those_of_torchs_composition_in_the_same_dtype(dtype, device, truth):
    x, gate, branch, d_y = make((3, 17, 100), (dtype,) * 3, device)
    wide = [truth.f64(t).requires_grad_() for t in (x, gate, branch)]
    exact = wide[0] + wide[1].unsqueeze(1) * wide[2]
    true = [exact, *torch.autograd.grad(exact, wide, truth.f64(d_y))]
    results = []
    for y in (gated_residual(x, gate, branch), x + gate.unsqueeze(1) * branch):
        results.append([y, *torch.autograd.grad(y, (x, gate, branch), d_y)])
    # the interpreter truncates to bf16 where a GPU rounds to nearest
    truncation = torch.finfo(BF16).eps / 2 if backend.INTERPRETED and dtype == BF16 else 0.0
    for mine, other, value in zip(*results, true, strict=True):
        mine, other = ((truth.f64(t) - value).abs().max() for t in (mine, other))
        assert mine <= 2 * other + truncation * value.abs().max()


@pytest.mark.parametrize("needed", [{"x"}, {"gate"}, {"branch"}])
def test_only_tensors_that_ask_get_a_gradient(needed, device):
    names = ("x", "gate", "branch")
    *tensors, d_y = make((2, 3, 7), device=device)
    every = torch.autograd.grad(gated_residual(*tensors), tensors, d_y)
    some = [t.detach().requires_grad_(name in needed) for name, t in zip(names, tensors, strict=True)]
    gated_residual(*some).backward(d_y)
    for name, tensor, expected in zip(names, some, every, strict=True):
        assert torch.equal(tensor.grad, expected) if name in needed else tensor.grad is None


def test_gradients_pass_gradcheck(torch_reference):
    x, gate, branch, _ = make((2, 3, 5), (F64,) * 3)
    assert torch.autograd.gradcheck(gated_residual, (x, gate, branch))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(2, 4)}, ValueError, r"x has shape \(2, 4\); it must be \(B, L, D\)"),
        (
            {"gate": torch.rand(2, 3, 4)},
            ValueError,
            r"gate has shape .*pass one vector a sample, \(2, 4\) or \(2, 1, 4",
        ),
        ({"gate": 1.0}, TypeError, "gate must be a tensor, got float"),
        ({"branch": torch.rand(2, 1, 4)}, ValueError, r"branch has shape \(2, 1, 4\), but x has \(2, 3, 4\)"),
    ],
)
def test_mistakes_are_named(change, error, message):
    arguments = {"x": torch.rand(2, 3, 4), "gate": torch.rand(2, 4), "branch": torch.rand(2, 3, 4)}
    with pytest.raises(error, match=message):
        gated_residual(**(arguments | change))
