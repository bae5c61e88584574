"""What all transformer operators promise: registration, equal bits, memory and launches."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck

from engine.kernels import backend
from engine.kernels.gated_residual import gated_residual
from engine.kernels.geglu import geglu
from engine.kernels.modulate import norm_modulate, residual_norm_modulate

F32, BF16 = torch.float32, torch.bfloat16
OPERATORS = torch.ops.engine_kernels
only_interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="watches Triton's own launches")
BAND = 512
SENTINEL = 12345.0

# name: (function of a batch, the inputs that it reads)
CALLS = {
    "norm_modulate": (lambda s: (norm_modulate(s.x, s.shift, s.scale),), ("x", "shift", "scale")),
    "rms with weights": (
        lambda s: (norm_modulate(s.x, s.shift, s.scale, weight=s.weight, bias=s.bias, kind="rms"),),
        ("x", "shift", "scale", "weight", "bias"),
    ),
    "gated_residual": (lambda s: (gated_residual(s.x, s.gate, s.branch),), ("x", "gate", "branch")),
    "residual_norm_modulate": (
        lambda s: residual_norm_modulate(s.x, s.gate, s.branch, s.shift, s.scale),
        ("x", "gate", "branch", "shift", "scale"),
    ),
    "geglu": (lambda s: (geglu(s.projected),), ("projected",)),
}
READ_BACKWARDS = {
    "norm_modulate": ("x", "scale"),
    "rms with weights": ("x", "scale", "weight"),
    "gated_residual": ("gate", "branch"),
    "residual_norm_modulate": ("gate", "branch", "scale"),
    "geglu": ("projected",),
}
each_call = pytest.mark.parametrize("call", CALLS)


def make(shape, dtype=F32, device="cpu"):
    """Leaves: x, branch (B, L, D), projected (B, L, 2 D), vectors (B, D) as chunks, weights (D,)."""
    generator = torch.Generator().manual_seed(0)
    batch, length, d = shape

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    s = SimpleNamespace(x=normal(*shape), branch=normal(*shape), projected=normal(batch, length, 2 * d))
    s.gate, s.shift, s.scale = normal(batch, 6 * d).chunk(6, dim=1)[:3]
    s.weight, s.bias = normal(d), normal(d)
    return SimpleNamespace(**{name: value.detach().requires_grad_() for name, value in vars(s).items()})


def run(call, s):
    """All results and gradients of one call, by name; the gradients that come in are functions of the place alone."""
    function, names = CALLS[call]
    results = function(s)
    incoming = [torch.linspace(-1, 1, r[:1].numel()).reshape(r[:1].shape).expand_as(r).to(r) for r in results]
    grads = torch.autograd.grad(results, [getattr(s, name) for name in names], incoming)
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | dict(zip(names, grads, strict=True))


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def part_of(s, part):
    shared = ("weight", "bias")
    return SimpleNamespace(
        **{
            name: (value if name in shared else value[part]).detach().requires_grad_()
            for name, value in vars(s).items()
        }
    )


@each_call
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 3, 7), F32), ((3, 17, 33), F32), ((3, 17, 48), BF16), ((3, 2, 1152), F32)]
)
def test_a_sample_has_the_same_bits_in_any_batch(call, shape, dtype, device):
    s = make(shape, dtype, device)
    whole = run(call, s)
    for part in (slice(0, 1), slice(1, 3)):
        some = run(call, part_of(s, part))
        for name in some.keys() - {"weight", "bias"}:
            assert torch.equal(some[name], whole[name][part]), name


@each_call
def test_bits_do_not_depend_on_the_batch_with_several_threads(call, torch_reference):
    # long enough for torch to share the work among threads
    s = make((3, 200, 96))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole, alone = run(call, s), run(call, part_of(s, slice(1, 2)))
    finally:
        torch.set_num_threads(threads)
    for name in alone.keys() - {"weight", "bias"}:
        assert torch.equal(alone[name], whole[name][1:2]), name


@each_call
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_saved_is_overwritten_so_backward_twice_gives_equal_bits(call, dtype, device):
    s = make((2, 17, 20), dtype, device)
    function, names = CALLS[call]
    before = {name: getattr(s, name).detach().clone() for name in names}
    results = function(s)
    total = sum((r.float().square().sum() for r in results), torch.zeros((), device=device))
    inputs = [getattr(s, name) for name in names]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert_equal({name: getattr(s, name) for name in names}, before)


@pytest.mark.parametrize(
    ("call", "floats_a_token"), [("norm_modulate", 2), ("rms with weights", 1), ("residual_norm_modulate", 2)]
)
def test_norms_save_two_numbers_a_token_beside_inputs_and_results(call, floats_a_token, device):
    s = make((2, 5, 12), BF16, device)
    assert [(2, 5)] * floats_a_token == saved_beside_inputs_and_results(call, s)


@pytest.mark.parametrize("call", ["gated_residual", "geglu"])
def test_elementwise_operators_save_nothing_beside_their_inputs(call, device):
    assert not saved_beside_inputs_and_results(call, make((2, 5, 12), BF16, device))


def saved_beside_inputs_and_results(call, s):
    """Shapes of what a call keeps for its backward pass in memory of its own."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        results = CALLS[call][0](s)
    assert saved
    known = {t.data_ptr() for t in (*vars(s).values(), *results)}
    return [tuple(t.shape) for t in saved if t.numel() and t.data_ptr() not in known]


