from types import SimpleNamespace

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, LuminaRMSNormZero
from torch import nn
from torch.nn import functional as F

from engine.kernels import backend
from engine.kernels.gated_residual import gated_residual
from engine.kernels.modulate import norm_modulate, residual_norm_modulate

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
VECTORS = ("gate", "shift", "scale")
CHANNELS = ("weight", "bias")
# odd sizes, several programs a sample (2 and 4) of unequal shares, DiT-XL's width
SHAPES = [(2, 1, 5), (1, 3, 7), (3, 5, 100), (2, 17, 48), (1, 33, 16), (2, 2, 1152)]
MIXTURES = [
    {"dtype": F32},
    {"dtype": BF16},
    {"dtype": F16},
    {"dtype": F32, "x": BF16},
    {"dtype": BF16, "x": F32, "weight": F32, "shift": F16},
]


def tokens(shape, *, dtype=F32, device="cpu", seed=0, **dtypes):
    """x, branch (B, L, D); gate, shift, scale (B, D); weight, bias (D,), and gradients for two results."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, d = shape
    shapes = {"x": shape, "branch": shape, "d_residual": shape, "d_y": shape}
    shapes |= dict.fromkeys(VECTORS, (batch, d)) | dict.fromkeys(CHANNELS, (d,))
    draw = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    draw["weight"] += 1.0
    dtypes |= {name: dtypes.get("x", dtype) for name in ("d_residual", "d_y")}  # results are in the dtype of x
    return SimpleNamespace(**{name: value.to(device, dtypes.get(name, dtype)) for name, value in draw.items()})


def leaves(s, names):
    for name in names:
        setattr(s, name, getattr(s, name).detach().clone().requires_grad_())
    return s


def in_float64(s, truth):
    """The same numbers as float64 leaves."""
    return SimpleNamespace(**{name: truth.f64(value).requires_grad_() for name, value in vars(s).items()})


def true_norm_modulate(r, s, *, affine, kind, eps=1e-6):
    """torch's norm, then the modulation."""
    channels = r.shape[-1:]
    weight, bias = (s.weight, s.bias) if affine else (None, None)
    if kind == "layer":
        normed = F.layer_norm(r, channels, weight, bias, eps)
    else:
        normed = F.rms_norm(r, channels, weight, eps)
        normed = normed if bias is None else normed + bias
    return normed * (1 + s.scale.unsqueeze(1)) + s.shift.unsqueeze(1)


def assert_gradients_close(s, wide, names, truth, tolerance=5e-6):
    for name in names:
        mine = getattr(s, name)
        assert mine.grad.dtype == mine.dtype
        truth.assert_close(mine.grad, getattr(wide, name).grad, tolerance=tolerance)


def check_norm_modulate(s, truth, *, affine, kind, eps=1e-6):
    names = ["x", "shift", "scale", *(CHANNELS if affine else ())]
    leaves(s, names)
    channels = {"weight": s.weight, "bias": s.bias} if affine else {}
    y = norm_modulate(s.x, s.shift, s.scale, **channels, eps=eps, kind=kind)
    assert y.dtype == s.x.dtype
    y.backward(s.d_y)
    wide = in_float64(s, truth)
    expected = true_norm_modulate(wide.x, wide, affine=affine, kind=kind, eps=eps)
    expected.backward(wide.d_y)
    truth.assert_close(y, expected)
    assert_gradients_close(s, wide, names, truth)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_torchs_norms_in_float64(shape, kind, affine, device, truth):
    check_norm_modulate(tokens(shape, device=device), truth, affine=affine, kind=kind)


def test_tokens_of_one_channel_are_their_own_mean(device, truth):
    s = leaves(tokens((2, 3, 1), device=device), ["x", "shift", "scale"])
    y = norm_modulate(s.x, s.shift, s.scale)
    y.backward(s.d_y)
    assert torch.equal(y, s.shift.unsqueeze(1).expand_as(y))
    assert not s.x.grad.any()
    # a large eps, else the gradient of x is a difference of nearly equal numbers
    check_norm_modulate(tokens((2, 3, 1), device=device), truth, affine=True, kind="rms", eps=0.5)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 100), (1, 17, 48)])
