"""What is checked between a valid configuration and the first written file: the machine, the teacher, the sizes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

from engine import ranks
from engine.config import Config
from engine.conflicts import conflicts
from engine.errors import EngineError
from engine.models.denoiser import Denoiser, check_guidance
from engine.models.digits import load_reward_encoder
from engine.models.loading import LoadingError
from engine.rl.rewards import CompositeReward, RewardError, make_reward
from engine.rl.rewards.local_model import Models, load_models
from engine.roles import Roles
from engine.sampling import deterministic_policy, make_policy

DIGIT_SHAPE, DIGIT_CLASSES = (1, 8, 8), 10


def check_machine(config: Config) -> None:
    """Refuse what this machine or the combination of keys cannot do, before anything is loaded.

    Raises:
        EngineError: one paragraph.
    """
    _machine(config)
    problems = conflicts(config, ranks.device().type)
    if problems:
        raise EngineError("; ".join(problems))


def check(config: Config, roles: Roles, world_size: int) -> CompositeReward:
    """Refuse what cannot work, with the key, the value and what is allowed; returns the reward that was asked for.

    Raises:
        EngineError: one paragraph.
    """
    _networks(config, roles)
    _schedules(config, roles.teacher, roles.student)
    _guidance(config, roles)
    _sizes(config, roles.student, world_size)
    return reward_of(config, roles.teacher)


def is_digits(denoiser: Denoiser) -> bool:
    """Whether the embedded digit encoders can look at a denoiser's images."""
    return denoiser.latent_shape == DIGIT_SHAPE and denoiser.classes == DIGIT_CLASSES


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "triton", "deepspeed", "bitsandbytes", "diffusers", "transformers", "xformers", "redif-engine")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {"python": platform.python_version(), **found}


def _machine(config: Config) -> None:
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise EngineError("logging.wandb=true, but wandb is not installed; pip install redif-engine[wandb]")
    cache = config.teacher.cache
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise EngineError(f"teacher.cache={cache} is a file; give a folder, new or of earlier runs")


def _networks(config: Config, roles: Roles) -> None:
    for denoiser, key in ((roles.teacher, "teacher.path"), (roles.student, "student.init")):
        bad = [n for n, p in denoiser.network.named_parameters() if not bool(p.isfinite().all())]
        if bad:
            raise EngineError(f"{key}: {len(bad)} weights are not finite, the first is {bad[0]}")
    if config.student.architecture or roles.student.network is roles.teacher.network:
        return
    # named by the configuration, as quantised weights have shapes of their own
    before, after = (dict(denoiser.network.config) for denoiser in (roles.teacher, roles.student))
    differing = sorted(
        key
        for key in {*before, *after}
        if not key.startswith("_") and key != "quantization_config" and before.get(key) != after.get(key)
    )
    if differing:
        raise EngineError(
            f"student.init={config.student.init} is another architecture than the teacher; "
            f"{len(differing)} entries of its configuration differ, the first is {differing[0]}"
        )


def _guidance(config: Config, roles: Roles) -> None:
    for key, denoiser, guidance in (
        ("teacher.guidance", roles.teacher, config.teacher.guidance),
        ("student.guidance", roles.student, config.student.guidance),
    ):
        try:
            check_guidance(denoiser, guidance)
        except LoadingError as error:
            raise EngineError(f"{key}: {error}") from None


def _schedules(config: Config, teacher: Denoiser, student: Denoiser) -> None:
    policies = []
    for key, denoiser, steps in (
        ("teacher.steps", teacher, config.teacher.steps),
        ("student.steps", teacher, config.student.steps),
        ("student.init", student, config.student.steps),
    ):
        try:
            policies.append(deterministic_policy(denoiser, steps))
        except EngineError as error:
            given = config.student.init if key == "student.init" else steps
            raise EngineError(f"{key}={given}: {error}") from None
    own, teachers = ([p.timesteps.tolist(), p.a.tolist(), p.b.tolist()] for p in (policies[2], policies[1]))
    if own != teachers:
        raise EngineError(
            f"student.init={config.student.init} has another noise schedule or prediction type than the teacher; "
            "a student is sampled and exported with its teacher's"
        )


