"""Objectives: the ways in which a student learns from its teacher, one file each (docs/objectives.md).

`contract` says what the trainer asks of an objective, `catalogue` which there are.
"""
