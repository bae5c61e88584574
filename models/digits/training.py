"""Trains the three embedded models: the diffusion teacher, the reward encoder and the evaluation encoder.

Deterministic: the seed, the hyper-parameters and the number of threads (one) fix every loss on one kind of machine.
One thread, because these networks are too small to gain from a second one and lose much where the machine is shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import CLASSES, digits
from .encoders import EvaluationEncoder, RewardEncoder

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DModel

NULL_CLASS = CLASSES
"""The label "no class": the last embedding of the teacher, which classifier-free guidance subtracts."""

TRACED_LOSSES = 10
"""So many first losses of each training are kept beside the weights, for a test to train them again."""

REWARD_FILE = "reward_encoder.safetensors"
EVALUATION_FILE = "evaluation_encoder.safetensors"
TEACHER_FOLDER = "teacher"
TRACE_FILE = "training.json"


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher: a class-conditional UNet that predicts the noise of a DDPM with a linear schedule."""

    block_out_channels: tuple[int, ...] = (16, 48)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timestep_spacing: str = "leading"
    label_dropout: float = 0.1
    steps: int = 3000
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    ema_decay: float = 0.995


@dataclass(frozen=True)
class EncoderConfig:
    """One encoder: its size and its training; the reward's is on shifted and noised digits."""

    width: int
    features: int
    steps: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.05
    max_shift: int = 1
    noise_std: float = 0.1


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights. It is stored with them."""

    seed: int = 0
    threads: int = 1
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reward_encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(width=48, features=128, steps=400))
    # Neither augmented nor smoothed: a judge that is trained to overlook small changes of the image overlooks the
    # variety that few steps lose as well (recall of the 5-step teacher 0.75 instead of 0.61, of the 50-step one 0.95).
    evaluation_encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(
            width=32, features=64, steps=600, label_smoothing=0.0, max_shift=0, noise_std=0.0
        )
    )

    def as_json(self) -> dict:
        """The configuration as JSON reads it back: nested dictionaries, lists for tuples."""
        return json.loads(json.dumps(asdict(self)))


def build_teacher(config: TeacherConfig) -> UNet2DModel:
    """A stock diffusers UNet for x (B, 1, 8, 8), timesteps (B,) and class_labels (B,) in 0..10."""
    from diffusers import UNet2DModel

    levels = len(config.block_out_channels)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=False,
        num_class_embeds=CLASSES + 1,
    )


def build_scheduler(config: TeacherConfig) -> DDIMScheduler:
    """The schedule that the teacher is trained on and sampled with."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=config.train_timesteps,
        beta_schedule="linear",
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="epsilon",
        timestep_spacing=config.timestep_spacing,
    )


def train_teacher(config: Config, *, stop_after: int | None = None) -> tuple[UNet2DModel, list[float]]:
    """Trains the teacher on the training digits.

    Args:
        stop_after: ends after so many steps of the unchanged schedule; None trains to the end.

    Returns:
        The model with averaged weights, in eval mode, and the loss of every step.
    """
    teacher = config.teacher
    images, labels = digits("train")
    alphas_cumprod = build_scheduler(teacher).alphas_cumprod
    model = _seeded(config.seed, lambda: build_teacher(teacher))
    generator = torch.Generator().manual_seed(config.seed)
    averaged = [parameter.detach().clone() for parameter in model.parameters()]

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(images), (teacher.batch,), generator=generator)
        clean = images[chosen]
        drop = torch.rand(teacher.batch, generator=generator) < teacher.label_dropout
        condition = labels[chosen].masked_fill(drop, NULL_CLASS)
        # One timestep from each of `batch` equal slices: the loss of a batch varies less than with independent ones.
        slices = torch.arange(teacher.batch) + torch.rand(teacher.batch, generator=generator)
        timestep = (slices * teacher.train_timesteps / teacher.batch).long().clamp_max(teacher.train_timesteps - 1)
        noise = torch.randn(clean.shape, generator=generator)
        kept = alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noised = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        return F.mse_loss(model(noised, timestep, class_labels=condition).sample, noise)

    def average(step: int) -> None:
        # Warm-up, so that the random first weights do not stay in the average.
        weight = max(1 - teacher.ema_decay, 1 / (step + 1))
        with torch.no_grad():
            for kept, parameter in zip(averaged, model.parameters(), strict=True):
                kept.lerp_(parameter, weight)

    losses = _optimise(model, loss_of_batch, teacher, "teacher", stop_after, after_step=average)
    with torch.no_grad():
        for kept, parameter in zip(averaged, model.parameters(), strict=True):
            parameter.copy_(kept)
    return model.eval(), losses


