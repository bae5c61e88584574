"""Speed of `engine.kernels.group_advantage`."""


def test_group_advantage(measure):
    measure("group_advantage", "rewards", "fp32")
