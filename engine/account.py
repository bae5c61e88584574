"""What a run costs: network passes by role and seconds by phase."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from engine import ranks

ROLES = ("teacher", "student_forward", "student_backward", "reference", "evaluation")
"""Who evaluates a network in every run; a pass is one evaluation of one latent, so it costs the same on any machine and
in any batch."""


class Account:
    """Passes of all ranks and seconds of this one, since the start of the run.

    Args:
        more: whose passes are counted beside those of ROLES.

    Attributes:
        passes: role -> network evaluations of one latent; this rank's own until `settle` adds the others'.
        seconds: phase -> wall-clock seconds.
    """

    def __init__(self, more: Iterable[str] = ()) -> None:
        self._roles = (*ROLES, *dict.fromkeys(more))
        self.passes: Counter[str] = Counter(dict.fromkeys(self._roles, 0))
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def restore(self, passes: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Go on from a checkpoint's figures."""
        self.passes = Counter(passes)
        self.seconds = defaultdict(float, seconds)

    @contextmanager
    def settled(self) -> Iterator[dict[str, float]]:
        """Passes counted inside are summed over ranks at the end; yields a mapping that then holds what was added.

        Its keys are `passes/ROLE` and `time/PHASE`, and `time/iteration` for the whole.
        """
        passes, seconds, started = self.passes.copy(), dict(self.seconds), time.perf_counter()
        added: dict[str, float] = {}
        yield added
        # Not by the sum of counters, which drops every role that stands at 0.
        own = torch.tensor([[self.passes[role] - passes[role] for role in self._roles]])
        for role, count in zip(self._roles, ranks.gather(own).sum(0).tolist(), strict=True):
            self.passes[role] = passes[role] + count
            added[f"passes/{role}"] = count
        added |= {f"time/{phase}": total - seconds.get(phase, 0.0) for phase, total in self.seconds.items()}
        added["time/iteration"] = time.perf_counter() - started

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside, until the device is idle, to a phase."""
        started = time.perf_counter()
        yield
        ranks.synchronize()
        self.seconds[phase] += time.perf_counter() - started
