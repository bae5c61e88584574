"""The configuration of objectives: which, joined how, and the keys of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.section import Positive, Rate, Section, Share, Weight

Kind = Literal[
    "grpo",
    "ppo",
    "regression",
    "progressive",
    "consistency",
    "draft",
    "diff_instruct",
    "dmd2",
    "flash_dmd",
    "vardiu",
]
Band = tuple[Share, Share]
REWARDED = ("grpo", "ppo")
"""The kinds that learn by policy optimisation."""


class Regression(Section):
    """Behaviour cloning on the teacher's pairs of noise and final image, through the student's own sampler."""


class Progressive(Section):
    """Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512), for any numbers of steps."""


class Consistency(Section):
    """Consistency distillation in its multi-step latent form (LCM, Luo et al. 2023, arXiv 2310.04378)."""


class Draft(Section):
    """The reward's own gradient through the last steps of the sampler (DRaFT, Clark et al. 2023, arXiv 2309.17400)."""


class DiffInstruct(Section):
    """Integral KL by a critic's score (Diff-Instruct, Luo et al. 2023, arXiv 2305.18455)."""


class Dmd2(Section):
    """Distribution matching with a GAN on the critic's features (DMD2, Yin et al. 2024, arXiv 2405.14867)."""


class FlashDmd(Section):
    """Distribution matching at high noise, a pixel GAN at low noise (Flash-DMD, arXiv 2511.20549)."""


class Vardiu(Section):
    """Variational diffusive upper bound by a posterior over the initial noise (VarDiU, arXiv 2508.20646)."""


class Objective(Section):
    kind: Kind = "grpo"
    """How the student learns. Policy optimisation on the reward: "grpo", whose baseline is the group's mean, and "ppo",
    a running mean of the condition's earlier rewards. The others are distillations (docs/objectives.md)."""
    joined: dict[Kind, Rate] = {}
    """More objectives, each with the weight of its loss beside that of `kind`, which has 1."""
    turns: dict[Kind, Positive] | None = None
    """Iterations that each objective acts in before it is the next one's turn, as {grpo: 5, dmd2: 1}; their weights
    stay. None: all act in every iteration, and their gradients add up."""
    bands: dict[Kind, Band] = {}
    """Interval of noise levels, from 0 (image) to 1 (noise), that a distillation acts on, such as {dmd2: [0.5, 1]};
    where none is given, all."""
    clip_range: Annotated[float, Field(gt=0)] | tuple[Weight, Weight] = 1e-2
    """Clip range of the ratio, which is of the log-prob averaged over elements; or (low, high)."""
    kl_coef: Weight = 0.0
    """Weight of the divergence from the frozen initial student; 0 leaves its forward pass out."""
    kl_kind: Literal["kl", "renyi", "chi2", "power"] = "kl"
    """Divergence whose weight is kl_coef."""
    kl_alpha: float | None = None
    """Order of the renyi and power divergences."""
    step_weights: Literal["none", "std"] = "std"
    """"std": weight a step by its std over the mean std, because the gradient of its log-prob grows as 1/std."""
    baseline_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """ppo: how much of a condition's running mean is kept when new rewards of it arrive."""
    regression: Regression = Regression()
    progressive: Progressive = Progressive()
    consistency: Consistency = Consistency()
    draft: Draft = Draft()
    diff_instruct: DiffInstruct = DiffInstruct()
    dmd2: Dmd2 = Dmd2()
    flash_dmd: FlashDmd = FlashDmd()
    vardiu: Vardiu = Vardiu()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All objectives that act, `kind` first."""
        return (self.kind, *self.joined)

    @property
    def rewarded(self) -> bool:
        """Whether one of them rolls out and learns from rewards by policy optimisation."""
        return any(kind in REWARDED for kind in self.kinds)

    @model_validator(mode="after")
    def _order(self) -> Objective:
        if self.kl_kind in ("renyi", "power") and (self.kl_alpha is None or self.kl_alpha in (0.0, 1.0)):
            raise ValueError(
                f"objective.kl_alpha={self.kl_alpha} is not an order of objective.kl_kind={self.kl_kind}; "
                "set one other than 0 and 1"
            )
        return self

    @model_validator(mode="after")
    def _joined(self) -> Objective:
        if self.kind in self.joined:
            raise ValueError(f"objective.joined names {self.kind}, which is objective.kind already; its weight is 1")
        if {"grpo", "ppo"} <= set(self.kinds):
            raise ValueError("objective.kind and objective.joined ask for grpo and ppo; one policy gradient is enough")
        if self.turns is not None and set(self.turns) != set(self.kinds):
            raise ValueError(
                f"objective.turns={self.turns} must name every objective and no other: {', '.join(self.kinds)}"
            )
        for kind, (low, high) in self.bands.items():
            if kind not in self.kinds:
                raise ValueError(f"objective.bands names {kind}, which does not act; those that do: {self.kinds}")
            if kind in REWARDED or kind == "draft" or kind == "regression":
                raise ValueError(
                    f"objective.bands.{kind}: it acts on whole trajectories; objective.bands is for the objectives "
                    "that train on noise levels"
                )
            if low >= high:
                raise ValueError(f"objective.bands.{kind}=[{low}, {high}] is empty; the first must be the smaller")
        return self
