"""Speed of `engine.kernels.group_norm_silu`, forward and backward."""


def test_group_norm_silu(measure, dtype):
    measure("group_norm_silu", "sd15", dtype, batch=2)
