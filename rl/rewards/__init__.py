"""Rewards: one file each, and the weighted composite."""
