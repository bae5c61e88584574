"""Sampler policies, rollouts, rewards, advantages and policy-optimisation losses."""

from .policies import (
    GaussianPolicy,
    cps_policy,
    dance_sde_policy,
    ddim_policy,
    edm_ancestral_policy,
    flow_sde_policy,
    renoise_policy,
)

__all__ = [
    "GaussianPolicy",
    "cps_policy",
    "dance_sde_policy",
    "ddim_policy",
    "edm_ancestral_policy",
    "flow_sde_policy",
    "renoise_policy",
]
