"""Tensors of more than 2^31 elements, whose offsets do not fit into 32 bits.

Without a GPU, such tensors are address space that no memory stands behind, and of every launch only the last programs
run: those that would overflow. The loss needs no case of its own: it addresses elements in the kernels probed here.
"""

import contextlib

import pytest
import torch

from engine.kernels import backend, group_advantage, policy_divergence, policy_log_prob, policy_loss, policy_sample

LIMIT = 2**31
BF16 = torch.bfloat16
only_interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="chooses programs in the interpreter")


@pytest.fixture
def last_programs(bounds_checked, monkeypatch):
    """`last_programs(count)`: from now on, launches run only their last programs, under their true numbers."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    run, builder = GridExecutor.__call__, InterpreterBuilder
    skipped = 0

    def choose(count):
        def run_last(self, *arguments, **keywords):
            nonlocal skipped
            skipped = max(0, self.grid[0] - count)
            self.grid = (self.grid[0] - skipped,)
            return run(self, *arguments, **keywords)

        def shifted(usual):
            return lambda self, x, y, z: usual(self, x + skipped, y, z)

        monkeypatch.setattr(GridExecutor, "__call__", run_last)
        monkeypatch.setattr(builder, "set_grid_dim", shifted(builder.set_grid_dim))
        monkeypatch.setattr(builder, "set_grid_idx", shifted(builder.set_grid_idx))

    return choose


@contextlib.contextmanager
def address_space():
    try:
        yield
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        pytest.skip("this process may not have tens of GB of address space")


def end_of(shape, rows):
    """A bf16 tensor that is address space up to its last rows."""
    tensor = torch.empty(shape, dtype=BF16)
    tensor[-len(rows) :] = rows
    return tensor


@only_interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on sums of rows that nobody summed
@pytest.mark.parametrize("n", [1000, 5000])  # one program a row, and several
def test_elements_beyond_2_31_are_reached(n, last_programs, truth):
    rows = LIMIT // n + 2  # the last row but one straddles the limit
    assert (rows - 2) * n < LIMIT < (rows - 1) * n
    s = truth.batch((2, n), dtype=BF16)
    a, b, std = (torch.ones(rows).index_copy_(0, torch.arange(rows - 2, rows), t) for t in (s.a, s.b, s.std))
    ones = torch.ones(rows)
    last_programs(2 * 8)
    with address_space():
        x, x_next, pred, uncond, ref, noise = (
            end_of((rows, n), t) for t in (s.x, s.x_next, s.pred, s.pred_uncond, s.pred_ref, s.noise)
        )
        guided = {"pred_uncond": uncond, "guidance": 2.0}
        sampled, log_prob = policy_sample(x, pred, a, b, std, noise=noise, **guided)
        leaves = [pred.requires_grad_(), uncond.requires_grad_()]
        scored = policy_log_prob(x, x_next, pred, a, b, std, **guided)
        gradients = torch.autograd.grad(scored, leaves, ones)
        divergence = policy_divergence(pred, ref, b, std)
        (gap_gradient,) = torch.autograd.grad(divergence, pred, ones)

    wide = [truth.f64(p).requires_grad_() for p in (s.pred, s.pred_uncond)]
    step, keywords = (s.a, s.b, s.std), {"pred_uncond": wide[1], "guidance": 2.0}
    policy = truth.policy(truth.f64(s.x), wide[0], *step, **keywords)
    truth.assert_close(sampled[-2:], policy.mean + policy.stddev * truth.f64(s.noise))
    true_score = truth.log_prob(truth.f64(s.x), truth.f64(sampled[-2:]), wide[0], *step, **keywords)
    truth.assert_close(log_prob[-2:], true_score)
    true_score = truth.log_prob(truth.f64(s.x), truth.f64(s.x_next), wide[0], *step, **keywords)
    truth.assert_close(scored[-2:], true_score)
    for ours, expected in zip(gradients, torch.autograd.grad(true_score.sum(), wide), strict=True):
        truth.assert_close(ours[-2:], expected)
    true_gap = truth.divergence(wide[0], truth.f64(s.pred_ref), s.b, s.std)
    truth.assert_close(divergence[-2:], true_gap)
    truth.assert_close(gap_gradient[-2:], torch.autograd.grad(true_gap.sum(), wide[0])[0])


@only_interpreted
def test_rewards_beyond_2_31_are_reached(last_programs, truth):
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0, 8.0])
    last_programs(2)
    with address_space():
        advantage = group_advantage(end_of((LIMIT // 3 * 3 + 6,), rewards), 3)[-6:]
    groups = rewards.double().view(2, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    truth.assert_close(advantage, expected.flatten())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16 * 1024, 16 * 1024 + 3])
def test_a_batch_of_more_than_2_31_elements_equals_its_parts(n, monkeypatch):
    if backend.INTERPRETED or not torch.cuda.is_available():
        pytest.skip("no GPU in this process")
    rows = LIMIT // n + 64
    if torch.cuda.mem_get_info()[0] < 8 * rows * n * BF16.itemsize:  # five of these tensors, and float32 of a part
        pytest.skip("not enough free memory on the GPU")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=BF16):
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    x, pred, noise = (normal(rows, n) for _ in range(3))
    a, b, std = 1.0, -0.5, normal(rows, dtype=torch.float32).abs() + 0.5
    advantage, shift = normal(rows, dtype=torch.float32), 0.01 * normal(rows, dtype=torch.float32)
    x_next, old = policy_sample(x, pred, a, b, std, noise=noise)
    result = policy_loss(x, x_next, pred.requires_grad_(), a, b, std, old + shift, advantage, clip_range=0.1)
    (gradient,) = torch.autograd.grad(result.loss, pred)

    loss = 0.0
    size = rows // 16
    monkeypatch.setenv(backend.VARIABLE, "torch")
    for start in range(0, rows, size):
        part = slice(start, start + size)
        step = (pred[part].detach(), a, b, std[part])
        part_next, part_old = policy_sample(x[part], *step, noise=noise[part])
        torch.testing.assert_close(x_next[part], part_next)
        torch.testing.assert_close(old[part], part_old, rtol=1e-5, atol=1e-5)
        leaf = step[0].requires_grad_()
        expected = policy_loss(
            x[part], x_next[part], leaf, *step[1:], old[part] + shift[part], advantage[part], clip_range=0.1
        )
        share = leaf.shape[0] / rows
        loss += expected.loss.item() * share
        torch.testing.assert_close(result.ratio[part], expected.ratio, rtol=1e-5, atol=1e-5)
        (part_gradient,) = torch.autograd.grad(expected.loss * share, leaf)
        largest = part_gradient.abs().max().item()
        torch.testing.assert_close(gradient[part], part_gradient, rtol=0, atol=2**-7 * largest)  # 1 unit in its place
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)  # a mean of terms around 0 whose size is 1
