"""What a comparison is asked for: its own keys, and the configuration of every run in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from engine.checkpoint import differences
from engine.config import CONFIGS, load_config, parse_override, read_tree, valid_keys
from engine.errors import EngineError
from engine.run_directory import RUNS
from engine.section import NonNegative, Positive, Section
from engine.settings import Config

SHARED = ("teacher", "prompts", "evaluation", "reward", "vae", "student.steps")
"""What every method must have in common, for its rows to be comparable."""
TEACHER = "teacher"
"""Whose evaluation is a job, too; no method may be called so."""
PREFIX = "compare."


class Method(Section):
    """A method under a name of its own, such as a variant of another."""

    name: Annotated[str, Field(pattern=r"^[\w+.-]+$")]
    """How rows, files and pictures call it."""
    config: str
    """A shipped method, as the names in `methods`, or the path of a YAML file."""
    set: tuple[str, ...] = ()
    """Overrides of this method's alone, as `objective.kl_coef=0.01`; those of the whole comparison win."""


class Compare(Section):
    """The comparison's own keys."""

    methods: Annotated[tuple[str | Method, ...], Field(min_length=1)] = (
        "grpo",
        "ppo",
        "progressive",
        "consistency",
        "regression",
        "dmd2",
        "flash_dmd",
    )
    """What is compared: "grpo" or another NAME with a file digits_NAME.yaml in engine/configs, the path of a YAML file,
    or a mapping of `name`, `config` and `set`. The operations of the first one are the budget of all."""
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0, 1, 2)
    """Training seeds of each method; the evaluation's seed stays."""
    budgets: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    """Multiples of each method's own `iterations`, such as [1, 4] for rows that are nearer to convergence."""
    match: bool = True
    """Change the iterations of all methods but the first until a run of the first seed takes as many operations as the
    first method's, within 2.5 %, by up to three more runs. False: train for the iterations that are asked for."""
    every: NonNegative = 0
    """Iterations between evaluations on the way; 0: at the end only. They are not part of the budget."""
    workers: Positive | None = None
    """Processes that train at the same time, with one thread each. None: the cores, or one on a GPU."""

    @field_validator("seeds", "budgets")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{list(values)} names one twice")
        return values


CRITICS = ("diff_instruct", "dmd2", "flash_dmd")
"""Objectives that wait for a critic."""

QUICK = {"seeds": [0], "budgets": [0.25]}
QUICK_SHARED = ("evaluation.samples=1000",)
"""What --quick asks for, unless the command says otherwise."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        method: its name in the comparison.
        budget: multiple of the method's iterations.
        config: of the run.
        every: iterations between evaluations on the way.
        iterations: that were asked for, before operations were matched.
    """

    method: str
    budget: float
    config: Config
    every: int
    iterations: int

    @property
    def name(self) -> str:
        """Of its file."""
        return TEACHER if self.method == TEACHER else f"{self.method}-x{self.budget:g}-seed{self.config.seed}"

    @property
    def asked(self) -> dict[str, Any]:
        """What its file says beside the configuration."""
        return {
            "method": self.method,
            "budget": self.budget,
            "seed": self.config.seed,
            "every": self.every,
            "asked_iterations": self.iterations,
        }

    def differences(self, record: Mapping[str, Any]) -> list[str]:
        """What was asked for otherwise when its file was written; of the teacher's, only what all methods share."""
        free = ["output_dir", "prompts.cache", "iterations"]
        if self.method == TEACHER:
            return differences(
                record["config"], self.config, [*free, *(key for key in Config.model_fields if key not in SHARED)]
            )
        changed = differences(record["config"], self.config, free)
        names = {"every": "compare.every", "asked_iterations": "iterations"}
        return changed + [
            f"{name} was {record[key]} and is {self.asked[key]}"
            for key, name in names.items()
            if record[key] != self.asked[key]
        ]


@dataclass(frozen=True)
class Comparison:
    """Everything that is asked for.

    Attributes:
        output_dir: where results go.
        settings: the comparison's own keys.
        methods: name -> the configuration that its runs share, with seed 0 and budget 1.
    """

    output_dir: Path
    settings: Compare
    methods: Mapping[str, Config]

    def jobs(self, matched: Mapping[tuple[str, float], int]) -> list[Job]:
        """All runs, one seed of all methods after another, so that what is there first can be compared.

        Args:
            matched: (method, budget) -> iterations, where they are not budget times the method's own.
        """
        settings, made = self.settings, []
        for seed in settings.seeds:
            for budget in settings.budgets:
                for name, config in self.methods.items():
                    asked = max(1, round(config.iterations * budget))
                    changes = {"seed": seed, "iterations": matched.get((name, budget), asked)}
                    made.append(Job(name, budget, config.model_copy(update=changes), settings.every, asked))
        return made

    @property
    def teacher(self) -> Job:
        """The evaluation of the teacher."""
        config = next(iter(self.methods.values()))
        return Job(TEACHER, 0.0, config, 0, config.iterations)

    @property
    def workers(self) -> int:
        """Processes that train at the same time."""
        from deepspeed.accelerator import get_accelerator

        if self.settings.workers is not None:
            return self.settings.workers
        return len(os.sched_getaffinity(0)) if get_accelerator().device_name() == "cpu" else 1


