"""VarDiU against Diff-Instruct on 40 Gaussians in the plane, with the exact score as the teacher.

    python -m bench.mixture [--seeds 0 1 2 3 4] [--methods NAME ...] [--json FILE] [--quick]

Both methods take the same steps of the generator with the same batch, noise levels and weights; one row is VarDiU with
as many network evaluations as Diff-Instruct at K=10. A run counts as it ends; none is picked. With --json, pictures go
beside the file. --quick is a hundred steps: that everything runs.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.record import machine, write_json

from .metrics import log_mmd
from .networks import NOISE, Generator
from .pictures import write_curves, write_samples
from .target import Mixture, mixture_of_40
from .training import Method, Schedule, train

SAMPLES = 10_000
RATES = {"lr": 3e-3, "helper_lr": 2e-3}
METHODS = {
    "Diff-Instruct K=1": Method(head=None, updates=1, **RATES),
    "Diff-Instruct K=5": Method(head=None, updates=5, **RATES),
    "Diff-Instruct K=10": Method(head=None, updates=10, **RATES),
    "VarDiU gaussian": Method(head="gaussian", updates=1, **RATES),
    "VarDiU mixture": Method(head="mixture", updates=1, **RATES),
    "VarDiU flow": Method(head="flow", updates=1, **RATES),
    # 45 evaluations a sample and step against 8: as many in all as Diff-Instruct K=10 has
    "VarDiU mixture, equal passes": Method(head="mixture", updates=1, **RATES, longer=45 / 8),
}
SCHEDULE = Schedule(
    steps=2000, batch=512, width=128, low=0.3, high=20.0, power=(0.3, 5.0), weight="sigma", ramp=0.6, hold=0.6,
    decay=0.999, critic_start=1500,
)  # fmt: skip


def figures(samples: Tensor, target: Mixture, truth: Tensor) -> dict[str, float]:
    """What samples (N, 2) are judged by.

    Args:
        truth: samples of the target.
    """
    component = torch.cdist(samples, target.means).argmin(1)
    shares = torch.bincount(component, minlength=len(target.means)) / len(samples)
    return {
        "log_density": float(target.log_prob(samples).mean()),
        "log_mmd": log_mmd(samples, truth),
        "modes": int((shares > 0.2 / len(target.means)).sum()),  # with a fifth of their weight, or more
    }


def run(name: str, seed: int, schedule: Schedule, target: Mixture, truth: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The row of one run, and its last samples."""
    noise = torch.randn(len(truth), NOISE, generator=torch.Generator().manual_seed(777))
    curve, samples = [], truth

    def watch(step: int, generator: Generator) -> None:
        nonlocal samples
        samples = generator(noise)
        # Fewer are enough for a curve, but then all along it: the estimate of the MMD falls with their number.
        curve.append({"step": step, **figures(samples[:2000], target, truth[:2000])})

    result = train(METHODS[name], schedule, target, seed, watch)
    row = {"method": name, "seed": seed, **figures(samples, target, truth)}
    return row | {"seconds": result.seconds, "passes": result.passes, "curve": curve}, samples


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of every method."""
    table = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        line: dict[str, Any] = {"method": name, "seeds": [row["seed"] for row in own]}
        for key in ("log_density", "log_mmd", "modes", "seconds"):
            values = [row[key] for row in own]
            line |= {key: statistics.mean(values), f"{key}_sd": statistics.stdev(values) if len(own) > 1 else 0.0}
        line["passes"] = sum(own[0]["passes"].values())
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.mixture", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a hundred steps and a thousand samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # densities far from every mode would take most of the time

    target = mixture_of_40()
    schedule = replace(SCHEDULE, steps=100, critic_start=100) if options.quick else SCHEDULE
    generator = torch.Generator().manual_seed(12345)
    truth, others = (target.sample(1000 if options.quick else SAMPLES, generator) for _ in range(2))
    floors = figures(others, target, truth)
    print("samples of the target: log-density {log_density:.3f}, log-MMD {log_mmd:.3f}".format(**floors), flush=True)
    rows, pictures = [], {"samples of the target": truth}
    for seed in options.seeds:  # all methods of one seed first, so that what there is can be compared at any time
        for name in options.methods:
            row, samples = run(name, seed, schedule, target, truth)
            rows.append(row)
            pictures.setdefault(name, samples)
            print(
                f"{name}, seed {seed}: log-density {row['log_density']:.3f}, log-MMD {row['log_mmd']:.3f}, "
                f"{row['modes']} modes, {row['seconds']:.0f} s",
                flush=True,
            )
            if options.json:
                record = {"machine": machine("cpu"), "schedule": asdict(schedule), "floors": floors}
                record |= {"methods": {key: asdict(METHODS[key]) for key in options.methods}}
                write_json(options.json, {**record, "summary": summary(rows), "rows": rows})
    if options.json:
        write_samples(options.json.with_name(f"{options.json.stem}_samples.png"), target, pictures)
        write_curves(options.json.with_name(f"{options.json.stem}_curves.png"), rows, floors)


if __name__ == "__main__":
    main()
