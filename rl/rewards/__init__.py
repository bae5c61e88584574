"""Rewards: one file each, and the weighted composite (docs/rewards.md)."""

from .class_log_prob import class_log_prob_reward
from .composite import CompositeReward, Term, make_reward
from .contract import Asked, Encoder, Encoding, Reward, RewardError
from .feature import feature_reward
from .pixel import pixel_reward
from .settings import KINDS, RewardTerms
from .standardizer import Standardizer

__all__ = [
    "KINDS",
    "Asked",
    "CompositeReward",
    "Encoder",
    "Encoding",
    "Reward",
    "RewardError",
    "RewardTerms",
    "Standardizer",
    "Term",
    "class_log_prob_reward",
    "feature_reward",
    "make_reward",
    "pixel_reward",
]
