"""Behaviour cloning: a student of another architecture learns to predict as its teacher does, before any reward.

The teacher walks its own trajectories of `student.steps` steps, and the student regresses on the predictions that it
makes there, guidance included (ReDiF, arXiv 2512.22802, section 3: the student's initialisation).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from engine import ranks, zero
from engine.errors import EngineError
from engine.models.denoiser import Condition, Denoiser
from engine.rl import GaussianPolicy
from engine.rl.rollout import timesteps_of
from engine.sampling import deterministic_policy
from engine.trainer import Trainer


def clone(trainer: Trainer, teacher: Denoiser) -> list[float]:
    """Train the student on the teacher's predictions for cloning.iterations optimizer steps of the update's batch size.

    The averaged student and the reference start from the cloned one.

    Returns:
        The loss of each step: the mean squared error of the guided prediction, over all ranks.

    Raises:
        EngineError: for a loss that is not finite.
    """
    config, account = trainer.config, trainer.account
    steps, policy = config.cloning.iterations, deterministic_policy(teacher, config.student.steps)
    pairs = trainer.examples
    count = min(math.ceil(pairs / config.student.steps) * ranks.world_size(), trainer.pool.size)
    losses = []
    with account.settled(), account.timed("cloning"):
        for step in tqdm(range(steps), desc="cloning", disable=not ranks.is_first(), dynamic_ncols=True):
            indices = trainer.pool.draw(count, iteration=step)
            indices = indices[ranks.share(len(indices))]
            condition = {name: value.to(trainer.device) for name, value in trainer.pool.condition(indices).items()}
            x, target = teacher_predictions(
                teacher, policy, trainer.pool.initial_noise(indices).to(trainer.device), condition,
                guidance=config.teacher.guidance, batch_size=config.rollout.batch_size,
            )  # fmt: skip
            account.passes["teacher"] += len(indices) * len(policy.timesteps) * teacher.passes(config.teacher.guidance)
            zero.set_learning_rate(trainer.engine, config.cloning.lr * (1 + math.cos(math.pi * step / steps)) / 2)
            losses.append(_regress(trainer, policy, x, target, condition))
    if losses:
        trainer.start_from_here()
    return losses


@torch.no_grad()
def teacher_predictions(
    teacher: Denoiser,
    policy: GaussianPolicy,
    x: Tensor,
    condition: Condition,
    *,
    guidance: float,
    batch_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The states of deterministic trajectories and the guided predictions there.

    Args:
        policy: T deterministic steps.
        x: (M, C, H, W) initial latents.
        condition: tensors (M, ...).
        batch_size: most latents in one forward pass; None: all.

    Returns:
        (states, predictions), each (T, M, C, H, W) fp32.
    """
    states, predictions = [], []
    batches = torch.arange(len(x), device=x.device).split(batch_size or len(x))
    for step in range(len(policy.timesteps)):
        parts = []
        for rows in batches:
            own = {name: value[rows] for name, value in condition.items()}
            parts.append(teacher.guided(x[rows], timesteps_of(policy, step, x[rows]), own, guidance=guidance))
        prediction = torch.cat(parts)
        states.append(x)
        predictions.append(prediction)
        a, b, _ = (float(value[step]) for value in (policy.a, policy.b, policy.std))
        x = a * x + b * prediction
    return torch.stack(states), torch.stack(predictions)


def _regress(trainer: Trainer, policy: GaussianPolicy, x: Tensor, target: Tensor, condition: Condition) -> float:
    guidance, rows = trainer.config.student.guidance, x.shape[1]
    pairs = torch.arange(policy.a.numel() * rows, device=x.device)[: trainer.examples]
    losses: list[Tensor] = []

    def propagated(part: Tensor) -> Tensor:
        step, row = part // rows, part % rows
        own = {name: value[row] for name, value in condition.items()}
        state = x[step, row]
        prediction = trainer.student.guided(state, timesteps_of(policy, step, state), own, guidance=guidance)
        loss = F.mse_loss(prediction, target[step, row]) * (len(part) / len(pairs))
        losses.append(loss.detach())
        for role in ("student_forward", "student_backward"):
            trainer.account.passes[role] += len(part) * trainer.student.passes(guidance)
        return loss

    def look() -> None:
        total = float(ranks.gather(torch.stack(losses).double().sum().view(1)).mean())
        if not math.isfinite(total):
            raise EngineError(f"cloning: the loss is {total}; lower cloning.lr")
        losses[:] = [total]

    trainer.learner.step([partial(propagated, part) for part in pairs.split(trainer.config.train.micro_batch)], look)
    return losses[0]
