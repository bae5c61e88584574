"""Sampler policies, rollouts, rewards, advantages and policy-optimisation losses."""
