"""Sweep operations over latents, batches and dtypes: eager, torch.compile and ours.

    python -m bench.kernels [--operation NAME ...] [--latent NAME ...] [--batch N ...] [--dtype NAME ...]
                            [--device cpu|cuda] [--json FILE] [--plot FILE]

Launches and bytes are counted everywhere, time and memory are measured on a GPU. An operation that fails its check has
no figures, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.record import write_json

from . import counting, interpreted, report, timing
from .operations import DTYPES, OPERATIONS, Row

ALL_LATENTS = tuple(dict.fromkeys(itertools.chain(*(operation.shapes for operation in OPERATIONS.values()))))
# counts hardly depend on the latent and the batch, and the interpreter takes minutes for large samples
FEW_LATENTS = ("rewards", "sd15", "dit")
FEW_DTYPES = ("bf16", "fp32")


def figures(rows: Sequence[Row], device: str, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """Counts of each row, and on a GPU its speed."""
    # many rows are the same to the interpreter
    few = list(dict.fromkeys(map(interpreted.few, rows)))
    ours = counting.count_elsewhere("interpreted", few, {"TRITON_INTERPRET": "1", "ENGINE_KERNELS": ""})
    compiled = counting.count_elsewhere("inductor", rows, {})
    ours = dict(zip(few, tqdm(ours, "counting ours", len(few), leave=False), strict=True))
    counts = [
        {"eager": counting.count_eager(row), "compile": other, "ours": ours[interpreted.few(row)]}
        for row, other in zip(rows, tqdm(compiled, "counting compile", len(rows), leave=False), strict=True)
    ]
    # only now, when nothing else keeps the machine busy
    for row, counted in zip(rows, tqdm(counts, "timing", leave=False, disable=device == "cpu"), strict=True):
        speeds = timing.measure(row) if device == "cuda" else {}
        yield row._asdict() | {
            "shape": [row.batch, *row.sample],
            "elements": row.batch * math.prod(row.sample),
            **{name: summary(row, counted[name], speeds.get(name, {}), bandwidth) for name in report.IMPLEMENTATIONS},
        }


def summary(row: Row, counts: dict[str, Any], speed: dict[str, Any], bandwidth: float | None) -> dict[str, Any]:
    """Figures of one implementation: totals of its passes, and its speed; nothing but the reason if it is wrong."""
    failed = counts.get("check", {"passed": True})
    if not failed["passed"]:
        return {"refused": f"wrong results in the interpreter: {failed['outcome']}"}
    if "refused" in speed:
        return speed
    result = counts | speed
    passes = [counts[name] for name in ("forward", "backward") if name in counts]
    if passes:
        elements = counts.get("counted_batch", row.batch) * math.prod(row.sample)
        result["launches"] = sum(one["launches"] for one in passes)
        result["bytes_per_element"] = sum(one["bytes"] for one in passes) / elements
        if bandwidth is not None and speed.get("cold_us"):
            moved = result["bytes_per_element"] * row.batch * math.prod(row.sample)
            result["bandwidth_share"] = moved / (speed["cold_us"] * 1e-6) / bandwidth
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])

    def names(option: str, choices: Iterable[str], default: str) -> None:
        text = f"of {', '.join(choices)}; default: {default}"
        parser.add_argument(option, nargs="+", choices=choices, metavar="NAME", help=text)

    names("--operation", list(OPERATIONS), "all")
    names("--latent", ALL_LATENTS, f"all on a GPU, else {', '.join(FEW_LATENTS)}")
    names("--dtype", list(DTYPES), ", ".join(FEW_DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="default: 8 32 128 on a GPU, else 8")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures; must not exist")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bars of the figures, a picture; must not exist")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; leave the option out to count without one")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and path.exists():
            parser.error(f"--{name} {path} exists and is not overwritten")
    options.rows = select(options)
    if not options.rows:
        parser.error("no chosen operation has a chosen latent and dtype; leave --latent or --dtype out")
    if min(row.batch for row in options.rows) < 1:
        parser.error(f"--batch {min(options.batch)} is not a number of samples; pass numbers >= 1")
    return options


def select(options: argparse.Namespace) -> list[Row]:
    """The rows that the options ask for and the operations allow."""
    on_gpu = options.device == "cuda"
    chosen = itertools.product(
        options.operation or OPERATIONS,
        options.latent or (ALL_LATENTS if on_gpu else FEW_LATENTS),
        options.batch or ((8, 32, 128) if on_gpu else (8,)),
        options.dtype or FEW_DTYPES,
    )
    return [
        row
        for row in itertools.starmap(Row, chosen)
        if row.latent in OPERATIONS[row.operation].shapes and row.dtype in OPERATIONS[row.operation].dtypes
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    result = report.head(options.device)
    gpu, machine = result["gpu"], result["machine"]
    print(
        f"{len(options.rows)} rows on {machine['gpu'] if gpu else 'no GPU: time and memory not measured'}", flush=True
    )
    rows = result["rows"] = []
    for path in filter(None, (options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for row in figures(options.rows, options.device, gpu and gpu["copy_bandwidth"]):
        rows.append(row)
        if options.json:  # after each row: a long sweep may be cut short
            write_json(options.json, result)
    if gpu:
        print(f"copy bandwidth {gpu['copy_bandwidth'] / 1e9:.0f} GB/s; cold, warm and launched: see the JSON's method")
    print("cells: eager / compile / ours")
    print(report.table(rows))
    if options.plot:
        report.plot(rows, options.plot)
    return int(any("refused" in row["ours"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
