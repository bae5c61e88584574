"""Rewards: one file each, and the weighted composite."""

from .class_log_prob import class_log_prob_reward
from .composite import CompositeReward, RewardTerms, composite_reward
from .contract import Encoder, Encoding, Reward, RewardError
from .feature import feature_reward
from .pixel import pixel_reward

__all__ = [
    "CompositeReward",
    "Encoder",
    "Encoding",
    "Reward",
    "RewardError",
    "RewardTerms",
    "class_log_prob_reward",
    "composite_reward",
    "feature_reward",
    "pixel_reward",
]
