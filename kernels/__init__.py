"""Pure tensor functions, Triton kernels beside their PyTorch references, and ``patch``, which puts them into models."""

from .gated_residual import gated_residual
from .gaussian_policy import policy_log_prob, policy_sample
from .geglu import geglu
from .group_advantage import group_advantage
from .group_norm_silu import group_norm_silu
from .modulate import norm_modulate, residual_norm_modulate
from .patch import patch, unpatch
from .policy_divergence import policy_divergence
from .policy_loss import PolicyLoss, policy_loss

__all__ = [
    "PolicyLoss",
    "gated_residual",
    "geglu",
    "group_advantage",
    "group_norm_silu",
    "norm_modulate",
    "patch",
    "policy_divergence",
    "policy_log_prob",
    "policy_loss",
    "policy_sample",
    "residual_norm_modulate",
    "unpatch",
]
