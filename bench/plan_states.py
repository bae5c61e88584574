"""What DeepSpeed really allocates, by kind: every tensor of this process, counted; held against engine.planning.states.

    python -m bench.plan_states [--ranks N] [--json FILE] [--case "key=value key=value" ...]

A small network is trained for two optimizer steps on CPU tensors. Bytes of parameters and optimizer states are those
that stand after the first step, bytes of gradients the most that stand behind a backward pass of the second. With
several ranks each figure is the largest of a rank's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import load_config, ranks, zero
from engine.planning.states import States, Trained, states

ACCUMULATION = 2
BUCKET = 100_000
"""Elements of a reduce bucket: fewer than the network's, and than one of its parameters, has."""


def network(*, frozen: bool) -> nn.Module:
    """0.8 M parameters in tensors of odd sizes, one of them larger than all others together."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(101, 97), nn.LayerNorm(97), nn.Linear(97, 8191, bias=False), nn.Linear(8191, 3))
    if frozen:
        layers[2].requires_grad_(False)
    return layers


def planned(case: Sequence[str], world_size: int) -> States:
    """The plan's figures of a case."""
    config = load_config({}, _overrides(case))
    weights = list(network(frozen="frozen" in case).parameters())
    return states(
        Trained(
            trainable=[p.numel() for p in weights if p.requires_grad],
            frozen=[p.numel() for p in weights if not p.requires_grad],
            weight_bytes=4 if config.precision == "fp32" else 2,
            master_bytes=4 if config.precision == "fp32" or config.zero.master_weights == "fp32" else 2,
            optimizer=config.optimizer.kind,
            zero=_json(case, world_size)["zero_optimization"],
            ranks=world_size,
            accumulation=ACCUMULATION,
        )
    )


def measured(case: Sequence[str]) -> dict[str, int]:
    """This rank's bytes by kind, of all that DeepSpeed keeps."""
    config, module, inputs = load_config({}, _overrides(case)), network(frozen="frozen" in case), torch.randn(2, 101)
    others = _live()  # kept, so that their places are not given to others meanwhile
    engine = zero.initialize(config, module, micro_batch=2, accumulation=ACCUMULATION, world_size=ranks.world_size())
    kinds = {"gradients": 0}
    for step in range(2):
        for _ in range(ACCUMULATION):
            loss = engine(inputs.to(next(module.parameters()).dtype)).float().square().mean()
            engine.backward(loss)
            del loss
            if step:
                kinds["gradients"] = max(kinds["gradients"], _bytes(gradients_of(engine)))
            zero.step(engine)
        if not step:
            parameters = storages_of(parameters_of(engine))
            buffers = storages_of(gradients_of(engine))
            kinds["parameters"] = sum(parameters.values())
            everything = storages_of(_live() + gradients_of(engine))
            known = {*storages_of(others), *parameters, *buffers}
            kinds["optimizer"] = sum(size for place, size in everything.items() if place not in known)
    return kinds


def _json(case: Sequence[str], world_size: int) -> dict[str, Any]:
    config = load_config({}, _overrides(case))
    return zero.deepspeed_config(config, micro_batch=2, accumulation=ACCUMULATION, world_size=world_size)


def _overrides(case: Sequence[str]) -> list[str]:
    settings = {"reduce_bucket_size": BUCKET}
    if "zero.offload=parameters" in case:
        settings["stage3_param_persistence_threshold"] = 0  # small ones are copied to a GPU, and here they are not
    return [f"zero.deepspeed.zero_optimization={settings}", *(part for part in case if part != "frozen")]


def parameters_of(engine: Any) -> list[Tensor]:
    """The network's parameters, and this rank's parts of them."""
    own = list(engine.module.parameters())
    return [*own, *(p.ds_tensor for p in own if hasattr(p, "ds_tensor"))]


def gradients_of(engine: Any) -> list[Tensor]:
    """All gradients that a DeepSpeed engine keeps, and the buckets that they are reduced in."""
    optimizer, found = engine.optimizer, [p.grad for p in engine.module.parameters()]
    for name in ("averaged_gradients", "all_grad_tensors"):
        found += [tensor for group in getattr(optimizer, name, {}).values() for tensor in group or ()]
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        found += [bucket.buffer] if isinstance(bucket.buffer, Tensor) else bucket.buffer
    return [tensor for tensor in found if tensor is not None]


def _live() -> list[Tensor]:
    gc.collect()
    return [value for value in gc.get_objects() if issubclass(type(value), Tensor)]


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Place -> bytes of the storages of tensors; counters, which have no dimension, and flags are left out."""
    return {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.dim() and tensor.dtype != torch.bool)
        if storage.nbytes()
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages_of(tensors).values())


def table(cases: Sequence[Sequence[str]], world_size: int) -> list[dict[str, Any]]:
    """Each case with its planned and measured bytes by kind."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "bench.plan_states", "--measure", str(result)]
        command += [word for case in cases for word in ("--case", " ".join(case))]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks._free_port())}
        processes = [
            subprocess.Popen(
                command,
                cwd=Path(__file__).parents[1],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        said = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError("\n".join(text[-3000:] for text in said))
        found = json.loads(result.read_text())
    plans = [planned(case, world_size) for case in cases]
    rows = []
    for case, kinds, plan in zip(cases, found, plans, strict=True):
        # here host memory is the device's, and what is offloaded or paged lies beside the rest
        figures = {kind: getattr(plan, kind) for kind in kinds} | {"optimizer": plan.optimizer + plan.host}
        rows.append({"case": " ".join(case), "ranks": world_size, "measured": kinds, "planned": figures})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of cases, or measure them as one of the ranks."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_states", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--case", action="append", help="overrides, separated by spaces; `frozen`: most is frozen")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cases = [case.split() for case in options.case or [f"zero.stage={stage} precision=bf16" for stage in range(4)]]
    if options.measure:
        ranks.start(1)
        measured(["zero.stage=1", "optimizer.kind=adamw8bit"])  # makes what a process keeps: tables and caches
        found = []
        for case in cases:
            kinds = measured(case)
            rows = ranks.gather(torch.tensor([list(kinds.values())]))
            found.append(dict(zip(kinds, rows.max(0).values.tolist(), strict=True)))
            gc.collect()
        if ranks.is_first():
            Path(options.measure).write_text(json.dumps(found))
        return
    rows = table(cases, options.ranks)
    for row in rows:
        for kind, size in row["measured"].items():
            print(
                f"{row['case']:70}{kind:12}{size:12}{row['planned'][kind]:12}",
                "" if size == row["planned"][kind] else "!",
            )
    if options.json:
        from bench.record import machine, write_json

        write_json(options.json, {"machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
