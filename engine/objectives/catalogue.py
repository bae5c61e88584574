"""Which objectives there are, and those that a configuration asks for."""

from __future__ import annotations

from importlib import import_module

from .contract import Objective

PLACES = {
    "grpo": "policy_gradient.Grpo",
    "ppo": "policy_gradient.Ppo",
    "regression": "regression.Regression",
    "progressive": "progressive.Progressive",
    "consistency": "consistency.Consistency",
    "draft": "draft.Draft",
    "diff_instruct": "diff_instruct.DiffInstruct",
    "dmd2": "dmd2.Dmd2",
    "flash_dmd": "flash_dmd.FlashDmd",
    "vardiu": "vardiu.Vardiu",
}
"""objective.kind -> module and class in this package; imported when asked for."""


def objective_class(kind: str) -> type[Objective]:
    """The class of an objective.kind."""
    module, name = PLACES[kind].split(".")
    return getattr(import_module(f"engine.objectives.{module}"), name)
