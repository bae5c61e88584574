"""Two public recipes in plain eager PyTorch: nothing of our kernels, rollout, losses or trainer.

Both descend from ddpo-pytorch, so one loop serves them and a `Recipe` says where they differ:

- ReDiF's own GRPO (AM-Tighkhorshid/ReDiF, scripts/train_grpo_coco.py): the teacher draws a target for every sample of
  every iteration; groups normalised by their own std; clip range 0.2; the backward passes of all steps accumulate into
  one optimizer step, as its `gradient_accumulation_steps * num_steps` means it.
- Flow-GRPO (yifan123/flow_grpo, scripts/train_sd3.py, flow_grpo/stat_tracking.py, config/base.py and grpo.py): mean of
  the prompt, std of the whole batch + 1e-4, advantages clipped to 5, clip range 1e-4, two optimizer steps an epoch.
  It knows no teacher: its reward reads the target as it would read a prompt's metadata, so each is drawn only once.
  Its SDE is for flow matching; on these diffusion networks its place is taken by DDIM-eta, like everybody's here.
- Flow-GRPO-Fast (scripts/train_sd3_fast.py): the same with noise in a random window of 2 steps (`sde_window_size`).

What is better here than in the public code, so that the comparison is of recipes and not of accidents: no CPU
copies or `.item()` inside the step, whole rollouts as one batch, groups that hold one condition, a teacher without
noise that starts from its sample's own, no KL term (its network pass is saved; ReDiF's has no gradient on-policy), and
the last step, whose std is 0 on this schedule, is not scored (it would be nan).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.account import Account
from engine.conditions import ConditionPool
from engine.config import Config
from engine.models.denoiser import Denoiser
from engine.rl.rewards import CompositeReward
from engine.sources import Classes
from engine.zero import learning_rate_share, make_optimizer


@dataclass(frozen=True)
class Recipe:
    """Where a public recipe differs from the others.

    Attributes:
        cached_targets: whether a condition's target is drawn once; else for every sample, every time.
        advantage: rewards (M, G) -> advantages (M, G).
        clip_range: of the ratio.
        updates: optimizer steps per rollout, each on its share of the samples.
        window: number of consecutive steps with noise, at a random place; None: all.
    """

    cached_targets: bool
    advantage: Callable[[Tensor], Tensor]
    clip_range: float
    updates: int
    window: int | None = None


def _group_normalised(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)


def _batch_normalised(rewards: Tensor) -> Tensor:
    deviation = rewards - rewards.mean(1, keepdim=True)
    return (deviation / (rewards.std(unbiased=False) + 1e-4)).clamp(-5, 5)


RECIPES = {
    "reference_recipe": Recipe(False, _group_normalised, clip_range=0.2, updates=1),
    "flow_grpo_style": Recipe(True, _batch_normalised, clip_range=1e-4, updates=2),
    "flow_grpo_fast_style": Recipe(True, _batch_normalised, clip_range=1e-4, updates=2, window=2),
}


class Ddim:
    """DDIM steps as ddpo-pytorch writes them (arXiv 2010.02502, equations 12 and 16), for a noise-predicting network.

    Args:
        denoiser: gives the schedule.
        steps: number of steps T.
    """

    def __init__(self, denoiser: Denoiser, steps: int, device: torch.device) -> None:
        schedule = denoiser.schedule
        self.timesteps = schedule.timesteps(steps).to(device)
        last = torch.tensor([schedule.final_alpha_cumprod])
        alphas = torch.cat([schedule.alphas_cumprod.float()[schedule.timesteps(steps)], last])
        self.alphas = alphas.to(device)

    def mean_and_std(self, step: int, x: Tensor, eps: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and std () of the next latent."""
        alpha, alpha_next = self.alphas[step], self.alphas[step + 1]
        variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        std = eta * variance**0.5
        image = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        direction = (1 - alpha_next - std**2) ** 0.5 * eps
        return alpha_next**0.5 * image + direction, std


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density (B,) of N(mean, std^2), averaged over elements."""
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=tuple(range(1, density.dim())))


class PlainLoop:
    """A recipe's iterations on one student.

    Args:
        recipe: what is done.
        config: sizes, noise, optimizer and seed, the same that our trainer gets.
        teacher: frozen; the student starts as `student`.
        student: fp32 network, trained in place.
        reward: the same that our trainer gets.
    """

    def __init__(
        self, recipe: Recipe, config: Config, teacher: Denoiser, student: nn.Module, reward: CompositeReward
    ) -> None:
        self.recipe, self.config, self.reward = recipe, config, reward
        self.teacher, self.student = teacher.network, student
        self.device = next(student.parameters()).device
        self.pool = ConditionPool(
            "train", config.seed, config.rollout.pool, Classes(teacher.classes), teacher.latent_shape
        )
        indices = torch.arange(self.pool.size)
        self.noise = self.pool.initial_noise(indices).to(self.device)
        self.labels = self.pool.condition(indices)["class_labels"].to(self.device)
        self.teacher_steps = Ddim(teacher, config.teacher.steps, self.device)
        self.student_steps = Ddim(teacher, config.student.steps, self.device)
        self.targets: dict[int, Tensor] = {}
        self.optimizer = make_optimizer(config, list(student.parameters()))
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.batch_size = config.rollout.batch_size
        self.iteration = 0

    def iterate(self) -> dict[str, float]:
        """One iteration; returns seconds by phase."""
        config, size, account = self.config, self.config.rollout.group_size, Account()
        conditions = self.pool.draw(config.rollout.conditions, iteration=self.iteration)
        rows = conditions.repeat_interleave(size).to(self.device)
        with account.timed("teacher"):
            targets = self.draw_targets(conditions, rows)
        noisy = self.noisy_steps()
        with account.timed("rollout"):
            latents, old = self.roll_out(rows, noisy)
        with account.timed("reward"), torch.no_grad():
            labels = {"class_labels": self.labels[rows]}
            rewards, _ = self.reward(images(latents[-1]), images(targets), labels)
            advantage = self.recipe.advantage(rewards.view(-1, size)).flatten()
        with account.timed("update"):
            self.update(latents, old, rows, advantage)
        self.iteration += 1
        return dict(account.seconds)

    def draw_targets(self, conditions: Tensor, rows: Tensor) -> Tensor:
        """The teacher's latents (N, C, H, W) of the samples."""
        if not self.recipe.cached_targets:
            return self.draw(rows)
        new = [index for index in conditions.tolist() if index not in self.targets]
        if new:
            self.targets.update(zip(new, self.draw(torch.tensor(new, device=self.device)), strict=True))
        targets = torch.stack([self.targets[index] for index in conditions.tolist()])
        return targets.repeat_interleave(self.config.rollout.group_size, 0)

    @torch.no_grad()
    def draw(self, rows: Tensor) -> Tensor:
        """The teacher's latents (B, C, H, W) of pool indices (B,), without noise."""
        x, labels = self.noise[rows], self.labels[rows]
        for step in range(self.config.teacher.steps):
            x, _ = self.step(self.teacher, self.teacher_steps, step, x, labels, eta=0.0)
        return x

    def noisy_steps(self) -> range:
        """The steps that draw noise and are trained on; the last one ends at the image and has none."""
        last = self.config.student.steps - 1
        if self.recipe.window is None:
            return range(last)
        places = last - self.recipe.window + 1
        start = int(torch.randint(places, (), generator=self.generator, device=self.device))
        return range(start, start + self.recipe.window)

    @torch.no_grad()
    def roll_out(self, rows: Tensor, noisy: range) -> tuple[list[Tensor], dict[int, Tensor]]:
        """The student's latents before each step and after the last, and the log-probs (N,) of the noisy steps."""
        latents, log_probs, labels = [self.noise[rows]], {}, self.labels[rows]
        for step in range(self.config.student.steps):
            eta = self.config.policy.eta if step in noisy else 0.0
            x_next, std = self.step(self.student, self.student_steps, step, latents[-1], labels, eta)
            if step in noisy:
                mean = x_next
                x_next = mean + std * torch.randn(mean.shape, generator=self.generator, device=self.device)
                log_probs[step] = log_prob(x_next, mean, std)
            latents.append(x_next)
        return latents, log_probs

    def update(self, latents: list[Tensor], old: dict[int, Tensor], rows: Tensor, advantage: Tensor) -> None:
        """Clipped policy loss, step by step over each update's samples, and one optimizer step an update."""
        config, clip = self.config, self.recipe.clip_range
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate_share(config, self.iteration)
        order = torch.randperm(len(rows), generator=self.generator, device=self.device)
        for samples in order.chunk(self.recipe.updates):
            for step, scored in old.items():
                for part in samples.split(self.batch_size or len(samples)):
                    x, labels = latents[step][part], self.labels[rows[part]]
                    mean, std = self.step(self.student, self.student_steps, step, x, labels, config.policy.eta)
                    ratio = torch.exp(log_prob(latents[step + 1][part], mean, std) - scored[part])
                    unclipped = -advantage[part] * ratio
                    clipped = -advantage[part] * torch.clamp(ratio, 1 - clip, 1 + clip)
                    share = len(part) / len(samples) / len(old)
                    (torch.maximum(unclipped, clipped).mean() * share).backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), config.optimizer.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def step(
        self, network: nn.Module, sampler: Ddim, step: int, x: Tensor, labels: Tensor, eta: float
    ) -> tuple[Tensor, Tensor]:
        """One network evaluation of latents (B, C, H, W): the next latents' mean (B, C, H, W) and std ()."""
        size, precision = self.batch_size or len(x), next(network.parameters()).dtype
        timestep, eps = sampler.timesteps[step], []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            for part, label in zip(x.to(precision).split(size), labels.split(size), strict=True):
                output = network(part, timestep.expand(len(part)), class_labels=label)
                eps.append((output if isinstance(output, Tensor) else output.sample).float())
        return sampler.mean_and_std(step, x, torch.cat(eps), eta)


def images(latents: Tensor) -> Tensor:
    """Latents that are pixels in [-1, 1] as images (B, C, H, W) in [0, 1]."""
    return (latents / 2 + 0.5).clamp(0, 1)


def fp32_copy(teacher: Denoiser) -> nn.Module:
    """The initial student: the teacher's weights, trainable, in fp32."""
    return copy.deepcopy(teacher.network).float().requires_grad_(True)
