"""The configuration: every key, its default, its meaning and what it accepts.

A configuration is YAML; dotted overrides (`optimizer.lr=1e-5`) replace single keys, their values read as YAML. Unknown
keys are errors that name the nearest valid one. What depends on the machine or the teacher is checked at start, before
anything is written (`engine.preflight`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import EngineError

CONFIGS = Path(__file__).resolve().parent / "configs"

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number: YAML 1.1 wants a dot in it."""


_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)


class Teacher(Section):
    path: str = "digits"
    """"digits" (the embedded teacher) or a directory in diffusers format."""
    steps: Positive = 50
    """Deterministic steps that draw the target images."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance weight of the target images; 1 is without guidance."""
    cache: str | None = None
    """Folder of cached target images, shared between runs; by default the run's own `teacher_cache`."""


class Student(Section):
    steps: Positive = 5
    """Steps of the student: what it is distilled to, in training and evaluation alike."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Guidance weight in rollout, update and evaluation alike."""
    init: str = "teacher"
    """"teacher" (a copy of its weights) or a directory with a student of the teacher's architecture."""


class Model(Section):
    fused_kernels: Literal["auto", "on", "off"] = "auto"
    """Run the norms, gates and GEGLUs of teacher and student on our kernels (`engine.kernels.patch`). "auto": on a GPU;
    "on": on any device, by the slower PyTorch reference on a CPU; "off": not at all."""

    @field_validator("fused_kernels", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        # YAML 1.1 reads the bare words on and off as true and false
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Policy(Section):
    kind: Literal["ddim", "flow_sde", "dance_sde", "cps", "edm_ancestral"] = "ddim"
    """Sampler whose noise is trained on: "ddim" for diffusion teachers; "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO)
    or "cps" for flow matching."""
    eta: Annotated[float, Field(gt=0)] = 0.5
    """Noise of the sampler during training: DDIM's eta, the SDE's noise level. Evaluation is at 0."""
    window: Positive | None = 1
    """Number of consecutive steps that are stochastic in one iteration, at a place that changes from iteration to
    iteration; the other steps are deterministic and, before the window, computed once per group. With one
    step a sample's reward differs by nothing but that step's noise, at 40 % of the passes. None: all steps."""


class Rollout(Section):
    conditions: Positive = 64
    """Conditions per iteration, over all ranks; a multiple of their number (a group stays on one rank)."""
    group_size: Positive = 8
    """Samples of each condition."""
    pairing: Literal["noise", "prompt"] = "noise"
    """"noise": the group starts from the teacher's initial noise. "prompt": each sample from its own."""
    pool: Positive = 1024
    """Size of the fixed pool of training conditions; the teacher draws each of them once."""
    batch_size: Positive | None = None
    """Most samples in one forward pass of rollout, teacher and evaluation. None: all at once."""


class Prompts(Section):
    path: str | None = None
    """Text file of prompts, for text-conditional teachers only."""


class Reward(Section):
    terms: dict[str, float] = {"feature": 1.0}
    """Weights of the reward's terms: "feature" (cosine of encoder features with the teacher's image),
    "class_log_prob" (log-probability of the asked class), "pixel" (negative mean squared error)."""


class Advantage(Section):
    scale: Literal["group_std", "global_std", "none"] = "group_std"
    """What a reward's deviation is divided by; "none" with objective.kind=grpo is Dr.GRPO."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest magnitude of an advantage; None: as it is."""


class Objective(Section):
    kind: Literal["grpo", "ppo"] = "grpo"
    """"grpo": the baseline is the group's mean. "ppo": a running mean of the condition's earlier rewards."""
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

    @model_validator(mode="after")
    def _order(self) -> Objective:
        if self.kl_kind in ("renyi", "power") and (self.kl_alpha is None or self.kl_alpha in (0.0, 1.0)):
            raise ValueError(
                f"objective.kl_alpha={self.kl_alpha} is not an order of objective.kl_kind={self.kl_kind}; "
                "set one other than 0 and 1"
            )
        return self


class Optimizer(Section):
    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw" (torch) or "adamw8bit" (bitsandbytes, 8-bit states)."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Learning rate at the start."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second mean."""
    weight_decay: Weight = 0.0
    """Decoupled from the gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm, over all parameters and ranks."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How lr goes from its value to lr * final_lr over the iterations."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of lr; read by the linear and cosine schedules."""


class Ema(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Per iteration; the averaged student is the one evaluated and exported. 0: the student itself."""


class Train(Section):
    micro_batch: Positive = 512
    """Most (sample, step) pairs in one forward and backward pass of a rank; accumulation follows from it."""
    inner_epochs: Positive = 1
    """Passes over the (sample, step) pairs of a rollout."""
    updates: Positive = 1
    """Optimizer steps per inner epoch. With one update and one epoch every step is on-policy and never clipped."""
    ratio_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest |ratio - 1| before the first update of an iteration; beyond it training stops. None: in fp32 what
    rounding explains, 1e-6 of the largest |b| / std of a step and at least 1e-5; 0.05 in bf16 and fp16."""
    threads: Positive | None = None
    """CPU threads of each rank. None: the machine's cores over its ranks."""


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed partitions over ranks: 1 optimizer states, 2 gradients too, 3 parameters too; 0: nothing."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer states (stage 1-3), or parameters too (stage 3), in CPU memory."""
    deepspeed: dict[str, Any] = {}
    """Extra DeepSpeed configuration, passed through untouched; may not set what other keys decide."""

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> Zero:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage < least:
            raise ValueError(f"zero.offload={self.offload} needs zero.stage >= {least}, got zero.stage={self.stage}")
        return self


class Evaluation(Section):
    every: NonNegative = 10
    """Iterations between eta = 0 rewards on held-out conditions, which choose the best checkpoint; 0: never."""
    held_out: Positive = 256
    """Number of those conditions."""
    samples: Positive = 2000
    """Images per row of the final evaluation, on conditions of their own; at least 1000 for figures worth quoting."""
    seed: int = 123
    """Seed of the held-out conditions: the same for every training seed."""

    @field_validator("samples")
    @classmethod
    def _enough_for_a_covariance(cls, samples: int) -> int:
        if samples < 100:
            raise ValueError(
                f"evaluation.samples={samples} cannot estimate a Frechet distance of 64 features; give at least 100"
            )
        return samples


class Checkpoint(Section):
    every: NonNegative = 20
    """Iterations between checkpoints; the last iteration is always one. 0: the last only."""
    keep: Positive = 2
    """Checkpoints that stay; the best student stays besides."""


class Logging(Section):
    tensorboard: bool = True
    """Write `tensorboard/` in the run directory."""
    wandb: bool = False
    """Also log to Weights & Biases; needs the extra `wandb`."""


class Config(Section):
    """The whole configuration of a run; immutable."""

    output_dir: str | None = None
    """Run directory; must not hold a run yet, unless it is resumed. None: a new folder below `runs/`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the training conditions, their noise and the order of updates."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student in rollout and update; the optimizer keeps fp32 weights."""
    iterations: Positive = 50
    """Rollouts to train on; a resumed run goes on up to this number."""
    resume: str = "none"
    """"none", "auto" (the newest checkpoint in output_dir, if there is one) or the path of a run or a checkpoint."""
    teacher: Teacher = Teacher()
    student: Student = Student()
    model: Model = Model()
    policy: Policy = Policy()
    rollout: Rollout = Rollout()
    prompts: Prompts = Prompts()
    reward: Reward = Reward()
    advantage: Advantage = Advantage()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    train: Train = Train()
    zero: Zero = Zero()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        if self.rollout.conditions > self.rollout.pool:
            raise ValueError(
                f"rollout.conditions={self.rollout.conditions} is more than rollout.pool={self.rollout.pool}; "
                "an iteration draws its conditions without repetition"
            )
        if self.objective.kind == "grpo" and self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size={self.rollout.group_size} leaves every GRPO advantage at 0; "
                "give at least 2, or use objective.kind=ppo"
            )
        if self.student.steps > self.teacher.steps:
            raise ValueError(
                f"student.steps={self.student.steps} is more than teacher.steps={self.teacher.steps}; "
                "a student has at most its teacher's steps"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain mapping of all keys, as written to `config.yaml`."""
        return self.model_dump(mode="json")


def load_config(source: str | Path | Mapping[str, Any] | Config | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration and apply dotted overrides.

    Args:
        source: path of a YAML file, a mapping, a Config, or None for `engine/configs/digits.yaml`.
        overrides: `key=value` strings with dotted keys; values are read as YAML.

    Raises:
        EngineError: unreadable file, unknown key (the nearest valid one is named), or a value that is not allowed.
    """
    tree = _tree(CONFIGS / "digits.yaml" if source is None else source)
    for override in overrides:
        _apply(tree, override)
    _reject_unknown(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise EngineError(_explain(error.errors(), tree)) from None


def valid_keys() -> list[str]:
    """All dotted keys, sections before their members."""
    return list(_keys(Config, ""))


def _tree(source: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    if isinstance(source, Config):
        return source.as_dict()
    if isinstance(source, Mapping):
        return _copy(source)
    path = Path(source)
    if not path.is_file():
        shipped = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise EngineError(
            f"configuration file {path} does not exist; give a YAML file, such as those shipped: {shipped}"
        )
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngineError(f"configuration file {path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise EngineError(f"configuration file {path} holds a {type(tree).__name__}; a mapping of keys is needed")
    return tree


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise EngineError(f"override {override!r} is not of the form key=value, such as optimizer.lr=1e-5")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise EngineError(f"the value of override {override!r} is not YAML") from None
    *sections, name = key.split(".")
    _known(key)
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise EngineError(f"{section}={below!r} is not a section, so {key} cannot be set in it")
        tree = below
    tree[name] = value


def _keys(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _open_keys() -> tuple[str, ...]:
    return ("reward.terms", "zero.deepspeed")


def _known(key: str) -> None:
    keys = valid_keys()
    if key in keys or any(key.startswith(open_key + ".") for open_key in _open_keys()):
        return
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
    raise EngineError(f"unknown configuration key {key!r}; the nearest valid key is {near!r}")


def _reject_unknown(tree: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        _known(key)
        if isinstance(value, Mapping) and key not in _open_keys():
            _reject_unknown(value, f"{key}.")


def _explain(errors: Iterable[Mapping[str, Any]], tree: Mapping[str, Any]) -> str:
    by_key: dict[str, list[str]] = {}
    for error in errors:
        if error["type"] == "value_error":
            by_key[error["msg"].removeprefix("Value error, ")] = []
            continue
        # What follows the key in `loc` are the places in a list, and pydantic's names for the members of a union.
        key, value = "", tree
        for part in error["loc"]:
            if not isinstance(value, Mapping) or part not in value:
                break
            key, value = f"{key}.{part}" if key else str(part), value[part]
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
        if error["type"] == "model_type":
            message = f"a section of keys is needed, such as {next(k for k in valid_keys() if k.startswith(f'{key}.'))}"
        place = error["loc"][-1]
        if isinstance(place, int):
            message = f"its item {place}: {message}"
        by_key.setdefault(f"{key}={value!r} is not allowed: ", []).append(message)
    return "; ".join(start + ", or ".join(messages) for start, messages in by_key.items())
