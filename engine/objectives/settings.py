"""The configuration of objectives: which, joined how, and the keys of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.section import NonNegative, Positive, Rate, Section, Share, Weight

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

    gradient_steps: Positive | None = None
    """Number of last steps of the sampler that gradients pass through, each at the memory of a forward pass. None:
    all."""
    loss: Literal["mse", "huber"] = "mse"
    """Distance of the student's final latent from the teacher's: the squared one, or the pseudo-Huber distance, which
    outliers move less."""
    huber_c: Rate = 0.03
    """Difference of latents at which the pseudo-Huber distance turns from squared to absolute."""


class Progressive(Section):
    """Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512), for any numbers of steps."""

    stages: tuple[Positive, ...] | None = None
    """Steps that the student has after each stage, such as [25, 12, 5]: fewer each time, and student.steps last. Each
    stage has an equal share of the iterations, and its teacher is the student of the stage before. None: one stage."""
    states: Literal["trajectory", "noised"] = "trajectory"
    """Where the student learns: "trajectory": at the states that the stage's teacher passes on its way from the pool's
    noise, drawn once a stage and kept in host memory; "noised": at the teacher's images with noise, the paper's way."""
    weighting: Literal["snr_plus_one", "truncated_snr"] = "snr_plus_one"
    """Weight of the squared error of the image that a prediction means: SNR + 1 or max(SNR, 1)."""


class Consistency(Section):
    """Consistency distillation in its multi-step latent form (LCM, Luo et al. 2023, arXiv 2310.04378). Its students are
    made for student.sampler=renoise."""

    grid: Positive = 50
    """Steps of the deterministic sampler whose neighbouring timesteps are made consistent."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Per optimizer step, of the averaged student that gives the targets. 0: the student itself, without a copy."""
    loss: Literal["mse", "huber"] = "huber"
    """Distance of the predicted images: the squared one, or the pseudo-Huber distance, which outliers move less."""
    huber_c: Rate = 1e-3
    """Difference of latents at which the pseudo-Huber distance turns from squared to absolute."""


class Draft(Section):
    """The reward's own gradient through the last steps of the sampler (DRaFT, Clark et al. 2023, arXiv 2309.17400)."""

    gradient_steps: Positive | None = None
    """Number of last steps of the sampler that gradients pass through, each at the memory of a forward pass. None:
    all."""


class Critic(Section):
    """A copy of the teacher that learns the student's images by denoising; its score is set against the teacher's."""

    updates: Positive = 5
    """Optimizer steps of the critic before each of the student's."""
    warmup: NonNegative = 100
    """Steps of the student that are left out at the start, so that the critic, which starts as the teacher, knows the
    student's images first: until then the difference of the two scores is the critic's own noise."""
    lr: Rate = 5e-4
    """Its learning rate at the start, which falls as the student's does."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """That it computes in. None: the student's."""


class FollowingCritic(Critic):
    """A critic that is also moved towards the student, so that it needs fewer steps."""

    updates: Positive = 2
    """Optimizer steps of the critic before each of the student's."""
    keep: Share = 0.99
    """Share of the critic's weights that stays when it is moved towards the student's, after each step of the student.
    1: it is not moved."""


LEVELS: Band = (0.02, 0.98)
"""Noise levels at which distributions are compared, as DMD2's code has them: beyond them one score says nothing."""


class Matching(Section):
    """What all distribution matching by a critic has."""

    levels: Band = LEVELS
    """Noise levels, from 0 (image) to 1 (noise), between which the two scores are compared."""
    balance_steps: bool = True
    """Weigh each step of the student by 1 over what a change of its prediction does to its image, where that is more
    than 1: for noise predictions sigma / alpha, which is 150 at a first step whose latent is almost pure noise, so that
    other steps would hardly learn. false: all count as they are."""