def _sizes(config: Config, student: Denoiser, world_size: int) -> None:
    if config.evaluation.held_out < world_size:
        raise EngineError(
            f"evaluation.held_out={config.evaluation.held_out} is fewer than the {world_size} ranks; "
            "each draws a share of them"
        )
    if config.objective.rewarded:
        _rollout(config, student, world_size)
    check_shares(config, world_size)


def check_shares(config: Config, world_size: int) -> None:
    """Refuse a distillation's batch that ranks cannot share equally.

    Raises:
        EngineError: names train.batch_size.
    """
    if config.objective.distilling and config.train.batch_size % world_size:
        raise EngineError(
            f"train.batch_size={config.train.batch_size} is not a multiple of the {world_size} ranks; "
            "each takes an equal share"
        )


def _rollout(config: Config, student: Denoiser, world_size: int) -> None:
    rollout, train = config.rollout, config.train
    if rollout.conditions % world_size:
        raise EngineError(
            f"rollout.conditions={rollout.conditions} is not a multiple of the {world_size} ranks; "
            "whole groups stay on one rank"
        )
    try:
        policy = make_policy(student, config.policy.kind, config.student.steps, config.policy.eta)
    except EngineError as error:
        raise EngineError(f"policy.kind={config.policy.kind} policy.eta={config.policy.eta:g}: {error}") from None
    stochastic = int(policy.stochastic.sum())
    if stochastic == 0:
        raise EngineError(
            f"student.steps={config.student.steps} with policy.kind={config.policy.kind} has no stochastic step "
            "(its only step ends at the image), so nothing can be learned; use more steps"
        )
    if config.policy.window is not None and config.policy.window > stochastic:
        raise EngineError(
            f"policy.window={config.policy.window} is more than the {stochastic} stochastic steps of a "
            f"{config.student.steps}-step student"
        )
    pairs = rollout.group_size * min(stochastic, config.policy.window or stochastic)
    if pairs % train.updates:
        divisors = [n for n in range(1, pairs + 1) if pairs % n == 0]
        raise EngineError(
            f"train.updates={train.updates} does not divide the {pairs} (sample, step) pairs of a group; "
            f"give one of {', '.join(map(str, divisors))}"
        )


def reward_of(config: Config, teacher: Denoiser, models: Models = load_models) -> CompositeReward:
    """The reward of a run on this rank's device.

    Args:
        models: loads the models of local directories.

    Raises:
        EngineError: names the term that cannot be had, or that cannot look at this teacher's images.
    """
    terms = config.reward.terms.items()
    kinds = {value.get("kind", name) if isinstance(value, dict) else name for name, value in terms}
    needs_encoder = kinds & {"feature", "class_log_prob"}
    if needs_encoder and not is_digits(teacher):
        raise EngineError(
            f"reward.terms={sorted(config.reward.terms)}: {', '.join(sorted(needs_encoder))} read the digit encoder, "
            f"which sees 10 classes of {DIGIT_SHAPE}; this teacher draws {teacher.classes or 'no'} classes of "
            f"{teacher.latent_shape}. Use pixel, clip or dino"
        )
    encoder = load_reward_encoder().to(ranks.device()) if needs_encoder else None
    try:
        reward = make_reward(
            config.reward.terms,
            device=ranks.device(),
            encoder=encoder,
            standardize=config.reward.standardize,
            models=models,
        )
    except RewardError as error:
        raise EngineError(str(error)) from None
    asking = [name for name, term in reward.terms.items() if term.asks == "prompt"]
    if asking and teacher.classes is not None:
        raise EngineError(f"reward.terms.{asking[0]} reads prompts; the teacher is conditioned on classes")
    return reward
