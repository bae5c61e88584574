"""Networks small enough that a whole run takes about a second, and the configuration of such a run."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# `python -m pytest` puts the checkout on sys.path, where diffusers would take `kernels/` for Hugging Face's package;
# importing engine first takes it off.
from engine import Config, load_config

# Claims about the trainer hold on any device; bit-equal runs are promised on the CPU, which is what these tests run on.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

SIZES = (
    "seed=0",
    "precision=fp32",
    "iterations=2",
    "resume=none",
    "teacher.steps=6",
    "teacher.guidance=1",
    "teacher.cache=null",
    "student.steps=3",
    "student.guidance=1",
    "student.init=teacher",
    "policy.kind=ddim",
    "policy.eta=0.5",
    "policy.window=null",
    "rollout.conditions=4",
    "rollout.group_size=4",
    "rollout.pairing=noise",
    "rollout.pool=8",
    "rollout.batch_size=null",
    "reward.terms={feature: 1}",
    "advantage.scale=group_std",
    "advantage.clip=5",
    "objective.kind=grpo",
    "objective.clip_range=1e-2",
    "objective.kl_coef=0",
    "objective.kl_kind=kl",
    "objective.kl_alpha=null",
    "objective.step_weights=none",
    "objective.baseline_decay=0.9",
    "optimizer.kind=adamw",
    "optimizer.lr=1e-3",
    "optimizer.betas=[0.9, 0.99]",
    "optimizer.eps=1e-8",
    "optimizer.weight_decay=0",
    "optimizer.max_grad_norm=1",
    "optimizer.schedule=constant",
    "optimizer.final_lr=0.1",
    "ema.decay=0.9",
    "train.micro_batch=16",
    "train.inner_epochs=1",
    "train.updates=2",
    "train.ratio_tolerance=1e-3",  # a random network's late steps multiply the rounding of batches of other sizes
    "train.threads=1",
    "zero.stage=0",
    "zero.offload=none",
    "zero.deepspeed={}",
    "evaluation.every=1",
    "evaluation.held_out=8",
    "evaluation.samples=100",
    "evaluation.seed=123",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "logging.tensorboard=false",
    "logging.wandb=false",
)
"""Everything that a test may rely on, so that defaults can be tuned without a test noticing."""
FIXED = (
    "policy.window=null",
    "rollout.batch_size=null",
    "advantage.scale=group_std",
    "advantage.clip=5",
    "objective.clip_range=1e-2",
    "objective.step_weights=none",
    "optimizer.betas=[0.9, 0.99]",
    "optimizer.eps=1e-8",
    "optimizer.weight_decay=0",
    "optimizer.max_grad_norm=1",
    "optimizer.schedule=constant",
    "objective.baseline_decay=0.9",
    "ema.decay=0.9",
    "zero.stage=0",
    "zero.offload=none",
    "zero.deepspeed={}",
    "train.ratio_tolerance=1e-3",
)
"""What `tiny_config` leaves at defaults that may be tuned. A convolution rounds differently in other batch
sizes, which late steps multiply by |b| / std, hence the tolerance."""


def _write_teacher(directory: Path, scheduler: object, *, seed: int = 0, **network: object) -> Path:
    """A class-conditional UNet of seeded random weights with a schedule, in diffusers format.

    Args:
        network: what to change in the UNet's configuration.
    """
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "num_class_embeds": 11,
    } | network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(**config)
    unet.save_pretrained(directory / "unet")
    scheduler.save_pretrained(directory / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="session")
def write_teacher():
    """`write_teacher(directory, scheduler, seed=0, **unet)`: another tiny teacher."""
    return _write_teacher


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A diffusion teacher of digits' shape and classes, with random weights."""
    from diffusers import DDIMScheduler

    return _write_teacher(tmp_path_factory.mktemp("teacher"), DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="session")
