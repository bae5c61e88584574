import math

import pytest
import torch

from engine.kernels import group_advantage


def expected(rewards, group_size, scale, clip=math.inf, eps=1e-6):
    groups = rewards.cpu().double().view(-1, group_size)
    advantage = groups - groups.mean(1, keepdim=True)
    if scale == "group_std":
        advantage = advantage / (groups.std(1, correction=0, keepdim=True) + eps)
    elif scale == "global_std":
        advantage = advantage / (groups.std(correction=0) + eps)
    return advantage.clamp(-clip, clip).flatten()


@pytest.mark.parametrize("scale", ["group_std", "global_std", "none"])
@pytest.mark.parametrize(("groups", "group_size"), [(1, 2), (3, 4), (5, 7), (2, 33), (2, 1100)])
def test_advantage_is_the_deviation_from_the_group_over_the_population_std(scale, groups, group_size, device, truth):
    rewards = torch.randn(groups * group_size, generator=torch.Generator().manual_seed(1)).to(device)
    advantage = group_advantage(rewards, group_size, scale=scale)
    assert advantage.dtype == torch.float32
    truth.assert_close(advantage, expected(rewards, group_size, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rewards_of_any_float_dtype_give_float32(dtype, device, truth):
    rewards = torch.rand(12).to(device, dtype)
    advantage = group_advantage(rewards, 4)
    assert advantage.dtype == torch.float32
    truth.assert_close(advantage, expected(rewards, 4, "group_std"))


@pytest.mark.parametrize("scale", ["group_std", "global_std", "none"])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_equal_rewards_and_groups_of_one_give_exact_zeros(scale, eps, device):
    # the mean of three times 0.1 is not 0.1, in fp32 as in float64
    same, double = torch.full((6,), 0.1), torch.full((6,), 0.1, dtype=torch.float64)
    for rewards, group_size in ((same, 3), (double, 3), (same + 1e6, 6), (torch.rand(5), 1)):
        advantage = group_advantage(rewards.to(device), group_size, scale=scale, eps=eps)
        assert torch.equal(advantage.cpu(), torch.zeros(len(rewards)))


def test_one_group_of_equal_rewards_does_not_disturb_the_others(device, truth):
    rewards = torch.tensor([0.3, 0.3, 0.3, 1.0, 2.0, 4.0], device=device)
    advantage = group_advantage(rewards, 3)
    assert (advantage[:3] == 0).all()
    truth.assert_close(advantage, expected(rewards, 3, "group_std"))


def test_eps_is_added_to_the_std(device, truth):
    rewards = torch.tensor([1.0, 3.0, 0.0, 8.0], device=device)  # stds of 1 and 4
    truth.assert_close(
        group_advantage(rewards, 2, eps=0.5), torch.tensor([-1 / 1.5, 1 / 1.5, -4 / 4.5, 4 / 4.5]).double()
    )


def test_a_large_common_offset_costs_no_accuracy(device, truth):
    rewards = 4096.0 + torch.arange(8, device=device) / 64  # exact in fp32
    truth.assert_close(group_advantage(rewards, 4), expected(rewards, 4, "group_std"))


def test_advantages_are_clipped_on_both_sides(device, truth):
    rewards = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, -9.0], device=device)
    advantage = group_advantage(rewards, 4, clip=1.5)
    assert advantage.max() == 1.5
    assert advantage.min() == -1.5
    truth.assert_close(advantage, expected(rewards, 4, "group_std", clip=1.5))


def test_a_nan_reward_poisons_its_group_only(device):
    rewards = torch.tensor([1.0, float("nan"), 3.0, 1.0, 2.0, 3.0], device=device)
    advantage = group_advantage(rewards, 3, clip=5.0)
    assert advantage[:3].isnan().all()
    assert advantage[3:].isfinite().all()
    assert group_advantage(rewards, 3, scale="global_std").isnan().all()


def test_strided_rewards_and_an_empty_batch_are_fine(device, truth):
    rewards = torch.rand(24, device=device)[::2]
    truth.assert_close(group_advantage(rewards, 4), expected(rewards, 4, "group_std"))
    assert group_advantage(rewards[:0], 4).shape == (0,)


def test_rewards_carry_no_gradient(device):
    assert not group_advantage(torch.rand(4, device=device, requires_grad=True), 2).requires_grad


def test_a_group_size_that_does_not_divide_says_what_to_pass():
    message = "group_size=3 does not divide 8 rewards; pass a divisor of the number of samples per rank"
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.rand(8), 3)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.rand(2, 2), 2), {}, ValueError, r"rewards has shape \(2, 2\)"),
        ((torch.ones(4, dtype=torch.int64), 2), {}, TypeError, "rewards has dtype torch.int64"),
        (([1.0, 2.0], 2), {}, TypeError, "rewards must be a tensor, got list"),
        ((torch.rand(4), 2.0), {}, TypeError, "group_size must be an int, got float"),
        ((torch.rand(4), 0), {}, ValueError, "group_size=0"),
        (
            (torch.rand(4), 2),
            {"scale": "std"},
            ValueError,
            "scale='std' is unknown; choose one of 'group_std', 'global",
        ),
        ((torch.rand(4), 2), {"clip": 0}, ValueError, "clip=0 must be > 0"),
        ((torch.rand(4), 2), {"eps": -1.0}, ValueError, "eps=-1.0 is negative"),
    ],
)
def test_mistakes_are_named(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        group_advantage(*arguments, **keywords)