def train_reward_encoder(config: Config, *, stop_after: int | None = None) -> tuple[RewardEncoder, list[float]]:
    """Trains the reward encoder; see `train_teacher` for the arguments and what is returned."""
    # Seeds apart, so that the two encoders see different batches as well as being different networks.
    return _train_encoder(RewardEncoder, config.reward_encoder, config.seed + 1, "reward encoder", stop_after)


def train_evaluation_encoder(config: Config, *, stop_after: int | None = None) -> tuple[EvaluationEncoder, list[float]]:
    """Trains the evaluation encoder; see `train_teacher` for the arguments and what is returned."""
    name = "evaluation encoder"
    return _train_encoder(EvaluationEncoder, config.evaluation_encoder, config.seed + 2, name, stop_after)


def _train_encoder(kind: type, config: EncoderConfig, seed: int, name: str, stop_after: int | None) -> tuple:
    images, labels = digits("train")
    images = (images + 1) / 2
    model = _seeded(seed, lambda: kind(config.width, config.features))
    generator = torch.Generator().manual_seed(seed)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(images), (config.batch,), generator=generator)
        batch = augment(images[chosen], config.max_shift, config.noise_std, generator)
        return F.cross_entropy(model(batch).logits, labels[chosen], label_smoothing=config.label_smoothing)

    losses = _optimise(model, loss_of_batch, config, name, stop_after)
    return model.eval(), losses


def augment(images: Tensor, max_shift: int, noise_std: float, generator: torch.Generator) -> Tensor:
    """Shifts each image (B, 1, 8, 8) in [0, 1] by up to max_shift pixels and adds noise; the rest is background (0)."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4)[:, 0]
    top, left = torch.randint(2 * max_shift + 1, (2, batch, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    shifted = padded[torch.arange(batch).view(-1, 1, 1), rows, columns].unsqueeze(1)
    return shifted + noise_std * torch.randn(images.shape, generator=generator)


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _optimise(
    model: nn.Module,
    loss_of_batch: Callable[[], Tensor],
    config: TeacherConfig | EncoderConfig,
    name: str,
    stop_after: int | None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """AdamW with a cosine learning rate over config.steps; returns the loss of every step taken."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    losses = []
    with tqdm(range(config.steps if stop_after is None else stop_after), name, disable=stop_after is not None) as bar:
        for step in bar:
            loss = loss_of_batch()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            after_step(step)
            losses.append(loss.item())
            if step % 50 == 0:
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
    return losses


def sample_teacher(
    model: UNet2DModel, scheduler: DDIMScheduler, noise: Tensor, labels: Tensor, steps: int, *, batch: int = 512
) -> Tensor:
    """Deterministic DDIM samples of the teacher without guidance.

    Args:
        noise: (N, 1, 8, 8) standard normal.
        labels: (N,) int64 classes.
        steps: network evaluations of one image.

    Returns:
        (N, 1, 8, 8) images in [0, 1], clipped.
    """
    scheduler.set_timesteps(steps)
    images = []
    with torch.no_grad():
        for x, label in zip(noise.split(batch), labels.split(batch), strict=True):
            for timestep in scheduler.timesteps:
                x = scheduler.step(model(x, timestep, class_labels=label).sample, timestep, x).prev_sample
            images.append(x)
    return ((torch.cat(images) + 1) / 2).clamp(0, 1)


def save(
    output_dir: Path,
    config: Config,
    teacher: tuple[UNet2DModel, list[float]],
    reward_encoder: tuple[RewardEncoder, list[float]],
    evaluation_encoder: tuple[EvaluationEncoder, list[float]],
) -> None:
    """Writes the three trained models, their configuration (also inside each safetensors file) and first losses."""
    from diffusers import DDIMPipeline

    metadata = {"format": "pt", "training": json.dumps(config.as_json())}
    folder = output_dir / TEACHER_FOLDER
    DDIMPipeline(teacher[0], build_scheduler(config.teacher)).save_pretrained(folder)
    # Once more: save_pretrained takes no metadata of ours.
    save_file(teacher[0].state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors", metadata)
    save_file(reward_encoder[0].state_dict(), output_dir / REWARD_FILE, metadata)
    save_file(evaluation_encoder[0].state_dict(), output_dir / EVALUATION_FILE, metadata)
    trained = {"teacher": teacher, "reward_encoder": reward_encoder, "evaluation_encoder": evaluation_encoder}
    losses = {name: losses[:TRACED_LOSSES] for name, (_, losses) in trained.items()}
    trace = {"config": config.as_json(), "first_losses": losses}
    (output_dir / TRACE_FILE).write_text(json.dumps(trace, indent=2) + "\n")