class DiffInstruct(Matching):
    """Integral KL by a critic's score (Diff-Instruct, Luo et al. 2023, arXiv 2305.18455)."""

    weight: Literal["none", "sigma2"] = "sigma2"
    """Of the KL at a noise level: "none", or "sigma2", its variance, without which low noise outweighs all other."""
    critic: Critic = Critic()


class Dmd2(Matching):
    """Distribution matching with a GAN on the critic's features (DMD2, Yin et al. 2024, arXiv 2405.14867)."""

    gan_weight: Weight = 0.1
    """Weight of the GAN in the student's loss. 0: no GAN, and neither real images nor a discriminator."""
    classifier_weight: Weight = 0.1
    """Weight of telling real from drawn images in the critic's loss, beside denoising."""
    real_images: str | None = None
    """Real images of the GAN: "digits" (the embedded ones) or a folder in Hugging Face's imagefolder form. None: the
    teacher's images of the same conditions, so that no data are needed."""
    critic: Critic = Critic()


class PixelEncoder(Section):
    """The frozen network through whose features the pixel discriminator looks."""

    path: str | None = None
    """Directory of a vision model in transformers format. None: the embedded reward encoder, for digits only."""
    layers: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (3, 6, 9, 12)
    """Hidden states that are looked at: 0 is the embedding, k the output of block k."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of its weights and activations."""


class FlashDmd(Matching):
    """Distribution matching at high noise, a pixel GAN at low noise (Flash-DMD, arXiv 2511.20549)."""

    boundary: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Noise level between the bands: steps of the student that read this level or a higher one learn by distribution
    matching, those below it by the GAN."""
    gan_weight: Rate = 0.1
    """Weight of the GAN beside distribution matching."""
    discriminator_lr: Rate = 1e-3
    """Learning rate of the discriminator's heads at the start, which falls as the student's does."""
    real_images: str | None = None
    """As objective.dmd2.real_images."""
    encoder: PixelEncoder = PixelEncoder()
    critic: FollowingCritic = FollowingCritic()


class Posterior(Section):
    """A copy of the teacher with a new head that learns which noise the student's images were made of."""

    head: Literal["gaussian", "mixture", "flow"] = "gaussian"
    """Density of the noise: a Gaussian for each element, a mixture over whole latents of such Gaussians, or coupling
    layers on top of them. Where the student is far from the bound's minimum, a richer one brings it closer."""
    components: Positive = 8
    """Of the mixture, or logistic distributions of an element in each layer of the flow."""
    layers: Positive = 4
    """Coupling layers of the flow."""
    width: Positive = 32
    """Channels of the head's convolutions."""
    updates: Positive = 1
    """Optimizer steps of the posterior before each of the student's."""
    lr: Rate = 1e-3
    """Its learning rate at the start, which falls as the student's does."""
    precision: Literal["fp32", "bf16", "fp16"] | None = "fp32"
    """That it computes in; its logarithms are small differences of large sums. None: the student's."""


class Vardiu(Section):
    """Variational diffusive upper bound by a posterior over the initial noise (VarDiU, arXiv 2508.20646)."""

    weight: Literal["none", "sigma", "sigma2"] = "sigma2"
    """Of the bound at a noise level: the power of its sigma, without which low noise outweighs all other."""
    power: tuple[Rate, Rate] = (0.1, 1.5)
    """Noise levels are u^p of their range, u uniform. p goes in equal ratios from the first number to the second over
    the run: below 1 high noise, above it low noise is drawn more."""
    control_variate: bool = True
    """Subtract from the gradient a term of mean zero, so that it has Diff-Instruct's variance."""
    antithetic: bool = False
    """Use every image twice, with its noise and with the opposite: less variance for twice the passes of teacher and
    posterior."""
    gradient_steps: Positive | None = None
    """Number of last steps of the sampler that gradients pass through, each at the memory of a forward pass. None:
    all."""
    posterior: Posterior = Posterior()


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
    def distilling(self) -> tuple[Kind, ...]:
        """Those of them that are no policy optimisation."""
        return tuple(kind for kind in self.kinds if kind not in REWARDED)

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
