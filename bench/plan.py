"""The plan held against a GPU: shipped configurations on random weights, under a memory cap of their card's size.

    python -m bench.plan [NAME ...] [--json bench/results/plan_gpu.json]

Each runs 3 iterations of the trainer as it is; only weights, prompts and their encodings are drawn at random, and the
teacher takes no more steps than the student, which changes no peak. A run that needs more than the card fails as it
would there. The text encoders are left out, so the plan's phase "encode prompts" is too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.record import ROOT, machine, write_json
from engine import load_config, preflight, ranks
from engine.config import CONFIGS, Config
from engine.models.denoiser import Condition
from engine.models.pipelines import Pipeline
from engine.plan import SHARE, plan
from engine.planning import networks
from engine.planning.phases import PARAMETERS
from engine.precision import weights_dtype
from engine.roles import fit, load_roles
from engine.sources import SPLITS, Classes
from engine.trainer import Trainer

CARDS = {"sd15_8gb": 8, "sdxl_24gb": 24, "sd35_medium_16gb": 16, "flux_24gb": 24, "dit_xl2_8gb": 8}
"""Configuration -> GiB of its card."""
ITERATIONS = 3


@dataclass(frozen=True)
class RandomSource:
    """Conditions of the right shapes and nothing else; see `engine.sources.Source`."""

    pipeline: Pipeline
    dtype: torch.dtype
    size: int = 1024

    def __len__(self) -> int:
        return self.size

    def condition(self, rows: Tensor) -> Condition:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rows.sum()))
            made = networks.condition(self.pipeline, len(rows), self.dtype)
            return {name: v.normal_() if v.is_floating_point() else v for name, v in made.items()}

    def asked(self, rows: Tensor) -> dict[str, Any]:
        return {"prompt": [f"prompt {row}" for row in rows.tolist()]}

    def name(self, row: int) -> str:
        return f"row={row}"

    def caption(self, row: int) -> str:
        return str(row)


def random_teacher(name: str, architecture: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A directory of random weights for a shipped architecture, without those of its text encoders."""
    import diffusers

    directory = folder / name
    shutil.copytree(architecture, directory)
    pipeline = networks.load(architecture, load_config({}), "teacher.path")
    parts = {pipeline.family.component: (pipeline.denoiser.network, dtype), "vae": (pipeline.vae, torch.float32)}
    for part, (meta, kept) in parts.items():
        network = getattr(diffusers, type(meta).__name__).from_config(meta.config).to(kept)
        network.save_pretrained(directory / part)
    return directory


def random_encoder(architecture: Path, folder: Path) -> Path:
    """A directory of random weights for a reward's vision model."""
    from transformers import AutoConfig, AutoModel

    directory = folder / architecture.name
    shutil.copytree(architecture, directory)
    AutoModel.from_config(AutoConfig.from_pretrained(architecture)).save_pretrained(directory)
    return directory


def configured(name: str, folder: Path) -> Config:
    """A shipped configuration on random weights in a folder."""
    config = load_config(CONFIGS / f"{name}.yaml")
    teacher = random_teacher(name, networks.locate(config.teacher.path), folder, weights_dtype(config))
    terms = {}
    for term, settings in config.reward.terms.items():
        terms[term] = {**settings, "path": str(random_encoder(networks.locate(settings["path"]), folder))}
    tree = config.as_dict()
    tree["teacher"] |= {"path": str(teacher), "steps": config.student.steps}
    tree["reward"]["terms"] = terms
    tree["train"]["ratio_tolerance"] = 1e9  # random weights round as they like; only memory is looked at
    return load_config(tree)


def measure(name: str) -> dict[str, Any]:
    """Most bytes that PyTorch had allocated in 3 iterations on this GPU, and what was planned."""
    card = CARDS[name] * 2**30
    properties = torch.cuda.get_device_properties(0)
    ranks.start(None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = configured(name, folder)
        made = plan(config, gpu_bytes=card)
        torch.cuda.set_per_process_memory_fraction(min(1.0, card / properties.total_memory))
        roles = load_roles(config)
        reward = preflight.check(config, roles, 1)
        fit(roles, config)
        classes = roles.teacher.classes
        source = Classes(classes) if classes else RandomSource(roles.pipeline, weights_dtype(config))
        trainer = Trainer(config, roles, dict.fromkeys(SPLITS, source), reward, folder / "cache")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(ITERATIONS):
            trainer.train_iteration()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    planned = max(phase.total for phase in made.memory.phases if PARAMETERS in phase.kinds)
    return {
        "configuration": name,
        "card": card,
        "budget": int(card * SHARE),
        "planned": planned,
        "allocated": peak,
        "reserved": reserved,
        "planned_over_allocated": round(planned / peak, 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure configurations, each in a process of its own; returns 1 where a plan is off by more than a tenth."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CARDS)}; default: all")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--one", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no GPU here; bench.plan_states measures what a CPU can tell", file=sys.stderr)
        return 2
    if options.one:
        write_json(options.one, measure(options.names[0]))
        return 0
    rows = []
    for name in options.names or CARDS:
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "row.json"
            subprocess.run([sys.executable, "-m", "bench.plan", name, "--one", str(file)], cwd=ROOT, check=True)
            rows.append(json.loads(file.read_text()))
        row = rows[-1]
        print(
            f"{name:20} planned {row['planned'] / 2**30:6.2f} GiB, allocated {row['allocated'] / 2**30:6.2f}, "
            f"reserved {row['reserved'] / 2**30:6.2f}: {row['planned_over_allocated']:.2f}",
            flush=True,
        )
    if options.json:
        write_json(options.json, {"machine": machine("cuda"), "iterations": ITERATIONS, "rows": rows})
    return int(any(abs(row["planned_over_allocated"] - 1) > 0.1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
