"""What two ranks say to each other: collectives by ZeRO stage, and the time of an iteration; started by bench.scaling.

    deepspeed --num_accelerators 2 --module bench.scaling_ranks FILE

Every rank measures, the first one writes: for each stage and number of micro-batches, the collectives of one iteration
by phase, and its least time over a few.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cost_model import Job, as_job
from bench.profile import make_trainer, phased, resident
from bench.scaling_parts import Parts
from bench.watch import Phases, Watch
from engine import Config, load_config, ranks
from engine.chatter import silence
from engine.trainer import Trainer

JOB = ("rollout.conditions=16", "rollout.pool=16", "teacher.steps=5", "train.threads=1", "policy.window=1")
PAIRS = 128  # of JOB: 16 conditions, groups of 8, one step with noise
REPEATS = 5
# A large model's parameters are each beyond these thresholds of stage 3, below which DeepSpeed keeps them whole.
AS_LARGE = (
    "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0,"
    " stage3_max_reuse_distance: 0, stage3_prefetch_bucket_size: 0}}"
)


def collectives(trainer: Trainer) -> list[dict[str, Any]]:
    """Collectives of one iteration: phase, name, calls and payload (bytes of the whole tensors, all calls together)."""
    phases = Phases()
    watch = Watch(phases, resident(trainer))
    with phased(trainer, phases, Tally()), watch.on():
        trainer.train_iteration()
    calls, payload = Tally(), Tally()
    for (phase, name, size), count in watch.collectives.items():
        calls[phase, name] += count
        payload[phase, name] += count * size
    return [{"phase": key[0], "name": key[1], "calls": calls[key], "payload": payload[key]} for key in sorted(calls)]


def least(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of several calls, which all ranks start together."""
    times = []
    for _ in range(repeats):
        ranks.barrier()
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def iteration_seconds(trainer: Trainer) -> float:
    """The fastest of several iterations whose window is the first one."""

    def iterate() -> None:
        trainer.iteration = len(trainer.objective.policies)
        trainer.train_iteration()

    return least(iterate)


def links(parameters: int) -> dict[str, float]:
    """Seconds of collectives alone: of one number, by name; an all-reduce of the weights; a gather of figures."""
    world = ranks.world_size()
    one, of_all, weights = torch.ones(1), torch.ones(world), torch.ones(parameters)
    figures = torch.ones(1, 5)
    return {
        "allreduce": least(lambda: torch.distributed.all_reduce(one), 50),
        "broadcast": least(lambda: torch.distributed.broadcast(one, 0), 50),
        "allgather_base": least(lambda: torch.distributed.all_gather_into_tensor(of_all, one), 50),
        "reduce_scatter_base": least(lambda: torch.distributed.reduce_scatter_tensor(one, of_all), 50),
        "weights": least(lambda: torch.distributed.all_reduce(weights), 20),
        "figures": least(lambda: ranks.gather(figures), 20),
    }


def rank_config(stage: int, micro_batches: int, ranks: int) -> Config:
    """The configuration of a row."""
    pairs = PAIRS // ranks // micro_batches
    large = [AS_LARGE] if stage == 3 else []
    return load_config(None, [*JOB, f"zero.stage={stage}", f"train.micro_batch={pairs}", *large])


def rank_job(stage: int, micro_batches: int, ranks: int) -> Job:
    """The sizes of a row's iteration, whose window is the first one."""
    return as_job(rank_config(stage, micro_batches, ranks), prefix=0, window=1, ranks=ranks)


def measure(stage: int, micro_batches: int, alone: Trainer, folder: Path) -> dict[str, Any]:
    """A row: seconds of an iteration, the collectives of one, and `compute`, the sum of its parts called alone.

    Args:
        alone: a trainer of the same work in stage 0, whose gradients stay on their rank until they are asked for.
        folder: for the targets.
    """
    trainer = make_trainer(rank_config(stage, micro_batches, ranks.world_size()), folder)
    trainer.train_iteration()
    row = {"stage": stage, "micro_batches": micro_batches, "seconds": iteration_seconds(trainer)}
    job = rank_job(stage, micro_batches, ranks.world_size())
    ranks.barrier()
    row["compute"] = sum(Parts(alone, [job], time.perf_counter).predict(job, 0).values())
    row["collectives"] = collectives(trainer)
    row["parameters"] = sum(value.numel() for value in trainer.averaged.values.values())
    return row


def main() -> None:
    """Measure every stage, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    silence()
    ranks.start(1)
    with tempfile.TemporaryDirectory() as folder:
        alone = {n: make_trainer(rank_config(0, n, ranks.world_size()), Path(folder)) for n in (1, 2)}
        rows = [measure(stage, n, alone[n], Path(folder)) for stage in range(4) for n in (1, 2)]
    result = {"ranks": ranks.world_size(), "links": links(rows[0]["parameters"]), "rows": rows}
    if ranks.is_first():
        options.file.write_text(json.dumps(result))
    ranks.stop()


if __name__ == "__main__":
    main()
