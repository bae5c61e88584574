"""Any tensor: shapes, dtypes, mixtures and layouts that hypothesis draws, against the float64 truth.

The draws are a function of this file (`derandomize`), so a failure repeats everywhere.
"""

import math
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import group_advantage, policy_divergence, policy_log_prob, policy_loss, policy_sample

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BATCHED = ("x", "x_next", "pred", "pred_uncond", "pred_ref", "noise")
KINDS = st.sampled_from([("kl", None), ("renyi", 0.5), ("chi2", None), ("power", 0.5)])
drawn = settings(
    max_examples=40, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # ours hold nothing that an example could change
)  # fmt: skip


@st.composite
def shapes(draw):
    """(B, ...): a few short dimensions, or one long row, which takes several programs."""
    short = st.lists(st.integers(1, 9), max_size=4)
    long = st.builds(lambda size, step: [size * step], st.integers(50, 160), st.sampled_from([16, 31]))
    return draw(st.integers(0, 3)), *draw(short | long)


@st.composite
def layouts(draw, dims):
    """Order of the dimensions in memory, the step from element to element, and where the first one stands."""
    return draw(st.permutations(range(dims))), draw(st.sampled_from([1, 1, 1, 2])), draw(st.sampled_from([0, 0, 1]))


def arrange(tensor, layout):
    """The same values in that layout, between nan."""
    order, step, start = layout
    strides = [step * math.prod(tensor.shape[j] for j in order[order.index(i) + 1 :]) for i in range(tensor.dim())]
    buffer = torch.full((start + step * tensor.numel(),), math.nan, dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, strides, start).copy_(tensor)


@st.composite
def steps(draw, guidances=(None, 0.0, 1.0, 4.0)):
    """What a step is made of: shape, dtypes and layouts of its batched tensors, dtypes or numbers of the scalars."""
    shape = draw(shapes())
    return SimpleNamespace(
        shape=shape,
        dtypes={name: draw(DTYPES) for name in BATCHED},
        layouts={name: draw(layouts(len(shape))) for name in BATCHED},
        scalars={name: draw(DTYPES | st.just(value)) for name, value in (("a", 0.75), ("b", -0.5), ("std", 0.625))},
        row_dtypes={name: draw(DTYPES) for name in ("advantage", "weight")},
        deterministic=draw(st.booleans()),
        guidance=draw(st.sampled_from(guidances)),
        reduction=draw(st.sampled_from(["mean", "sum"])),
    )


def build(step, device, truth):
    """(ours, its truth): the step's tensors, `step` and `keywords` of the calls, and the `leaves` of gradients."""
    s = truth.batch(step.shape, device=device, **step.dtypes)
    if step.deterministic:
        s.std[:1] = 0
    for name, form in (step.scalars | step.row_dtypes).items():
        setattr(s, name, form if isinstance(form, float) else getattr(s, name).to(form))
    f = s.pred if step.guidance is None else s.pred_uncond + step.guidance * (s.pred - s.pred_uncond)
    # so near that exponentials of a sum over a long row stay within reason
    distance = 0.3 / (math.sqrt(math.prod(step.shape[1:])) if step.reduction == "sum" else 1.0)
    s.pred_ref = (f.float() + distance * s.noise.float()).to(s.pred_ref.dtype)
    for name, layout in step.layouts.items():
        setattr(s, name, arrange(getattr(s, name), layout))
    wide = SimpleNamespace(**{name: truth.f64(value) for name, value in vars(s).items()})
    wide.a, wide.b, wide.std = s.a, s.b, s.std
    for side in (s, wide):
        side.keywords, side.leaves = {"reduction": step.reduction}, [side.pred.requires_grad_()]
        if step.guidance is not None:
            side.keywords |= {"pred_uncond": side.pred_uncond, "guidance": step.guidance}
            side.leaves.append(side.pred_uncond.requires_grad_())
        side.step = (side.x, side.x_next, side.pred, side.a, side.b, side.std)
    return s, wide