@each_call
def test_an_empty_batch_gives_empty_results_and_zero_weight_gradients(call, device):
    s = make((0, 3, 8), device=device)
    function, names = CALLS[call]
    results = function(s)
    assert all(r.shape == (0, 3, 8) for r in results)
    grads = torch.autograd.grad([r.sum() for r in results], [getattr(s, name) for name in names])
    for name, grad in zip(names, grads, strict=True):
        assert grad.shape == getattr(s, name).shape
        assert not grad.any()


@each_call
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 1), F32), ((3, 17, 33), BF16), ((2, 3, 1152), F32)])
def test_no_result_reads_memory_that_nobody_wrote(call, shape, dtype, device):
    s = make(shape, dtype, device)
    expected = run(call, s)
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    try:
        # torch then fills what torch.empty and its relatives return with nan
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3, device=device).isnan().all()
        poisoned = run(call, s)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert_equal(expected, poisoned)


@only_interpreted
@each_call
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 1), F32), ((3, 17, 33), BF16), ((2, 3, 144), F32)])
def test_kernels_stay_inside_their_buffers(call, shape, dtype, monkeypatch):
    s = make(shape, dtype)
    expected = run(call, s)
    for name, tensor in vars(s).items():  # whoever reads beyond an input reads nan
        buffer = torch.full((tensor.numel() + 2 * BAND,), math.nan, dtype=dtype)
        inside = buffer[BAND:-BAND].view(tensor.shape).copy_(tensor.detach())
        setattr(s, name, inside.requires_grad_())
    buffers = []
    new = torch.empty_strided

    def guarded(shape, *, dtype, device):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        buffer = new((math.prod(shape) + 2 * BAND,), (1,), dtype=dtype, device=device).fill_(SENTINEL)
        buffers.append(buffer)
        return buffer[BAND:-BAND].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        inside = run(call, s)
    assert len(buffers) >= 2
    for buffer in buffers:
        sentinel = torch.tensor(SENTINEL, dtype=buffer.dtype)
        assert (buffer[:BAND] == sentinel).all()
        assert (buffer[-BAND:] == sentinel).all()
    assert_equal(expected, inside)


