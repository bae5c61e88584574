"""Speed of `engine.kernels.policy_loss`, forward and backward."""


def test_policy_loss(measure, latent, dtype):
    measure("policy_loss", latent, dtype)


def test_policy_loss_guided(measure, latent, dtype):
    measure("policy_loss_guided", latent, dtype)
