"""The registered operators: what torch.library, torch.compile and the dispatch promise."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from engine.kernels import (
    backend,
    group_advantage,
    policy_divergence,
    policy_log_prob,
    policy_loss,
    policy_sample,
)

OPERATORS = torch.ops.engine_kernels


def operator_cases(s):
    rows = s.std.shape[0]
    step = (s.a, s.b, s.std)
    numbers = (1.5, 0.25, 1.0)
    loss_numbers = (*numbers, 0.1, 0.1, 0.2, True, 1.0, 1.0)
    slopes = (s.weight, s.shift)
    grad = s.advantage
    yield OPERATORS.group_advantage, (torch.rand(6 * rows, device=s.x.device)[::2], 3, 0, 5.0, 1e-6)
    for uncond, ref, weight in ((None, None, None), (s.pred_uncond, s.pred_ref, s.weight)):
        yield OPERATORS.policy_sample, (s.x, s.pred, uncond, s.noise, None, None, *step, *numbers)
        yield OPERATORS.policy_score, (s.x, s.x_next, s.pred, uncond, *step, *numbers)
        rest = (*step, s.shift, s.advantage, weight, *loss_numbers)
        yield OPERATORS.policy_loss, (s.x, s.x_next, s.pred, uncond, ref, *rest)
        both = (s.x, s.x_next, s.pred, uncond, s.pred_ref, s.a, s.b, 1.5, uncond is not None)
        yield OPERATORS.policy_backward, (grad, *slopes, *both)
    streams = torch.arange(rows, device=s.x.device), torch.tensor(5, device=s.x.device)
    yield OPERATORS.policy_sample, (s.x, s.pred, None, None, *streams, *step, *numbers)
    yield OPERATORS.policy_divergence, (s.pred, s.pred_ref, s.b, s.std, True, 1.0, 1.0, 0.25)
    only_gap = (None, None, s.pred, None, s.pred_ref, None, None, 1.0, False)
    yield OPERATORS.policy_backward, (grad[:1].squeeze() if rows else grad.sum(), None, slopes[1], *only_gap)


@pytest.mark.parametrize(("rows", "layout"), [(0, "contiguous"), (2, "channels_last"), (2, "mixed"), (2, "sliced")])
def test_every_operator_passes_opcheck(rows, layout, device, truth):
    s = truth.batch((rows, 3, 4, 5), device=device, pred=torch.bfloat16)
    for name in ("x", "x_next", "pred", "pred_uncond", "pred_ref", "noise"):
        tensor = getattr(s, name)
        if layout == "channels_last" or (layout == "mixed" and name.startswith("pred")):
            tensor = tensor.to(memory_format=torch.channels_last)
        elif layout == "sliced":
            tensor = torch.cat([tensor, tensor], -1)[..., ::2]
        setattr(s, name, tensor)
    seen = set()
    for operator, arguments in operator_cases(s):
        opcheck(operator.default, arguments)
        seen.add(str(operator).partition(".")[2])
    assert seen == {
        "group_advantage",
        "policy_sample",
        "policy_score",
        "policy_loss",
        "policy_divergence",
        "policy_backward",
    }


def test_a_training_step_compiles_as_one_graph_with_equal_results(device, truth):
    s = truth.batch((4, 3, 4, 4), device=device)

    def step(pred, uncond):
        guided = {"pred_uncond": uncond, "guidance": 2.0}
        x_next, old = policy_sample(s.x, pred, s.a, s.b, s.std, noise=s.noise, **guided)
        advantage = group_advantage(s.advantage, 2)
        result = policy_loss(
            s.x, x_next, pred * 1.01, s.a, s.b, s.std, old, advantage, **guided, pred_ref=s.pred_ref, kl_coef=0.1
        )
        log_prob = policy_log_prob(s.x, x_next, pred, s.a, 0.5, 0.5, **guided)
        divergence = policy_divergence(pred, s.pred_ref, s.b, s.std, kind="power", alpha=2.0)
        total = result.loss + log_prob.mean() + divergence.sum()
        return total, result.ratio, x_next

    leaves = s.pred.requires_grad_(), s.pred_uncond.requires_grad_()
    eager = step(*leaves)
    gradients = torch.autograd.grad(eager[0], leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    for ours, theirs in zip((*eager, *gradients), (*compiled, *torch.autograd.grad(compiled[0], leaves)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_compiled_loss_takes_other_batch_sizes_and_numbers_without_a_graph_break(device, truth):
    def loss(s, pred, guidance, kl_coef):
        return policy_loss(
            s.x, s.x_next, pred, s.a, -0.5, s.std, s.shift, s.advantage, pred_uncond=s.pred_uncond, guidance=guidance,
            pred_ref=s.pred_ref, kl_coef=kl_coef, kl_kind="renyi", kl_alpha=guidance,
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows, guidance, kl_coef in ((4, 2.0, 0.1), (5, 3.0, 0.2), (6, 4.5, 0.3)):
        s = truth.batch((rows, 3), device=device)
        assert torch.equal(compiled(s, s.pred, guidance, kl_coef), loss(s, s.pred, guidance, kl_coef))


@torch.no_grad()  # torch aborts when autograd records a fake GPU tensor in a build without CUDA
def test_fake_gpu_tensors_flow_through_without_a_gpu():
    with FakeTensorMode():
        x, pred, noise = (torch.empty(2, 3, 4, 4, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        a, b, std, advantage = (torch.empty(2, device="cuda") for _ in range(4))
        x_next, log_prob = policy_sample(x, pred, a, b, std, noise=noise)
        loss = policy_loss(x, x_next, pred, a, b, std, log_prob, advantage).loss
        assert (x_next.device.type, x_next.dtype) == ("cuda", torch.bfloat16)
        assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())


def test_autocast_changes_nothing(device, truth):
    s = truth.batch((2, 3, 4), device=device)
    plain = policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std), plain)


def test_a_bad_backend_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("ENGINE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="ENGINE_KERNELS='cuda' is not a back end; set it to 'torch' or 'triton'"):
        group_advantage(torch.rand(4), 2)


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter runs CPU tensors")
def test_triton_on_a_cpu_tensor_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("ENGINE_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"ENGINE_KERNELS=triton cannot run on a tensor on cpu; .*TRITON_INTERPRET=1"):
        group_advantage(torch.rand(4), 2)


@pytest.mark.skipif(not backend.INTERPRETED, reason="only Triton refuses float64")
def test_triton_refuses_float64_latents_with_a_way_out(truth):
    s = truth.batch((2, 3), dtype=torch.float64)
    with pytest.raises(
        TypeError, match="float64 is computed by the torch reference only; pass float32, or set ENGINE_K"
    ):
        policy_log_prob(s.x, s.x_next, s.pred, s.a, s.b, s.std)


def test_importing_the_kernels_touches_no_driver():
    code = (
        "import torch, engine.kernels\n"
        "from triton.runtime import driver\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert driver._active is None, 'a Triton driver was made at import'\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
