"""Bringing terms of different scales to one: deviations from the running mean, over the running spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .contract import RewardError

ROUNDING = 1e-6  # of the mean: a smaller spread of fp32 values is their rounding


class Standardizer:
    """Mean and spread of each term over all rewards of a run so far, and the sum of the terms in those units.

    In a group's advantage the means cancel; the spreads decide how much each term counts. They are of the run and not
    of the batch, so the same image keeps nearly the same reward from one iteration to the next and a term whose rewards
    agree in one batch is not blown up there. Held in fp64 on the host.

    Args:
        weights: name of a term -> its weight.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.count = 0
        self._mean = dict.fromkeys(self.weights, 0.0)
        self._squares = dict.fromkeys(self.weights, 0.0)  # sum of squared deviations from the mean

    def update(self, terms: Mapping[str, Tensor]) -> None:
        """Take in a batch: name -> (N,) unweighted rewards of all ranks, the same on each."""
        batches = {name: terms[name].detach().double().cpu() for name in self.weights}
        added = len(next(iter(batches.values())))
        total = self.count + added
        for name, batch in batches.items():
            # two passes over the batch, then Chan's merge: no difference of large sums
            mean = batch.mean().item()
            shift = mean - self._mean[name]
            self._squares[name] += (batch - mean).square().sum().item() + shift**2 * self.count * added / total
            self._mean[name] += shift * added / total
        self.count = total

    def statistics(self) -> dict[str, tuple[float, float]]:
        """Name -> (mean, standard deviation) of all rewards so far.

        Raises:
            RewardError: there were none.
        """
        if self.count == 0:
            raise RewardError("no reward was taken in yet; update the standardizer with a batch before its total")
        return {name: (self._mean[name], math.sqrt(self._squares[name] / self.count)) for name in self.weights}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """sum_i weight_i (term_i - mean_i) / std_i of (N,) rewards, in fp32. A term without any spread counts as 0."""
        parts = []
        for name, (mean, std) in self.statistics().items():
            unit = self.weights[name] / std if std > ROUNDING * abs(mean) else 0.0
            parts.append((terms[name].double() - mean) * unit)
        return torch.stack(parts).sum(dim=0).float()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"count": self.count, "mean": dict(self._mean), "squares": dict(self._squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            RewardError: it is of other terms.
        """
        if set(state["mean"]) != set(self.weights):
            raise RewardError(
                f"the running statistics are of the terms {', '.join(sorted(state['mean']))}, and this run has "
                f"{', '.join(sorted(self.weights))}"
            )
        self.count, self._mean, self._squares = state["count"], dict(state["mean"]), dict(state["squares"])
