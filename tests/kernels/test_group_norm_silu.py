import importlib
import math

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from engine.kernels import backend
from engine.kernels.group_norm_silu import group_norm_silu

# masked lanes normalise zeros, whose distance from a far mean overflows the exponential of numpy's fp32
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# groups of one channel, odd sizes, signals, volumes, one position
RESIDENT = [((2, 6, 5, 7), 3), ((3, 5, 9), 5), ((2, 12, 3, 4, 5), 4), ((3, 16), 2), ((2, 8, 8, 16), 1)]
# more than 16384 elements a group: channels that share tiles, and channels of two tiles each (8192 + 453)
SPLIT = [((1, 32, 33, 40), 2), ((2, 2, 95, 91), 1)]
MIXTURES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F32), (F32, BF16, F16)]


def in_layout(x, layout):
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":  # dense, but the positions are outermost
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x.contiguous()


def make(shape, *, dtypes=(F32, F32, F32), layout="contiguous", device="cpu", offset=1.0, scale=2.0, seed=0):
    """x, weight, bias and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    x = in_layout((x * scale + offset).to(device, dtypes[0]), layout).requires_grad_()
    weight, bias = (t.to(device, dtype).requires_grad_() for t, dtype in ((weight, dtypes[1]), (bias, dtypes[2])))
    return x, weight, bias, in_layout(grad.to(device, dtypes[0]), layout)


def stock(x, weight, bias, groups, activation="silu"):
    y = F.group_norm(x, groups, weight, bias)
    return F.silu(y) if activation == "silu" else y


def with_gradients(function, x, weight, bias, groups, grad, activation="silu"):
    leaves = [t for t in (x, weight, bias) if t is not None]
    y = function(x, weight, bias, groups, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def expected(x, weight, bias, groups, grad, activation="silu"):
    """y and its gradients in float64, by torch."""
    wide = [None if t is None else t.detach().cpu().double().requires_grad_() for t in (x, weight, bias)]
    return with_gradients(stock, *wide, groups, grad.cpu().double(), activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), RESIDENT + SPLIT)
def test_result_and_gradients_are_those_of_torch_in_float64(shape, groups, dtypes, layout, device, truth):
    x, weight, bias, grad = make(shape, dtypes=dtypes, layout=layout, device=device)
    ours = with_gradients(group_norm_silu, x, weight, bias, groups, grad)
    assert [t.dtype for t in ours] == [dtypes[0], *dtypes]
    for one, other in zip(ours, expected(x, weight, bias, groups, grad), strict=True):
        truth.assert_close(one, other)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [RESIDENT[0], SPLIT[0]])
def test_activation_and_affine_map_may_be_left_out(shape, groups, layout, activation, affine, device, truth):
    x, weight, bias, grad = make(shape, layout=layout, device=device)
    weight, bias = (weight, bias) if affine else (None, None)
    ours = with_gradients(group_norm_silu, x, weight, bias, groups, grad, activation)
    for one, other in zip(ours, expected(x, weight, bias, groups, grad, activation), strict=True):
        truth.assert_close(one, other)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("shape", "groups"), [RESIDENT[0], *SPLIT])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(shape, groups, dtype, device):
    x, weight, bias, grad = make(shape, dtypes=(dtype, dtype, dtype), device=device)
    arguments = (x, weight, bias, groups, grad)
    ours, theirs = with_gradients(group_norm_silu, *arguments), with_gradients(stock, *arguments)
    for one, other, exact in zip(ours, theirs, expected(*arguments), strict=True):
        error, allowed = ((t.cpu().double() - exact).abs().max() for t in (one, other))
        # and a unit in the last place, for where torch happens to hit the exact value
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [RESIDENT[0], *SPLIT])
def test_a_mean_far_beyond_the_deviation_does_not_cancel(shape, groups, layout, device, truth):
    x, weight, bias, grad = make(shape, layout=layout, device=device, offset=-100.0, scale=0.1)
    ours = with_gradients(group_norm_silu, x, weight, bias, groups, grad)
    # the mean itself is rounded, to 4e-6 of 100: 4e-5 deviations; mean(x^2) - mean(x)^2 would be wrong by 10 %
    for one, other in zip(ours, expected(x, weight, bias, groups, grad), strict=True):
        truth.assert_close(one, other, tolerance=1e-4)


def test_groups_of_one_element_are_their_bias(device):
    x, weight, bias, grad = make((2, 4, 1), device=device)
    y, dx, d_weight, d_bias = with_gradients(group_norm_silu, x, weight, bias, 4, grad, activation="none")
    assert torch.equal(y, bias.view(1, 4, 1).expand(2, 4, 1))
    assert not dx.any()
    assert not d_weight.any()
    assert torch.equal(d_bias, grad.sum((0, 2)))


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_groups_are_their_bias_and_finite(value, device, truth):
    x = torch.full((2, 4, 3, 5), value, device=device, requires_grad=True)
    _, weight, bias, grad = make((2, 4, 3, 5), device=device)
    y, dx, _, _ = with_gradients(group_norm_silu, x, weight, bias, 2, grad)
    truth.assert_close(y, F.silu(bias.detach().cpu().double()).view(1, 4, 1, 1).expand(y.shape))
    assert dx.isfinite().all()


def test_gradients_pass_gradcheck(torch_reference):
    x, weight, bias, _ = make((2, 6, 2, 3), dtypes=(F64, F64, F64))
    for activation in ("silu", "none"):
        assert torch.autograd.gradcheck(
            lambda *t, a=activation: group_norm_silu(*t, 3, activation=a), (x, weight, bias)
        )
    assert torch.autograd.gradcheck(lambda t: group_norm_silu(t, None, None, 2, eps=0.1), (x,))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 6, 5, 7), "channels_last"),
        ((2, 6, 5, 7), "permuted"),
        ((2, 6, 5, 7), "sliced"),
        ((2, 6, 9), "channels_last"),
        ((2, 6, 3, 2, 4), "channels_last"),
        ((1, 32, 33, 40), "channels_last"),
        ((1, 32, 33, 40), "permuted"),
    ],
)
def test_dense_layouts_are_kept_by_result_and_gradient(shape, layout, dtype, device, truth):
    x, weight, bias, grad = make(shape, dtypes=(dtype, F32, F32), layout=layout, device=device)
    ours = with_gradients(group_norm_silu, x, weight, bias, 2, grad)
    assert ours[0].stride() == ours[1].stride() == torch.empty_like(x).stride()
    for one, other in zip(ours, expected(x, weight, bias, 2, grad), strict=True):
        truth.assert_close(one, other)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_any_layout_are_read_right(layout, device, truth):
    x, weight, bias, grad = make((2, 6, 5, 7), layout=layout, device=device)
    for strided in (in_layout(grad, "sliced"), in_layout(grad, "channels_last"), grad[:, :, :1, :1].expand(grad.shape)):
        ours = with_gradients(group_norm_silu, x, weight, bias, 3, strided)
        for one, other in zip(ours, expected(x, weight, bias, 3, strided), strict=True):
            truth.assert_close(one, other)


def test_strided_weights_are_read_right(device, truth):
    x = make((2, 6, 5, 7), device=device)[0]
    weight, bias = torch.rand(6, 2, device=device).unbind(1)
    ours = group_norm_silu(x, weight, bias, 2)
    truth.assert_close(ours, stock(*(t.detach().cpu().double() for t in (x, weight, bias)), 2))


@pytest.mark.parametrize(("shape", "groups"), [RESIDENT[0], SPLIT[0]])
@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_the_gradients_that_are_needed_are_returned(needed, shape, groups, device, truth):
    x, weight, bias, grad = make(shape, device=device)
    exact = expected(x, weight, bias, groups, grad)[1:]
    leaves = [
        t.requires_grad_(need) for t, need in zip((x.detach(), weight.detach(), bias.detach()), needed, strict=True)
    ]
    group_norm_silu(*leaves, groups).backward(grad)
    for leaf, need, other in zip(leaves, needed, exact, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            truth.assert_close(leaf.grad, other)


def test_backward_twice_gives_the_same_gradients(device):
    # nothing that was saved is overwritten, and sums have one order
    x, weight, bias, grad = make(SPLIT[0][0], device=device)
    y = group_norm_silu(x, weight, bias, 2)
    first = torch.autograd.grad(y, (x, weight, bias), grad, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight, bias), grad)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "groups"), [((5, 6, 5, 7), 3), ((5, 6, 5, 7), 1), ((3, 4, 71, 64), 1)])
def test_a_sample_has_the_same_bits_in_any_batch(shape, groups, dtype, layout, device):
    x, weight, bias, grad = make(shape, dtypes=(dtype, F32, F32), layout=layout, device=device)
    y, dx, _, _ = with_gradients(group_norm_silu, x, weight, bias, groups, grad)
    for part in (slice(0, 1), slice(1, 3)):
        some = x.detach()[part].requires_grad_()
        some_y, some_dx, _, _ = with_gradients(group_norm_silu, some, weight, bias, groups, grad[part])
        assert torch.equal(some_y, y[part])
        assert torch.equal(some_dx, dx[part])


def test_a_long_group_keeps_its_bits_in_any_batch_on_several_threads(torch_reference):
    # torch splits one long sum over threads, but not several: the trap of batch size 1 with one group
    x, weight, bias, grad = make((2, 2, 190, 191))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = with_gradients(group_norm_silu, x, weight, bias, 1, grad)
        alone = with_gradients(group_norm_silu, x.detach()[:1].requires_grad_(), weight, bias, 1, grad[:1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[0][:1], alone[0])
    assert torch.equal(whole[1][:1], alone[1])


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (0, 4)])
def test_an_empty_batch_has_zero_weight_gradients(shape, device):
    x, weight, bias, grad = make(shape, device=device)
    y, dx, d_weight, d_bias = with_gradients(group_norm_silu, x, weight, bias, 2, grad)
    assert y.shape == dx.shape == shape
    assert not d_weight.any()
    assert not d_bias.any()


def test_autocast_changes_nothing(device):
    x, weight, bias, _ = make((2, 6, 5, 7), dtypes=(BF16, F32, F32), device=device)
    plain = group_norm_silu(x, weight, bias, 2)
    with torch.autocast(device, BF16):
        assert torch.equal(group_norm_silu(x, weight, bias, 2), plain)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *(((2, 4, 3, 5), layout) for layout in ("contiguous", "channels_last", "permuted", "sliced")),
        ((1, 4, 71, 64), "contiguous"),
        ((0, 4, 3, 5), "channels_last"),
    ],
)
def test_both_operators_pass_opcheck(shape, layout, device):
    x, weight, bias, grad = (t.detach() for t in make(shape, dtypes=(BF16, F32, F16), layout=layout, device=device))
    operators = torch.ops.engine_kernels
    for affine in ((weight, bias), (None, None)):
        opcheck(operators.group_norm_silu.default, (x, *affine, 1, 1e-5, True))
        _, mean, rstd = operators.group_norm_silu(x, *affine, 1, 1e-5, True)
        for affine_grad in {False, affine[0] is not None}:
            opcheck(operators.group_norm_silu_backward.default, (grad, x, *affine, mean, rstd, True, affine_grad))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_training_step_compiles_as_one_graph_with_equal_results(layout, device):
    def step(x, weight, bias, groups, activation="silu"):
        return group_norm_silu(x * 2, weight, bias, groups, activation=activation) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4):
        x, weight, bias, grad = make((batch, 6, 5, 7), layout=layout, device=device)
        eager = with_gradients(step, x, weight, bias, 3, grad)
        for one, other in zip(with_gradients(compiled, x, weight, bias, 3, grad), eager, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 9), 5), ((2, 6, 5, 7), 3), ((1, 32, 33, 40), 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_result_reads_memory_that_nobody_wrote(shape, groups, layout, device, monkeypatch):
    x, weight, bias, grad = make(shape, layout=layout, device=device)
    plain = with_gradients(group_norm_silu, x, weight, bias, groups, grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    # torch then fills what torch.empty and its relatives return with nan
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = with_gradients(group_norm_silu, x, weight, bias, groups, grad)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(one, other) for one, other in zip(plain, poisoned, strict=True))


@pytest.fixture
def launches(monkeypatch):
    """(name of a kernel, tensors it was given) of every launch, in order."""
    module = importlib.import_module("engine.kernels.group_norm_silu")
    seen = []
    launch = module.launch

    def recorded(kernel, programs, tensors, numbers, **keywords):
        seen.append((kernel.fn.__name__, tensors))
        launch(kernel, programs, tensors, numbers, **keywords)

    monkeypatch.setattr(module, "launch", recorded)
    return seen


@pytest.mark.skipif(not backend.INTERPRETED, reason="counts Triton's own launches")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "forward", "backward"),
    [
        ((2, 6, 5, 7), 3, ["forward_kernel"], ["backward_kernel", "totals_kernel"]),
        (
            (1, 32, 33, 40),
            2,
            ["moments_kernel", "statistics_kernel", "apply_kernel"],
            ["backward_kernel", "totals_kernel", "input_gradient_kernel"],
        ),
    ],
)
def test_launch_budgets_are_kept_and_tensors_read_in_place(shape, groups, forward, backward, layout, launches):
    x, weight, bias, grad = make(shape, layout=layout)
    y = group_norm_silu(x, weight, bias, groups)
    assert [name for name, _ in launches] == forward
    assert launches[0][1][0].data_ptr() == x.data_ptr()
    assert any(tensor.data_ptr() == y.data_ptr() for tensor in launches[-1][1])
    launches.clear()
    y.backward(grad)
    assert [name for name, _ in launches] == backward
    assert [tensor.data_ptr() for tensor in launches[0][1][:2]] == [grad.data_ptr(), x.data_ptr()]
    launches.clear()
    group_norm_silu(x, weight.detach(), bias.detach(), groups).backward(grad)
    frozen = 1 if len(forward) == 1 else 3
    assert len(launches) == len(forward) + frozen


@pytest.mark.skipif(not backend.INTERPRETED, reason="only Triton refuses float64")
def test_triton_refuses_float64_with_a_way_out():
    with pytest.raises(
        TypeError, match="float64 is computed by the torch reference only; pass float32, or set ENGINE_K"
    ):
        group_norm_silu(torch.rand(2, 4, 3, dtype=F64), None, None, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(2)}, ValueError, r"x has shape \(2,\); it must be \(N, C, ...\)"),
        ({"x": torch.rand(2, 6, 0)}, ValueError, r"x has shape \(2, 6, 0\)"),
        ({"x": torch.ones(2, 6, 3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64; allowed are float32"),
        ({"num_groups": 4}, ValueError, "num_groups=4 does not divide the 6 channels of x; pass a divisor"),
        ({"num_groups": 0}, ValueError, "num_groups=0 does not divide"),
        ({"num_groups": 2.0}, ValueError, "num_groups=2.0 does not divide"),
        ({"weight": None}, ValueError, "weight is None, but bias is not; pass both or neither"),
        ({"bias": None}, ValueError, "bias is None, but weight is not; pass both or neither"),
        ({"weight": torch.rand(3)}, ValueError, r"weight has shape \(3,\), but x has 6 channels; pass \(6,\)"),
        ({"bias": torch.rand(6, 1)}, ValueError, r"bias has shape \(6, 1\), but x has 6 channels"),
        ({"bias": torch.ones(6, dtype=torch.int64)}, TypeError, "bias has dtype torch.int64"),
        ({"weight": torch.rand(6, device="meta")}, ValueError, "weight is on meta, but x on cpu; move them to"),
        ({"eps": -1e-5}, ValueError, "eps=-1e-05 is negative; it is added to a variance"),
        ({"eps": math.inf}, ValueError, "eps=inf must be finite"),
        ({"activation": "relu"}, ValueError, "activation='relu' is unknown; choose one of 'silu', 'none'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, message):
    arguments = {"x": torch.rand(2, 6, 3), "weight": torch.rand(6), "bias": torch.rand(6), "num_groups": 2}
    with pytest.raises(error, match=message):
        group_norm_silu(**(arguments | change))