def strides(tensor):
    """Those that say something."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]


def check_gradients(ours, leaves, expected, true_leaves, truth, tolerance=5e-6):
    gradients, true_gradients = (
        torch.autograd.grad(value.sum(), of) for value, of in ((ours, leaves), (expected, true_leaves))
    )
    for gradient, leaf, true_gradient in zip(gradients, leaves, true_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert strides(gradient) == strides(torch.empty_like(leaf))
        truth.assert_close(gradient, true_gradient, tolerance=tolerance)


@drawn
@given(step=steps())
def test_any_tensor_is_sampled(step, device, truth):
    s, wide = build(step, device, truth)
    x_next, log_prob = policy_sample(s.x, *s.step[2:], noise=s.noise, **s.keywords)
    policy = truth.policy(wide.x, *wide.step[2:], wide.keywords.get("pred_uncond"), step.guidance)
    std = torch.as_tensor(s.std, dtype=torch.float32).cpu().double().expand(step.shape[0])
    assert x_next.dtype == s.x.dtype
    assert strides(x_next) == strides(torch.empty_like(s.x))
    truth.assert_close(x_next, policy.mean + std.view(-1, *(1,) * (len(step.shape) - 1)) * wide.noise)
    truth.assert_close(log_prob, truth.log_prob(wide.x, truth.f64(x_next), *wide.step[2:], **wide.keywords))
    assert torch.equal(log_prob, policy_log_prob(s.x, x_next, *s.step[2:], **s.keywords))


@drawn
@given(step=steps())
def test_any_tensor_is_scored(step, device, truth):
    s, wide = build(step, device, truth)
    ours, expected = policy_log_prob(*s.step, **s.keywords), truth.log_prob(*wide.step, **wide.keywords)
    truth.assert_close(ours, expected)
    check_gradients(ours, s.leaves, expected, wide.leaves, truth)


@drawn
@given(step=steps(guidances=[None]), kind=KINDS)
def test_any_tensor_has_a_divergence(step, kind, device, truth):
    s, wide = build(step, device, truth)
    keywords = {"kind": kind[0], "alpha": kind[1], "reduction": step.reduction}
    ours, expected = (
        f(t.pred, t.pred_ref, t.b, t.std, **keywords) for f, t in ((policy_divergence, s), (truth.divergence, wide))
    )
    truth.assert_close(ours, expected)
    check_gradients(ours, s.leaves, expected, wide.leaves, truth)


@drawn
@given(
    step=steps(), kind=KINDS | st.none(), weighted=st.booleans(), clip_range=st.sampled_from([0.01, (0.05, 0.4), 0.5])
)
def test_any_tensor_has_a_loss(step, kind, weighted, clip_range, device, truth):
    s, wide = build(step, device, truth)
    # ratios of 1.22 and 0.82: no rounding moves them across a bound of the clip, where the gradient jumps
    old = policy_log_prob(*s.step, **s.keywords).detach() + 0.2 * s.shift.sign()
    for side in (s, wide):
        side.keywords["clip_range"] = clip_range
        if kind is not None:
            side.keywords |= {"pred_ref": side.pred_ref, "kl_coef": 0.3, "kl_kind": kind[0], "kl_alpha": kind[1]}
        if weighted:
            side.keywords["weight"] = side.weight
    ours = policy_loss(*s.step, old, s.advantage, **s.keywords)
    expected = truth.loss(*wide.step, truth.f64(old), wide.advantage, **wide.keywords)
    if step.shape[0] == 0:
        expected = (expected[0].nan_to_num(0.0), *expected[1:])  # the mean over no samples: 0 by contract
    # the ratio's relative error is the absolute error of the log-prob, which grows with its size
    tolerance = 5e-6 * max([1.0, *expected[1].abs().tolist()])
    for value, true_value in zip(ours, expected, strict=True):
        truth.assert_close(value, true_value.double(), tolerance=tolerance)
    check_gradients(ours.loss, s.leaves, expected[0], wide.leaves, truth, tolerance)


def test_a_sample_may_be_a_single_number(device, truth):
    def results(*shape):
        s = truth.batch((3, *shape), device=device)  # the same numbers in any of these shapes
        step = (s.x, s.x_next, s.pred.requires_grad_(), s.a, s.b, s.std)
        loss = policy_loss(*step, s.shift, s.advantage, pred_ref=s.pred_ref, kl_coef=0.1)
        x_next, log_prob = policy_sample(s.x, *step[2:], noise=s.noise)
        seeded, _ = policy_sample(s.x, *step[2:], seed=1)
        divergence = policy_divergence(s.pred, s.pred_ref, s.b, s.std)
        (gradient,) = torch.autograd.grad(loss.loss + divergence.sum(), s.pred)
        return [t.detach().flatten() for t in (*loss, x_next, log_prob, seeded, divergence, gradient)]

    assert all(torch.equal(one, other) for one, other in zip(results(), results(1), strict=True))


@drawn
@given(
    groups=st.integers(0, 5), group_size=st.integers(1, 9) | st.sampled_from([33, 1100]), dtype=DTYPES,
    layout=layouts(1), scale=st.sampled_from(["group_std", "global_std", "none"]), clip=st.sampled_from([None, 0.5]),
    offset=st.sampled_from([0.0, 8.0]),
)  # fmt: skip
def test_any_rewards_have_advantages(groups, group_size, dtype, layout, scale, clip, offset, device, truth):
    rewards = torch.randn(groups * group_size, generator=torch.Generator().manual_seed(groups)) + offset
    rewards = arrange(rewards.to(device, dtype), layout)
    advantage = group_advantage(rewards, group_size, scale=scale, clip=clip)
    table = truth.f64(rewards).view(-1, group_size)
    expected = table - table.mean(1, keepdim=True)
    if scale != "none" and groups:
        spread = table if scale == "group_std" else table.view(1, -1)
        expected = expected / (spread.std(1, correction=0, keepdim=True) + 1e-6)
    truth.assert_close(advantage, expected.clamp(-(clip or math.inf), clip or math.inf).flatten())