@pytest.fixture
def launches(monkeypatch):
    """(name, addresses of the tensors) of the Triton kernels launched, in order."""
    from triton.runtime import interpreter

    seen = []
    call = interpreter.GridExecutor.__call__

    def recorded(self, *arguments, **keywords):
        addresses = {t.data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
        seen.append((self.fn.__name__, addresses))
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    return seen


@only_interpreted
@each_call
def test_one_launch_forward_and_at_most_two_backward(call, launches):
    run(call, make((2, 33, 20)))
    backward = ["_backward_kernel"] if call == "geglu" else ["_backward_kernel", "_total_kernel"]
    assert [name for name, _ in launches] == ["_forward_kernel", *backward]


@only_interpreted
@pytest.mark.parametrize("call", ["norm_modulate", "gated_residual", "residual_norm_modulate"])
def test_frozen_vectors_save_the_second_launch_backward(call, launches):
    s = make((2, 5, 20))
    for name in ("gate", "shift", "scale"):
        setattr(s, name, getattr(s, name).detach())
    sum(r.sum() for r in CALLS[call][0](s)).backward()
    assert [name for name, _ in launches] == ["_forward_kernel", "_backward_kernel"]


@only_interpreted
@each_call
def test_chunks_and_parts_of_larger_tensors_are_read_in_place(call, launches):
    s = make((2, 7, 48))
    for name in ("x", "branch"):
        setattr(s, name, getattr(s, name)[:, 2:6].detach().requires_grad_())
    s.projected = s.projected[..., :64].detach().requires_grad_()
    run(call, s)
    for (_, addresses), names in zip(launches, (CALLS[call][1], READ_BACKWARDS[call]), strict=False):
        assert {getattr(s, name).data_ptr() for name in names} <= addresses


@only_interpreted
def test_triton_refuses_float64_with_a_way_out():
    s = make((1, 2, 3), torch.float64)
    for function, _ in CALLS.values():
        with pytest.raises(TypeError, match="float64 is computed by the torch reference only; pass float32, or set EN"):
            function(s)


def operator_cases(s):
    x, branch, gate, shift, scale = (t.detach() for t in (s.x, s.branch, s.gate, s.shift, s.scale))
    weight, bias, projected = (t.detach() for t in (s.weight, s.bias, s.projected))
    rows = x.float().mean(-1)
    yield OPERATORS.gated_residual, (x, gate, branch)
    for wanted in (True, False):
        yield OPERATORS.gated_residual_backward, (x, gate, branch, wanted)
    yield OPERATORS.geglu, (projected,)
    yield OPERATORS.geglu_backward, (x, projected)
    for rms, residual, vectors in ((False, (gate, branch), (shift, scale, weight, bias)),
                                   (True, (None, None), (None, scale, None, None))):  # fmt: skip
        yield OPERATORS.norm_modulate, (x, *residual, *vectors, 1e-6, rms)
        incoming = (x, None if rms else branch)
        mean = rows[:0, 0] if rms else rows
        for wanted in (True, False):
            saved = (x, *residual, *vectors, mean, rows.abs())
            yield OPERATORS.norm_modulate_backward, (*incoming, *saved, rms, wanted)


@pytest.mark.parametrize(("batch", "layout"), [(0, "contiguous"), (2, "contiguous"), (2, "apart"), (2, "transposed")])
def test_every_operator_passes_opcheck(batch, layout, device):
    s = make((batch, 3, 6), BF16, device)
    for name, tensor in vars(s).items():
        if layout == "apart":
            setattr(s, name, torch.stack([tensor, tensor], -1)[..., 0])
        elif layout == "transposed" and tensor.dim() == 3:
            setattr(s, name, tensor.transpose(0, 1).contiguous().transpose(0, 1))
    seen = set()
    for operator, arguments in operator_cases(s):
        opcheck(operator.default, arguments)
        seen.add(str(operator).partition(".")[2])
    names = ("gated_residual", "geglu", "norm_modulate")
    assert seen == {*names, *(f"{name}_backward" for name in names)}


@each_call
def test_operators_compile_as_one_graph_for_any_batch_with_equal_bits(call, device):
    function, names = CALLS[call]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        s = make((batch, 4, 10), device=device)
        inputs = [getattr(s, name) for name in names]
        eager, ours = function(s), compiled(s)
        grads = [torch.autograd.grad([r.square().sum() for r in results], inputs) for results in (eager, ours)]
        for one, other in zip((*eager, *grads[0]), (*ours, *grads[1]), strict=True):
            assert torch.equal(one, other)


@each_call
@torch.no_grad()  # torch aborts when autograd records a fake GPU tensor in a build without CUDA
def test_fake_gpu_tensors_flow_through_without_a_gpu(call):
    with FakeTensorMode():
        shapes = {"x": (2, 3, 4), "branch": (2, 3, 4), "projected": (2, 3, 8), "weight": (4,), "bias": (4,)}
        shapes |= dict.fromkeys(("gate", "shift", "scale"), (2, 1, 4))
        s = SimpleNamespace(**{name: torch.empty(size, device="cuda", dtype=BF16) for name, size in shapes.items()})
        for result in CALLS[call][0](s):
            assert (result.device.type, result.dtype, result.shape) == ("cuda", BF16, (2, 3, 4))


@each_call
def test_autocast_changes_nothing(call, device):
    s = make((2, 3, 8), device=device)
    plain = run(call, s)
    with torch.autocast(device, BF16):
        assert_equal(run(call, s), plain)
