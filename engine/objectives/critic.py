"""The critic: a copy of the teacher that learns, by denoising, the distribution of the student's images."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Config
from engine.models.denoiser import Condition
from engine.models.lora import ADAPTER
from engine.models.process import diffuse, target
from engine.models.schedules import Schedule
from engine.roles import Roles

from .contract import Context, Examples, Role
from .settings import Critic as Settings

CRITIC = "critic"


def critic_role(
    config: Config, settings: Settings, wrap: Callable[[nn.Module], nn.Module] = lambda network: network
) -> Role:
    """The role of a critic.

    Args:
        wrap: makes what is trained of the network.
    """
    return Role(lambda roles: wrap(build_critic(roles, config)), lr=settings.lr, precision=settings.precision)


def build_critic(roles: Roles, config: Config) -> nn.Module:
    """The teacher's network, to be trained; with LoRA, its frozen weights with adapters of the critic's own."""
    if config.lora.rank:
        return copy.deepcopy(roles.student.network)
    # Read again: the teacher's own weights are frozen and may be rounded or quantised.
    return roles.pipeline.read_network().requires_grad_(True)


def denoising_loss(schedule: Schedule, prediction: Tensor, image: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The plain loss of a diffusion or a flow: the mean squared error of what a network predicts at
    `diffuse(schedule, image, noise, timestep)`, in its own terms."""
    return F.mse_loss(prediction, target(schedule, image, noise, timestep))


class Critic:
    """The critic of one objective. The student's images are what guidance leads to, so it predicts without.

    Args:
        context: of the objective, with the network "critic".
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        adapter = ADAPTER if context.config.lora.rank else None
        self.denoiser = context.teacher.with_network(context.networks[CRITIC]).with_adapter(adapter)

    def loss(self, examples: Examples) -> Tensor:
        """`denoising_loss` of examples that hold image, noise and timestep, to train the critic on."""
        schedule, values = self.denoiser.schedule, [examples[name] for name in ("image", "noise", "timestep")]
        prediction = self.predict(diffuse(schedule, *values), examples["timestep"], examples.condition)
        return denoising_loss(schedule, prediction, *values)

    def predict(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, C, H, W) fp32 at noised images, in the critic's own terms."""
        self._count(len(x))
        return self.denoiser.guided(x, timestep, condition)

    def _count(self, evaluations: int) -> None:
        passes = self.context.account.passes
        passes[f"{CRITIC}_forward"] += evaluations
        if torch.is_grad_enabled():
            passes[f"{CRITIC}_backward"] += evaluations
