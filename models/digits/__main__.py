"""`python -m engine.models.digits --output-dir DIR`: trains the embedded teacher and encoders from nothing."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from . import training
from .data import digits
from .encoders import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m engine.models.digits",
        description="Trains the embedded digits teacher, reward encoder and evaluation encoder (some minutes, CPU).",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="a new or empty folder for the weights")
    parser.add_argument("--seed", type=int, default=training.Config.seed, help="the shipped weights have %(default)s")
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        parser.error(f"--output-dir {output_dir} holds something already; pass a new or empty folder")
    config = training.Config(seed=arguments.seed)
    torch.set_num_threads(config.threads)

    started = time.perf_counter()
    trained = {
        "evaluation_encoder": training.train_evaluation_encoder(config),
        "reward_encoder": training.train_reward_encoder(config),
        "teacher": training.train_teacher(config),
    }
    seconds = time.perf_counter() - started
    training.save(output_dir, config, **trained)
    _print_table(config, trained)
    size = sum(file.stat().st_size for file in output_dir.rglob("*.safetensors"))
    print(f"trained in {seconds:.0f} s; {size / 1e6:.2f} MB of weights in {output_dir}")


def _print_table(config: training.Config, trained: dict) -> None:
    evaluation, reward, teacher = (trained[name][0] for name in ("evaluation_encoder", "reward_encoder", "teacher"))
    images, labels = digits("held_out")
    images = (images + 1) / 2
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(config.seed))
    samples = training.sample_teacher(teacher, training.build_scheduler(config.teacher), noise, labels, steps=50)
    rows = (
        ("evaluation encoder", evaluation, "held-out accuracy", accuracy(evaluation, images, labels)),
        ("reward encoder", reward, "held-out accuracy", accuracy(reward, images, labels)),
        ("teacher, 50 steps", teacher, "class accuracy", accuracy(evaluation, samples, labels)),
    )
    print(f"\n{'model':<20}{'parameters':>12}  {'measure':<18}{'value':>8}")
    for name, model, measure, value in rows:
        print(f"{name:<20}{sum(p.numel() for p in model.parameters()):>12,}  {measure:<18}{value:>8.3f}")


if __name__ == "__main__":
    main()