def tiny_flow_teacher(tmp_path_factory) -> Path:
    """The same network read as a rectified flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return _write_teacher(tmp_path_factory.mktemp("flow_teacher"), FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="session")
def tiny_overrides(tiny_teacher) -> list[str]:
    """Command-line arguments of a run of about a second, without output_dir."""
    return [f"teacher.path={tiny_teacher}", *SIZES]


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides):
    """`tiny_config(output_dir, *overrides)`: the configuration of a run of about a second."""

    def make(output_dir: Path | str, *overrides: str) -> Config:
        return load_config({}, [f"output_dir={output_dir}", *tiny_overrides, *overrides])

    return make


@pytest.fixture
def start(tiny_config, tmp_path):
    """`start("key=value", ..., reward=None)`: a trainer of the tiny run, with a teacher cache of its own.

    `reward(images, targets, asked)` is trained on in place of `reward.terms`, under the function's name.
    """

    def make(*overrides: str, reward=None):
        from engine import preflight, ranks
        from engine.rl.rewards import CompositeReward, Term
        from engine.roles import fit, load_roles
        from engine.sources import encode_prompts, load_sources
        from engine.trainer import Trainer

        config = tiny_config(tmp_path / "run", *FIXED, *overrides)
        ranks.start(1)
        roles = load_roles(config)
        asked_for = preflight.check(config, roles, 1)
        if reward is not None:
            asked_for = CompositeReward({reward.__name__: Term(1.0, lambda _: reward)})
        sources = load_sources(config, roles.pipeline, tmp_path / "run")
        encode_prompts(config, sources, roles.pipeline)
        fit(roles, config)
        return Trainer(config, roles, sources, asked_for, Path(tempfile.mkdtemp(dir=tmp_path)))

    return make


def _clean_environment() -> dict[str, str]:
    """Without what this process, a group of one, may have set for itself."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"DS_ACCELERATOR": "cpu"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_ranks(commands: list[list[str]], cwd: Path) -> list[subprocess.Popen]:
    shared = _clean_environment() | {
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


@pytest.fixture(autouse=True)
def own_linear():
    """DeepSpeed's stage 3 exchanges `torch.nn.functional.linear` in the whole process, which other tests would meet."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def launch():
    """How tests start several ranks: `start_ranks(commands, cwd)`, `clean_environment()`, `free_port()`."""
    return SimpleNamespace(start_ranks=_start_ranks, clean_environment=_clean_environment, free_port=_free_port)


@pytest.fixture(scope="session")
def stock_ddim():
    """`stock_ddim(directory, noise, labels, steps, guidance)`: images by diffusers' own classes and nothing of ours."""

    @torch.no_grad()
    def draw(directory: Path, x: torch.Tensor, labels: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
        from diffusers import DDIMScheduler, UNet2DModel

        unet = UNet2DModel.from_pretrained(directory, subfolder="unet").eval()
        scheduler = DDIMScheduler.from_pretrained(directory, subfolder="scheduler")
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            prediction = unet(x, timestep, class_labels=labels).sample
            if guidance != 1:
                nothing = unet(x, timestep, class_labels=torch.full_like(labels, 10)).sample
                prediction = nothing + guidance * (prediction - nothing)
            x = scheduler.step(prediction, timestep, x, eta=0.0).prev_sample
        return x

    return draw


@pytest.fixture(scope="module")
def quick_finish():
    """Runs without pictures and without nearest neighbours at their end, which take three times as long as the rest."""
    metrics = ("precision", "recall", "density", "coverage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.report.write_samples", lambda *arguments: None)
        patch.setattr("engine.report.write_curves", lambda *arguments: None)
        patch.setattr(
            "engine.evaluate.precision_recall_density_coverage", lambda real, fake: dict.fromkeys(metrics, 0.0)
        )
        yield


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, tiny_overrides, capsys):
    """`refused(*arguments, says=parts)`: a run must fail before it writes anything, with one line of these parts."""

    def run(*arguments: str, says: Iterable[str], output_dir: Path | None = None) -> None:
        from engine import train

        output_dir, before = output_dir or tmp_path / "out", _files(tmp_path)
        code = train.main([f"output_dir={output_dir}", *tiny_overrides, *arguments])
        error = capsys.readouterr().err
        assert code == 2
        assert _files(tmp_path) == before
        lines = [line for line in error.splitlines() if line.strip()]
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert "Traceback" not in error
        missing = [part for part in says if part not in lines[-1]]
        assert not missing, f"{missing} not in: {lines[-1]}"

    return run
