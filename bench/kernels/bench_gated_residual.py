"""Speed of `engine.kernels.gated_residual`, forward and backward."""

import pytest


@pytest.mark.parametrize("latent", ["dit", "sd3"])
def test_gated_residual(measure, latent, dtype):
    measure("gated_residual", latent, dtype, batch=2)
