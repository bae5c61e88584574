"""Advantages: what a reward is compared with, and that it is never with itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.rl.advantages import RunningBaseline, grpo_advantage

REWARDS = st.floats(-100, 100, allow_nan=False, width=32)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# GRPO


def test_a_group_is_compared_with_itself_alone():
    one, other = [1.0, 2.0, 3.0, 6.0], [-5.0, 0.0, 1.0, 8.0]
    alone = grpo_advantage(tensor(*one), 4, scale="group_std", clip=None)
    for second in (other, [100.0, 200.0, 300.0, 400.0], [0.0] * 4):
        together = grpo_advantage(tensor(*one, *second), 4, scale="group_std", clip=None)
        assert torch.equal(together[:4], alone)
    mean, std = 3.0, (14.0 / 4) ** 0.5  # of the four rewards by hand: deviations -2, -1, 0, 3
    torch.testing.assert_close(alone, torch.tensor([(r - mean) / std for r in one]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", ["group_std", "global_std", "none"])
def test_advantages_of_every_group_sum_to_zero_so_no_condition_is_favoured(scale):
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + torch.arange(6.0)[:, None] * 10
    advantage = grpo_advantage(rewards.flatten(), 5, scale=scale, clip=None).view(6, 5)
    torch.testing.assert_close(advantage.sum(1), torch.zeros(6), rtol=0, atol=1e-4)


def test_scale_none_is_dr_grpo_the_bare_deviation_from_the_mean_of_the_group():
    advantage = grpo_advantage(tensor(1, 2, 3, 6, 10, 10, 10, 14), 4, scale="none", clip=None)
    assert advantage.tolist() == [-2, -1, 0, 3, -1, -1, -1, 3]


def test_equal_rewards_give_zeros_in_every_scale():
    for scale in ("group_std", "global_std", "none"):
        advantage = grpo_advantage(torch.full((8,), 0.1), 4, scale=scale, clip=5.0)
        assert advantage.tolist() == [0.0] * 8


# PPO's running baseline


def test_the_first_visit_falls_back_on_the_other_samples_of_the_batch():
    baseline = RunningBaseline(10, decay=0.9)
    advantage = baseline.advantage(tensor(1, 2, 6), torch.tensor([4, 7, 0]), scale="none", clip=None)
    assert advantage.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_a_first_visit_with_several_samples_is_compared_with_the_others_of_its_condition():
    baseline = RunningBaseline(10, decay=0.9)
    advantage = baseline.advantage(tensor(1, 3, 100), torch.tensor([4, 4, 7]), scale="none", clip=None)
    assert advantage.tolist() == pytest.approx([1 - 3, 3 - 1, 100 - 2])


def test_a_second_visit_is_compared_with_the_running_mean_and_the_batch_has_no_part_in_it():
    baseline = RunningBaseline(10, decay=0.5)
    baseline.advantage(tensor(1, 2), torch.tensor([4, 7]), scale="none", clip=None)
    advantage = baseline.advantage(tensor(10, 50), torch.tensor([4, 7]), scale="none", clip=None)
    assert advantage.tolist() == pytest.approx([10 - 1, 50 - 2])


def test_decay_forgets_geometrically():
    baseline = RunningBaseline(1, decay=0.5)
    index = torch.tensor([0])
    for reward in (1.0, 2.0, 4.0):
        baseline.advantage(tensor(reward), index, scale="none", clip=None)
    # weights 1/4, 1/2, 1 on the rewards 1, 2, 4
    mean = (1 / 4 + 2 / 2 + 4) / (1 / 4 + 1 / 2 + 1)
    assert baseline.advantage(tensor(0), index, scale="none", clip=None).item() == pytest.approx(-mean)


def test_decay_zero_keeps_the_last_visit_only():
    baseline = RunningBaseline(1, decay=0.0)
    index = torch.tensor([0])
    for reward in (1.0, 7.0):
        baseline.advantage(tensor(reward), index, scale="none", clip=None)
    assert baseline.advantage(tensor(8), index, scale="none", clip=None).item() == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), REWARDS), min_size=2, max_size=8), REWARDS, st.booleans(), st.data())
def test_a_samples_own_reward_is_never_in_its_baseline(batch, other, visited, data):
    """Raising one reward by d raises its own advantage by exactly d: its baseline did not move (it is unbiased)."""
    position = data.draw(st.integers(0, len(batch) - 1))
    index = torch.tensor([condition for condition, _ in batch])

    def advantage(shift):
        baseline = RunningBaseline(4, decay=0.9)
        if visited:
            baseline.advantage(tensor(other, 1.0), torch.tensor([0, 1]), scale="none", clip=None)
        rewards = torch.tensor([reward for _, reward in batch], dtype=torch.float64)
        rewards[position] += shift
        return baseline.advantage(rewards, index, scale="none", clip=None)

    change = advantage(8.0) - advantage(0.0)
    assert change[position].item() == pytest.approx(8.0, abs=1e-6)


def test_the_baseline_learns_what_it_saw_whatever_the_scale_and_the_clip():
    states = []
    for scale, clip in (("none", None), ("global_std", 0.1)):
        baseline = RunningBaseline(3, decay=0.9)
        baseline.advantage(tensor(1, 2, 9), torch.tensor([0, 1, 1]), scale=scale, clip=clip)
        states.append(baseline.state_dict())
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("scale", ["group_std", "global_std"])
def test_scaled_advantages_have_unit_std_over_the_batch(scale):
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 7
    advantage = RunningBaseline(100, decay=0.9).advantage(rewards, torch.arange(40), scale=scale, clip=None)
    assert advantage.std(unbiased=False).item() == pytest.approx(1.0, rel=1e-4)


def test_advantages_are_clipped_on_both_sides():
    rewards = tensor(*[0.0] * 30, 100.0, -100.0)
    advantage = RunningBaseline(32, decay=0.9).advantage(rewards, torch.arange(32), scale="global_std", clip=2.0)
    assert advantage.max() == 2.0
    assert advantage.min() == -2.0


@pytest.mark.parametrize("scale", ["none", "global_std", "group_std"])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_a_batch_of_one_has_no_advantage_at_first_and_then_its_bare_deviation(scale, clip):
    baseline = RunningBaseline(3, decay=0.9)
    index = torch.tensor([1])
    assert baseline.advantage(tensor(5.0), index, scale=scale, clip=clip).tolist() == [0.0]
    assert baseline.advantage(tensor(5.5), index, scale=scale, clip=clip).item() == pytest.approx(0.5)


@pytest.mark.parametrize("scale", ["none", "global_std"])
def test_equal_rewards_give_zeros(scale):
    baseline = RunningBaseline(3, decay=0.9)
    for index in ([0, 1, 2, 2], [0, 0, 1, 2]):
        advantage = baseline.advantage(torch.full((4,), 0.1), torch.tensor(index), scale=scale, clip=5.0)
        torch.testing.assert_close(advantage, torch.zeros(4), rtol=0, atol=1e-6)


def test_state_dict_round_trip_continues_exactly():
    first, second = (RunningBaseline(5, decay=0.8) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        rewards, index = torch.randn(6, generator=generator), torch.randint(5, (6,), generator=generator)
        first.advantage(rewards, index, scale="none", clip=None)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    rewards, index = torch.randn(6, generator=generator), torch.randint(5, (6,), generator=generator)
    ours, theirs = (b.advantage(rewards, index, scale="global_std", clip=5.0) for b in (first, second))
    assert torch.equal(ours, theirs)
    fresh = RunningBaseline(5, decay=0.8).advantage(rewards, index, scale="global_std", clip=5.0)
    assert not torch.equal(ours, fresh)
