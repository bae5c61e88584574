"""Speed of `engine.kernels.policy_sample` and `policy_log_prob`, the latter forward and backward."""


def test_policy_sample(measure, latent, dtype):
    measure("policy_sample", latent, dtype)


def test_policy_sample_given_noise(measure, latent, dtype):
    measure("policy_sample_given_noise", latent, dtype)


def test_policy_log_prob(measure, latent, dtype):
    measure("policy_log_prob", latent, dtype)
