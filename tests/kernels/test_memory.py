"""What the kernels do to memory: every element written once, nothing beside it, few launches, no needless copies."""

import contextlib
import math

import pytest
import torch

from engine.kernels import (
    backend,
    group_advantage,
    policy_divergence,
    policy_log_prob,
    policy_loss,
    policy_sample,
)

F32, BF16 = torch.float32, torch.bfloat16
BAND = 512
SENTINEL = 12345.0
only_interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="counts and guards Triton's own launches")


def run_everything(s):
    """All results and gradients of all public functions on one batch."""
    pred, uncond = (t.detach().requires_grad_() for t in (s.pred, s.pred_uncond))
    guided = {"pred_uncond": uncond, "guidance": 2.0}
    x_next, old = policy_sample(s.x, pred, s.a, s.b, s.std, noise=s.noise, **guided)
    result = policy_loss(
        s.x, x_next, pred, s.a, s.b, s.std, old + s.shift, s.advantage, **guided,
        pred_ref=s.pred_ref, kl_coef=0.1, kl_kind="chi2", weight=s.weight,
    )  # fmt: skip
    drawn, _ = policy_sample(s.x, pred, s.a, s.b, s.std, seed=1, offset=torch.arange(len(s.x), device=s.x.device))
    log_prob = policy_log_prob(s.x, x_next, pred, s.a, s.b, s.std)
    divergence = policy_divergence(pred, s.pred_ref, s.b, s.std)
    advantage = group_advantage(s.advantage, s.advantage.shape[0])
    (result.loss + (log_prob * s.weight).sum() + divergence.sum()).backward()
    return [t.detach() for t in (x_next, old, drawn, *result, log_prob, divergence, advantage, pred.grad, uncond.grad)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 1), F32), ((3, 127), BF16), ((2, 129), F32), ((2, 3, 5, 7), BF16), ((2, 4500), F32)]
)
def test_no_result_reads_memory_that_nobody_wrote(shape, dtype, device, truth):
    s = truth.batch(shape, dtype=dtype, device=device)
    expected = run_everything(s)
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    try:
        # torch then fills what torch.empty and its relatives return with nan
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3, device=device).isnan().all()
        poisoned = run_everything(s)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert all(torch.equal(one, other) for one, other in zip(expected, poisoned, strict=True))


@contextlib.contextmanager
def guarded_allocations(monkeypatch):
    """torch.empty and its relatives hand out the middle of a larger buffer; yields the buffers."""
    buffers = []
    new = torch.empty_strided

    def guarded(shape, strides, dtype, device):
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
        buffer = new((span + 2 * BAND,), (1,), dtype=dtype, device=device).fill_(SENTINEL)
        buffers.append(buffer)
        return buffer.as_strided(shape, strides, BAND)

    def empty_strided(shape, strides, *, dtype, device):
        return guarded(shape, strides, dtype, device)

    def empty(shape, *, dtype, device):
        shape = (shape,) if isinstance(shape, int) else shape
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return guarded(shape, strides, dtype, device)

    def empty_like(tensor, *, dtype=None):
        return guarded(tensor.shape, tensor.stride(), dtype or tensor.dtype, tensor.device)

    with monkeypatch.context() as patch:
        for function in (empty, empty_like, empty_strided):
            patch.setattr(torch, function.__name__, function)
        yield buffers


@only_interpreted
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1), F32), ((3, 127), BF16), ((33, 129), F32), ((2, 2096), BF16)])
def test_kernels_stay_inside_their_buffers(shape, dtype, monkeypatch, truth):
    s = truth.batch(shape, dtype=dtype)
    expected = run_everything(s)
    for name, tensor in vars(s).items():  # whoever reads beyond an input reads nan
        buffer = torch.full((tensor.numel() + 2 * BAND,), float("nan"), dtype=tensor.dtype)
        setattr(s, name, buffer[BAND:-BAND].view(tensor.shape).copy_(tensor))
    with guarded_allocations(monkeypatch) as buffers:
        guarded = run_everything(s)
    assert len(buffers) > 10
    for buffer in buffers:
        sentinel = torch.tensor(SENTINEL, dtype=buffer.dtype)
        assert (buffer[:BAND] == sentinel).all()
        assert (buffer[-BAND:] == sentinel).all()
    assert all(torch.equal(one, other) for one, other in zip(expected, guarded, strict=True))


@only_interpreted
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1), F32), ((3, 127), BF16), ((33, 9), F32), ((2, 2096), BF16)])
def test_kernels_touch_nothing_but_elements_of_their_tensors(shape, dtype, bounds_checked, truth):
    run_everything(truth.batch(shape, dtype=dtype))


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched, in order."""
    from triton.runtime import interpreter

    names = []
    call = interpreter.GridExecutor.__call__

    def counted(self, *arguments, **keywords):
        names.append(self.fn.__name__)
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@only_interpreted
def test_launch_budgets_are_kept(launches, truth):
    s = truth.batch((5, 4500))
    group_advantage(s.advantage, 5, scale="global_std")
    assert launches == ["_advantage_kernel"]
    launches.clear()
    x_next, old = policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise)
    assert launches == ["_row_sums_kernel", "_score_kernel"]
    launches.clear()
    pred, uncond = s.pred.requires_grad_(), s.pred_uncond.requires_grad_()
    policy_loss(
        s.x, x_next, pred, s.a, s.b, s.std, old, s.advantage, pred_uncond=uncond, guidance=2.0,
        pred_ref=s.pred_ref, kl_coef=0.1, weight=s.weight,
    ).loss.backward()  # fmt: skip
    assert launches == ["_row_sums_kernel", "_loss_kernel", "_backward_kernel"]


@only_interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_dense_layout_shared_by_all_inputs_is_not_copied(layout, monkeypatch, truth):
    s = truth.batch((2, 3, 4, 5))
    if layout == "channels_last":
        for name in ("x", "pred", "pred_uncond", "pred_ref", "noise", "x_next"):
            setattr(s, name, getattr(s, name).to(memory_format=torch.channels_last))
    copies = []
    copy = torch.Tensor.copy_
    contiguous = torch.Tensor.contiguous

    def counted_copy(self, source, *arguments, **keywords):
        copies.append(tuple(source.shape))
        return copy(self, source, *arguments, **keywords)

    def counted_contiguous(self, *arguments, **keywords):
        result = contiguous(self, *arguments, **keywords)
        if result.data_ptr() != self.data_ptr():
            copies.append(tuple(self.shape))
        return result

    # inside the interpreter .contiguous() and .copy_() also move whole tensors to and fro; count ours alone
    from engine.kernels import rows

    moved = []
    arranged = rows.arranged

    def watched(tensor, strides):
        result = arranged(tensor, strides)
        moved.append(result is not tensor)
        return result

    monkeypatch.setattr(rows, "arranged", watched)
    run_everything(s)
    assert moved
    assert not any(moved)