def test_mixed_dtypes_are_computed_in_float32_and_rounded_once(shape, dtypes, device, truth):
    check_norm_modulate(tokens(shape, device=device, **dtypes), truth, affine=True, kind="layer")


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(2, 3, 100), (1, 17, 48)])
def test_the_chain_gives_residual_and_norm_and_the_gradients_from_both(shape, kind, dtypes, device, truth):
    names = ["x", "branch", *VECTORS, *CHANNELS]
    s = leaves(tokens(shape, device=device, **dtypes), names)
    residual, y = residual_norm_modulate(
        s.x, s.gate, s.branch, s.shift, s.scale, weight=s.weight, bias=s.bias, kind=kind
    )
    assert residual.dtype == y.dtype == s.x.dtype
    torch.autograd.backward([residual, y], [s.d_residual, s.d_y])

    wide = in_float64(s, truth)
    exact = wide.x + wide.gate.unsqueeze(1) * wide.branch
    truth.assert_close(residual, exact)
    # the norm is that of the stored residual
    stored = exact + (truth.f64(residual) - exact).detach()
    expected = true_norm_modulate(stored, wide, affine=True, kind=kind)
    torch.autograd.backward([exact, expected], [wide.d_residual, wide.d_y])
    truth.assert_close(y, expected)
    assert_gradients_close(s, wide, names, truth)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(3, 5, 100), (2, 3, 1152)])
def test_the_chain_equals_its_two_halves(shape, dtype, device, truth):
    s = tokens(shape, dtype=dtype, device=device)
    residual, y = residual_norm_modulate(s.x, s.gate, s.branch, s.shift, s.scale)
    assert torch.equal(residual, gated_residual(s.x, s.gate, s.branch))
    truth.assert_close(y, truth.f64(norm_modulate(residual, s.shift, s.scale)))


@pytest.mark.parametrize("used", ["residual", "y"])
def test_gradients_flow_from_one_result_alone(used, device, truth):
    names = ["x", "branch", "gate"]
    s = leaves(tokens((2, 3, 5), device=device), [*names, "shift", "scale"])
    residual, y = residual_norm_modulate(s.x, s.gate, s.branch, s.shift, s.scale)
    wide = in_float64(s, truth)
    exact = wide.x + wide.gate.unsqueeze(1) * wide.branch
    if used == "residual":
        residual.backward(s.d_residual)
        exact.backward(wide.d_residual)
        assert not s.shift.grad.any()
        assert not s.scale.grad.any()
    else:
        names += ["shift", "scale"]
        y.backward(s.d_y)
        true_norm_modulate(exact, wide, affine=False, kind="layer").backward(wide.d_y)
    assert_gradients_close(s, wide, names, truth)


def test_a_large_mean_costs_no_digits(device, truth):
    s = leaves(tokens((2, 3, 100), device=device), ["x"])
    with torch.no_grad():
        s.x.mul_(0.5).add_(1000.0)
    y = norm_modulate(s.x, s.shift, s.scale)
    y.backward(s.d_y)
    wide = in_float64(s, truth)
    expected = true_norm_modulate(wide.x, wide, affine=False, kind="layer")
    expected.backward(wide.d_y)
    # the mean itself is rounded to 6e-8 of 1000, which is 1.2e-4 of a standard deviation, before the row is centred
    truth.assert_close(y, expected, tolerance=2e-4)
    truth.assert_close(s.x.grad, wide.x.grad, tolerance=2e-4)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_errors_are_at_most_twice_those_of_torchs_composition_in_the_same_dtype(dtype, kind, device, truth):
    names = ["x", "branch", *VECTORS, *CHANNELS]
    s = leaves(tokens((3, 17, 100), dtype=dtype, device=device), names)
    theirs = leaves(SimpleNamespace(**vars(s)), names)
    ours = residual_norm_modulate(s.x, s.gate, s.branch, s.shift, s.scale, weight=s.weight, bias=s.bias, kind=kind)

    def composed(t):
        residual = t.x + t.gate.unsqueeze(1) * t.branch
        return residual, true_norm_modulate(residual, t, affine=True, kind=kind)

    wide = in_float64(s, truth)
    exact, torchs = composed(wide), composed(theirs)
    for results, t in ((ours, s), (torchs, theirs), (exact, wide)):
        torch.autograd.backward(results, [t.d_residual, t.d_y])
    triples = [*zip(ours, torchs, exact, strict=True)]
    triples += [tuple(getattr(t, name).grad for t in (s, theirs, wide)) for name in names]
    # one unit of fp32 for sums in another order; the interpreter truncates to bf16 where a GPU rounds to nearest
    unit = torch.finfo(F32).eps
    if backend.INTERPRETED and dtype == BF16:
        unit += torch.finfo(BF16).eps / 2
    for mine, other, true in triples:
        mine, other = ((truth.f64(value) - true).abs().max() for value in (mine, other))
        assert mine <= 2 * other + unit * true.abs().max()


