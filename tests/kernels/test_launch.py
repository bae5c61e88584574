"""The short way of a launch runs the variant that Triton would choose, with the arguments that Triton would pass."""

import pytest
import torch

from bench.null_driver import null_driver
from engine.kernels import backend, group_advantage, policy_divergence, policy_loss, policy_sample

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter launches nothing")


@pytest.fixture
def driver():
    with null_driver(record=True) as active:
        yield active


def shifted(tensor):
    """The same values one element further on in memory, so no longer on a multiple of 16 bytes."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def calls(truth):
    """Calls that Triton specialises differently: dtypes, sizes of 1 and multiples of 16, alignment, constants."""
    for shape in ((1, 1), (1, 16), (3, 128), (16, 130), (2, 4096)):
        for dtypes in (
            {"dtype": torch.float32},
            {"dtype": torch.bfloat16},
            {"dtype": torch.float32, "pred": torch.float16},
        ):
            s = truth.batch(shape, **dtypes)
            step = (s.x, s.x_next, s.pred.requires_grad_(), s.a, s.b, s.std)
            yield lambda s=s: group_advantage(s.advantage, len(s.advantage))
            yield lambda s=s: policy_sample(s.x, s.pred, s.a, s.b, s.std, noise=s.noise)
            yield lambda s=s: policy_sample(
                s.x, s.pred, s.a.double(), s.b, s.std, seed=1, offset=torch.arange(len(s.x))
            )
            yield lambda s=s, step=step: policy_loss(*step, s.shift, s.advantage).loss.backward()
            yield lambda s=s, step=step: policy_loss(*step, s.shift, s.advantage, weight=s.weight).loss
            yield lambda s=s: policy_divergence(s.pred, shifted(s.pred_ref), s.b, s.std, kind="chi2")


def launches(driver, calls, *, forget):
    driver.launches.clear()
    for call in calls:
        if forget:
            backend._compiled.clear()
        call()
    return [
        (
            *launch[:-1],
            [(a.dtype, a.shape, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a for a in launch[-1]],
        )
        for launch in driver.launches
    ]


def test_remembered_variants_are_those_that_triton_chooses(driver, truth):
    triton = launches(driver, calls(truth), forget=True)
    backend._compiled.clear()
    launches(driver, calls(truth), forget=False)
    remembered = len(backend._compiled)
    ours = launches(driver, calls(truth), forget=False)
    assert ours == triton
    assert len({launch[1] for launch in ours}) > 20  # so many different binaries
    assert len(backend._compiled) == remembered  # the second time nothing was left to Triton


def test_a_misaligned_tensor_is_left_to_triton(driver, truth):
    s = truth.batch((2, 256))
    policy_divergence(s.pred, s.pred_ref, s.b, s.std)
    remembered = dict(backend._compiled)
    aligned = driver.launches[0][1]
    policy_divergence(s.pred, shifted(s.pred_ref), s.b, s.std)
    assert driver.launches[2][1] != aligned
    assert backend._compiled == remembered
