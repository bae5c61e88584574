"""Speed of `engine.kernels.geglu`, forward and backward."""

import pytest


@pytest.mark.parametrize("latent", ["sd15", "sdxl"])
def test_geglu(measure, latent, dtype):
    measure("geglu", latent, dtype, batch=2)
