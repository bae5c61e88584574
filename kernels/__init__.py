"""Pure tensor functions: Triton kernels, each beside its PyTorch reference."""

from .gaussian_policy import policy_log_prob, policy_sample
from .group_advantage import group_advantage
from .policy_divergence import policy_divergence
from .policy_loss import PolicyLoss, policy_loss

__all__ = ["PolicyLoss", "group_advantage", "policy_divergence", "policy_log_prob", "policy_loss", "policy_sample"]