def test_vectors_may_be_chunks_of_one_projection_with_or_without_a_token_dimension(device, truth):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 48), generator=generator).to(device)
    projection = torch.randn((2, 6 * 48), generator=generator).to(device).requires_grad_()
    wide = truth.f64(projection).requires_grad_()

    def block(x, projection, modulated, chain):
        shift, scale, gate, late_shift, late_scale, _ = projection.chunk(6, dim=1)
        y = modulated(x, shift, scale)
        return chain(x, gate[:, None], y, late_shift[:, None], late_scale[:, None])

    def true_modulated(x, shift, scale):
        return F.layer_norm(x, (48,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def true_chain(x, gate, branch, shift, scale):
        return x + gate * branch, true_modulated(x + gate * branch, shift[:, 0], scale[:, 0])

    results = block(x, projection, norm_modulate, residual_norm_modulate)
    expected = block(truth.f64(x), wide, true_modulated, true_chain)
    (results[0].sum() + results[1].square().sum()).backward()
    (expected[0].sum() + expected[1].square().sum()).backward()
    for ours, theirs in zip((*results, projection.grad), (*expected, wide.grad), strict=True):
        truth.assert_close(ours, theirs)


LAYOUTS = ["part of a joint sequence", "channels apart", "tokens first", "unaligned", "expanded vectors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_any_layout_agree(layout, device, truth):
    names = ["x", "branch", *VECTORS]
    s = tokens((2, 5, 48), device=device)
    change = {
        "part of a joint sequence": lambda t: torch.cat([t, t[:, :2]], 1)[:, : t.shape[1]],
        "channels apart": lambda t: torch.stack([t, t], -1)[..., 0],
        "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "expanded vectors": lambda t: t,
    }[layout]
    if layout == "expanded vectors":
        for name in VECTORS:
            setattr(s, name, getattr(s, name)[:1].expand(2, 48))
    for name in ("x", "branch", "d_residual", "d_y"):
        setattr(s, name, change(getattr(s, name)).requires_grad_())
    for name in VECTORS:
        setattr(s, name, getattr(s, name).requires_grad_())
    results = residual_norm_modulate(s.x, s.gate, s.branch, s.shift, s.scale)
    grads = torch.autograd.grad(results, [getattr(s, name) for name in names], [s.d_residual, s.d_y])
    wide = in_float64(s, truth)
    exact = wide.x + wide.gate.unsqueeze(1) * wide.branch
    expected = exact, true_norm_modulate(exact, wide, affine=False, kind="layer")
    true_grads = torch.autograd.grad(expected, [getattr(wide, name) for name in names], [wide.d_residual, wide.d_y])
    for ours, theirs in zip((*results, *grads), (*expected, *true_grads), strict=True):
        truth.assert_close(ours, theirs)
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("needed", [("x",), ("scale",), ("weight",), ("branch",), ("gate", "bias")])
def test_only_tensors_that_ask_get_a_gradient(needed, device):
    names = ["x", "branch", *VECTORS, *CHANNELS]
    s = leaves(tokens((2, 3, 7), device=device), names)

    def backward():
        results = residual_norm_modulate(s.x, s.gate, s.branch, s.shift, s.scale, weight=s.weight, bias=s.bias)
        torch.autograd.backward(results, [s.d_residual, s.d_y])
        return {name: getattr(s, name).grad for name in names}

    every = backward()
    for name in names:
        setattr(s, name, getattr(s, name).detach().requires_grad_(name in needed))
    some = backward()
    for name in names:
        assert torch.equal(some[name], every[name]) if name in needed else some[name] is None


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients_pass_gradcheck(kind, torch_reference, truth):
    s = in_float64(tokens((2, 3, 5)), truth)

    def both(x, gate, branch, shift, scale, weight, bias):
        return residual_norm_modulate(x, gate, branch, shift, scale, weight=weight, bias=bias, kind=kind)

    arguments = (s.x, s.gate, s.branch, s.shift, s.scale, s.weight, s.bias)
    assert torch.autograd.gradcheck(both, arguments)
    assert torch.autograd.gradcheck(lambda x, scale: norm_modulate(x, None, scale, kind=kind), (s.x, s.scale))


def stock_gradients(loss, x, module):
    module.zero_grad()
    x.grad = None
    loss.square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def assert_same(ours, theirs, truth):
    for one, other in zip(ours, theirs, strict=True):
        # both are float32, so both are off
        truth.assert_close(one, truth.f64(other), tolerance=2e-5)


def conditioned(module, width, device):
    torch.manual_seed(0)
    module.to(device)
    x, emb = torch.randn(2, 7, width, device=device), torch.randn(2, width, device=device)
    return module, x.requires_grad_(), emb


def test_it_is_the_norm_of_diffusers_ada_layer_norm_zero_and_of_the_second_half_of_its_block(device, truth):
    module, x, emb = conditioned(AdaLayerNormZero(24), 24, device)
    norm2 = nn.LayerNorm(24, elementwise_affine=False, eps=1e-6)

    def stock():
        y, gate, shift_mlp, scale_mlp, _ = module(x, emb=emb)
        hidden = x + gate.unsqueeze(1) * y  # diffusers' JointTransformerBlock
        return hidden + norm2(hidden) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]

    def ours():
        shift, scale, gate, shift_mlp, scale_mlp, _ = module.linear(module.silu(emb)).chunk(6, dim=1)
        hidden, y = residual_norm_modulate(x, gate, norm_modulate(x, shift, scale), shift_mlp, scale_mlp)
        return hidden + y

    assert_same([ours()], [stock()], truth)
    assert_same(stock_gradients(ours(), x, module), stock_gradients(stock(), x, module), truth)


@pytest.mark.parametrize(("norm_type", "kind"), [("layer_norm", "layer"), ("rms_norm", "rms")])
def test_it_is_diffusers_ada_layer_norm_continuous(norm_type, kind, device, truth):
    module, x, emb = conditioned(AdaLayerNormContinuous(24, 24, eps=1e-5, norm_type=norm_type), 24, device)
    nn.init.normal_(module.norm.weight)

    def ours():
        scale, shift = module.linear(module.silu(emb)).chunk(2, dim=1)
        bias = getattr(module.norm, "bias", None)
        return norm_modulate(x, shift, scale, weight=module.norm.weight, bias=bias, eps=1e-5, kind=kind)

    assert_same([ours()], [module(x, emb)], truth)
    assert_same(stock_gradients(ours(), x, module), stock_gradients(module(x, emb), x, module), truth)


def test_without_a_shift_it_is_diffusers_lumina_rms_norm_zero(device, truth):
    module, x, emb = conditioned(LuminaRMSNormZero(24, norm_eps=1e-5, norm_elementwise_affine=True), 24, device)

    def ours():
        scale = module.linear(module.silu(emb)).chunk(4, dim=1)[0]
        return norm_modulate(x, None, scale, weight=module.norm.weight, eps=1e-5, kind="rms")

    assert_same([ours()], [module(x, emb)[0]], truth)
    assert_same(stock_gradients(ours(), x, module), stock_gradients(module(x, emb)[0], x, module), truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.rand(2, 4)}, ValueError, r"x has shape \(2, 4\); it must be \(B, L, D\)"),
        ({"x": torch.rand(2, 3, 8193)}, ValueError, "x has 8193 channels; a token must fit into registers, 8192"),
        ({"x": torch.rand(2, 0, 4)}, ValueError, r"x has shape \(2, 0, 4\); it must be \(B, ...\), with an element"),
        ({"shift": torch.rand(2, 3, 4)}, ValueError, r"shift has shape .*pass one vector a sample, \(2, 4\) or"),
        ({"scale": None}, TypeError, "scale must be a tensor, got NoneType"),
        ({"gate": torch.rand(4)}, ValueError, r"gate has shape \(4,\), but x has \(2, 3, 4\); pass one vector a samp"),
        ({"branch": torch.rand(2, 3, 5)}, ValueError, r"branch has shape \(2, 3, 5\), but x has \(2, 3, 4\)"),
        ({"weight": torch.rand(2, 4)}, ValueError, r"weight has shape \(2, 4\), but x has 4 channels; pass \(4,\)"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias has dtype torch.int64; allowed are float32"),
        ({"scale": torch.rand(2, 4, device="meta")}, ValueError, "scale is on meta, but x on cpu; move them to one"),
        ({"eps": -1e-6}, ValueError, "eps=-1e-06 is negative; it is added to a variance"),
        ({"kind": "group"}, ValueError, "kind='group' is unknown; choose one of 'layer', 'rms'"),
    ],
)
def test_mistakes_are_named(change, error, message):
    arguments = {"x": torch.rand(2, 3, 4), "branch": torch.rand(2, 3, 4)}
    arguments |= {name: torch.rand(2, 4) for name in VECTORS}
    with pytest.raises(error, match=message):
        residual_norm_modulate(**(arguments | change))
