"""Speed of `engine.kernels.modulate`, forward and backward."""

import pytest


@pytest.mark.parametrize("latent", ["dit", "sd3"])
@pytest.mark.parametrize("operation", ["norm_modulate", "residual_norm_modulate"])
def test_modulate(measure, operation, latent, dtype):
    measure(operation, latent, dtype, batch=2)
