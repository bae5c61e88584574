"""Walking the student's own sampler row by row: the states are those that drawing meets."""

import pytest
import torch

from engine.errors import EngineError
from engine.models.pipelines import load_pipeline
from engine.objectives.simulation import simulate
from engine.rl.rollout import rollout
from engine.sampling import make_policy

STEPS, ROWS, SHAPE = 4, 6, (1, 8, 8)


def step_noise(step):
    return torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(step))


@pytest.fixture(params=["ode", "renoise", "flow ode", "flow renoise"])
def sampler(request, tiny_teacher, tiny_flow_teacher):
    """A denoiser, its policy, pure noise and a condition."""
    flow = request.param.startswith("flow")
    denoiser = load_pipeline(tiny_flow_teacher if flow else tiny_teacher).denoiser
    kind, eta = ("renoise", 1.0) if request.param.endswith("renoise") else ("cps" if flow else "ddim", 0.0)
    x = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(9))
    return denoiser, make_policy(denoiser, kind, STEPS, eta), x, {"class_labels": torch.arange(ROWS)}


def walk(sampler, start, stop, x=None, **how):
    denoiser, policy, initial, condition = sampler
    start, stop = (torch.as_tensor(value).expand(ROWS) for value in (start, stop))
    how = {"step_noise": step_noise, **how}
    return simulate(denoiser, policy, initial if x is None else x, condition, start, stop, **how)


def test_the_end_of_the_walk_is_what_a_rollout_draws(sampler):
    denoiser, policy, x, condition = sampler
    drawn = rollout(denoiser, policy, x, condition, step_noise=step_noise)
    latents, passes = walk(sampler, 0, STEPS)
    torch.testing.assert_close(latents, drawn.final, rtol=1e-5, atol=1e-5)
    assert passes == drawn.passes == STEPS * ROWS


def test_each_row_stops_before_its_own_step(sampler):
    stop = torch.tensor([0, 3, 1, STEPS, 2, 0])
    mixed, _ = walk(sampler, 0, stop)
    assert torch.equal(mixed[stop == 0], sampler[2][stop == 0])
    for row, steps in enumerate(stop.tolist()):
        alone, _ = walk(sampler, 0, steps)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


def test_a_walk_in_two_legs_is_one_walk(sampler):
    middle = torch.tensor([1, 3, 0, STEPS, 2, 1])
    first, before = walk(sampler, 0, middle)
    both, after = walk(sampler, middle, STEPS, x=first)
    once, passes = walk(sampler, 0, STEPS)
    torch.testing.assert_close(both, once, rtol=1e-4, atol=1e-5)
    assert before == int(middle.sum())
    assert before + after == passes


def test_batches_change_nothing(sampler):
    stop = torch.tensor([0, 3, 1, STEPS, 2, 2])
    torch.testing.assert_close(walk(sampler, 0, stop, batch_size=2)[0], walk(sampler, 0, stop)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "calls"), [(None, STEPS), (2, 3 * STEPS)])
@pytest.mark.parametrize("stop", [0, 2, STEPS, [0, 0, 0, 0, 0, STEPS]])
def test_ranks_make_as_many_calls_wherever_their_rows_stop(sampler, batch_size, calls, stop):
    made = []
    handle = sampler[0].network.register_forward_hook(lambda *arguments: made.append(1))
    walk(sampler, 0, stop, batch_size=batch_size)
    handle.remove()
    assert len(made) == calls


def test_a_band_without_a_step_is_refused_with_the_levels_there_are(start):
    sizes = ("objective.kind=dmd2", "train.batch_size=4", "student.sampler=renoise")
    with pytest.raises(EngineError, match=r"objective.bands.dmd2: none of the student's steps .* their levels are 1, "):
        start(*sizes, "objective.bands={dmd2: [0.4, 0.5]}")
