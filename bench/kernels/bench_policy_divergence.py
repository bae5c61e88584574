"""Speed of `engine.kernels.policy_divergence`, forward and backward."""


def test_policy_divergence(measure, latent, dtype):
    measure("policy_divergence", latent, dtype)
