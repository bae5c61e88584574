"""What the kernel tests share: devices, batches, and an independent float64 truth.

Every operator test runs on the back end of the process: the torch reference here, Triton in the process that
test_interpreter.py starts, and Triton on a GPU where there is one.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from engine.kernels import backend


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def torch_reference(monkeypatch):
    """float64 is computed by the torch reference alone."""
    monkeypatch.setenv(backend.VARIABLE, "torch")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and (backend.INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("no GPU in this process")
    return request.param


@pytest.fixture
def bounds_checked(monkeypatch):
    """In the interpreter, every load and store must be of an element of one of the launch's tensors."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    extents = []
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def launch(self, *arguments, **keywords):
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        extents[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        return run(self, *arguments, **keywords)

    def check(pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not np.any([(start <= addresses) & (addresses < end) for start, end in extents], axis=0).all():
            raise IndexError("a kernel reads or writes beyond its tensors")

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


def make_batch(shape, *, dtype=torch.float32, device="cpu", seed=0, **dtypes):
    """A step that a policy took: x, pred, pred_uncond, pred_ref, noise, x_next like a batch; a, b, std, ... (B,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape[0]

    def normal(name):
        return torch.randn(shape, generator=generator).to(device, dtypes.get(name, dtype))

    def uniform(low, high):
        return (low + (high - low) * torch.rand(rows, generator=generator)).to(device)

    batch = SimpleNamespace(x=normal("x"), pred=normal("pred"), pred_uncond=normal("pred_uncond"))
    batch.noise, batch.a, batch.b, batch.std = normal("noise"), uniform(0.5, 1), uniform(-1, -0.5), uniform(0.5, 1)
    batch.pred_ref = (batch.pred.float() + 0.3 * normal("pred_ref").float()).to(dtypes.get("pred_ref", dtype))
    batch.x_next = (batch.x.float() + 0.5 * batch.noise.float()).to(dtypes.get("x_next", dtype))
    batch.advantage = torch.randn(rows, generator=generator).to(device)
    batch.weight = uniform(0.5, 2)
    batch.shift = 0.02 * torch.randn(rows, generator=generator).to(device)
    return batch


def as_float64(value):
    return value.detach().cpu().double() if isinstance(value, torch.Tensor) else value


def column(value, like):
    value = torch.as_tensor(value, dtype=torch.float32).cpu().double()
    return value.expand(like.shape[0]).reshape(-1, *(1,) * (like.dim() - 1))


def reduce(values, reduction):
    values = values.reshape(*values.shape[:1], math.prod(values.shape[1:]))
    return values.mean(1) if reduction == "mean" else values.sum(1)


def true_policy(x, pred, a, b, std, pred_uncond=None, guidance=1.0):
    """Normal(mean, std), with std 1 in place of 0."""
    f = pred if pred_uncond is None else guidance * pred + (1 - guidance) * pred_uncond
    scale = column(std, x)
    return Normal(column(a, x) * x + column(b, x) * f, torch.where(scale == 0, 1.0, scale).expand(x.shape))


def true_log_prob(x, x_next, pred, a, b, std, *, pred_uncond=None, guidance=1.0, reduction="mean"):
    value = reduce(true_policy(x, pred, a, b, std, pred_uncond, guidance).log_prob(x_next), reduction)
    return torch.where(column(std, x).flatten() == 0, 0.0, value)


def true_divergence(pred, pred_ref, b, std, *, kind="kl", alpha=None, reduction="mean"):
    zero = torch.zeros_like(pred)
    policy, reference = (true_policy(zero, p, 0.0, b, std) for p in (pred, pred_ref))
    distance = 2 * reduce(kl_divergence(policy, reference), reduction)
    value = {
        "kl": lambda d: d / 2,
        "renyi": lambda d: alpha * d / 2,
        "chi2": lambda d: d.exp() - 1,
        "power": lambda d: ((alpha * (alpha - 1) * d / 2).exp() - 1) / (alpha * (alpha - 1)),
    }[kind](distance)
    return torch.where(column(std, pred).flatten() == 0, 0.0, value)


def true_loss(
    x, x_next, pred, a, b, std, old_log_prob, advantage, *, pred_uncond=None, guidance=1.0, pred_ref=None, kl_coef=0.0,
    kl_kind="kl", kl_alpha=None, clip_range=1e-4, weight=None, reduction="mean",
):  # fmt: skip
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    log_prob = true_log_prob(
        x, x_next, pred, a, b, std, pred_uncond=pred_uncond, guidance=guidance, reduction=reduction
    )
    scored = column(std, x).flatten() != 0
    ratio = torch.where(scored, (log_prob - old_log_prob).clamp(-20, 20), 0.0).exp()
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    term = torch.maximum(free, held)
    kl = torch.zeros_like(term)
    if pred_ref is not None:
        f = pred if pred_uncond is None else guidance * pred + (1 - guidance) * pred_uncond
        kl = true_divergence(f, pred_ref, b, std, kind=kl_kind, alpha=kl_alpha, reduction=reduction)
        term = term + kl_coef * kl
    loss = (term * (1 if weight is None else weight)).mean()
    return loss, log_prob, ratio, ((held > free) & scored).sum() / scored.sum().clamp(min=1), kl


def assert_close(actual, expected, *, tolerance=5e-6):
    """Agreement with the float64 truth, relative to its largest element.

    fp32 rounds mean and difference to 6e-8 of |x| ~ 4 std and sums pairwise or in vectors, hence a few 1e-6; an output
    in half precision adds one unit in its last place (the interpreter truncates to bf16, a GPU rounds to nearest).
    """
    assert actual.shape == expected.shape
    expected = expected.detach()
    if actual.dtype in (torch.bfloat16, torch.float16):
        tolerance += torch.finfo(actual.dtype).eps
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert math.isfinite(size)
    torch.testing.assert_close(actual.detach().cpu().double(), expected, rtol=0, atol=tolerance * max(size, 1e-30))


@pytest.fixture
def truth():
    """Independent float64 formulas, on torch.distributions and autograd, and the comparison with them."""
    return SimpleNamespace(
        batch=make_batch, f64=as_float64, policy=true_policy, log_prob=true_log_prob, divergence=true_divergence,
        loss=true_loss, assert_close=assert_close,
    )  # fmt: skip