def read(file: Path | None, overrides: Sequence[str], *, quick: bool = False) -> Comparison:
    """The comparison that a command asks for.

    Args:
        file: YAML with `output_dir`, a section `compare`, and any keys of a run, which all methods share.
        overrides: `key=value` strings with dotted keys of the same, which win over the file.
        quick: fewer seeds, iterations, conditions and images, and less warm-up of critics.

    Raises:
        EngineError: unreadable file, unknown key, a value that is not allowed, or methods that cannot be compared.
    """
    tree = {} if file is None else read_tree(file)
    own = {**(QUICK if quick else {}), **tree.pop("compare", {})}
    shared = [*(QUICK_SHARED if quick else ()), *_flat(tree)]
    for override in overrides:
        key, value = parse_override(override)
        if key.startswith(PREFIX):
            own[key.removeprefix(PREFIX)] = value
        else:
            shared.append(override)
    try:
        settings = Compare.model_validate(own)
    except ValidationError as error:
        raise EngineError(_explain(error)) from None
    methods: dict[str, Config] = {}
    for entry in settings.methods:
        method = entry if isinstance(entry, Method) else Method(name=Path(entry).stem, config=entry)
        if method.name in (*methods, TEACHER):
            raise EngineError(f"compare.methods: {method.name} is taken already; give each method a name of its own")
        smaller = _quarter(load_config(_path(method.config), method.set)) if quick else ()
        methods[method.name] = load_config(_path(method.config), [*method.set, *smaller, *shared])
    _check_shared(methods)
    output_dir = next(iter(methods.values())).output_dir
    folder = Path(output_dir) if output_dir else RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-compare"
    return Comparison(folder, settings, {name: _as_job(config, folder) for name, config in methods.items()})


def _quarter(config: Config) -> list[str]:
    """A quarter of what does not shrink with the iterations: else it is most of a quick run."""
    rollout, objective = config.rollout, config.objective
    return [
        f"rollout.pool={max(rollout.conditions, rollout.pool // 4)}",
        *(f"objective.{kind}.critic.warmup={getattr(objective, kind).critic.warmup // 4}" for kind in CRITICS),
    ]


def _path(config: str) -> Path:
    shipped = CONFIGS / ("digits.yaml" if config == "grpo" else f"digits_{config}.yaml")
    if "/" in config or config.endswith((".yaml", ".yml")):
        return Path(config)
    if not shipped.is_file():
        names = sorted(path.stem.removeprefix("digits_") for path in CONFIGS.glob("digits_*.yaml"))
        raise EngineError(
            f"compare.methods: {config} is not a shipped method; allowed are {', '.join(['grpo', *names])}, or the "
            "path of a YAML file"
        )
    return shipped


def _as_job(config: Config, output_dir: Path) -> Config:
    """What the runs of a comparison have of their own: no files, one thread, and nothing in another thread or a
    compiled graph, whose operations would not be counted."""
    changes = ["resume=none", "output_dir=null", "teacher.cache=null"]
    changes += ["train.threads=1", "rollout.chunks=1", "model.compile=false"]
    if config.prompts.path is not None and config.prompts.cache is None:
        changes.append(f"prompts.cache={output_dir / 'prompt_cache'}")  # encoded once
    return load_config(config, changes)


def _check_shared(methods: Mapping[str, Config]) -> None:
    (first, reference), *others = methods.items()
    for name, config in others:
        for key in SHARED:
            one, other = _at(reference, key), _at(config, key)
            if one != other:
                raise EngineError(
                    f"{first} and {name} differ in {key} ({_differing(one, other)}), so their rows could not be "
                    "compared; set it for all of them"
                )


def _at(config: Config, key: str) -> Any:
    value: Any = config.as_dict()
    for part in key.split("."):
        value = value[part]
    return value


def _differing(one: Any, other: Any) -> str:
    if not isinstance(one, dict):
        return f"{one} and {other}"
    return ", ".join(f"{key}: {one[key]} and {other[key]}" for key in one if one[key] != other[key])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Overrides that say what a tree of keys says."""
    for key, value in tree.items():
        section = f"{prefix}{key}."
        if isinstance(value, Mapping) and any(valid.startswith(section) for valid in valid_keys()):
            yield from _flat(value, section)
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def _explain(error: ValidationError) -> str:
    problems = []
    for one in error.errors():
        key = PREFIX + ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            problems.append(
                f"unknown key {key}; allowed are {', '.join(PREFIX + name for name in Compare.model_fields)}"
            )
        else:
            problems.append(f"{key}: {one['msg'].removeprefix('Value error, ')}")
    return "; ".join(dict.fromkeys(problems))
