"""Compiles every kernel for GPUs that need not be there, and shows what each variant uses of them.

    python -m bench.aot [--target sm_90 ...] [--kernel rows.row_sums ...] [--json FILE]

Operations run on the CPU with a driver that launches nothing; the launches that they would have made are compiled by
Triton for every target as it would compile them there: block sizes, warps, dtypes, alignments are the launchers' own.
Seconds are those of one core with an empty cache. The command fails when a variant breaks the budget of its case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bench.aot_cases import CASES, OPERATIONS, Case
from bench.null_driver import NullDriver, null_driver
from bench.record import machine
from engine.run_directory import write_atomically

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# bits of AMD's instructions by the end of their names
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def name_of(kernel: JITFunction) -> str:
    """module.name, without the endings ``_kernels`` and ``_kernel``."""
    module, name = kernel.__module__.rpartition(".")[2], kernel.__name__.strip("_")
    return f"{module.removesuffix('_kernels')}.{name.removesuffix('_kernel')}"


class Launch(NamedTuple):
    """A launch that did not take place."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a compiled variant uses; registers and stack are a thread's, instructions those in the program's text."""

    registers: int
    stack: int
    """bytes of memory of its own, which spilled registers need"""
    spills: int
    """registers spilled, as AMD's compiler tells (NVIDIA's show in the stack alone)"""
    shared: int
    """bytes a program"""
    loads: int
    wide_loads: int
    """those of 128 bits or more"""
    narrow_loads: int
    """wide loads that are missing: a thread's part of a block is read in smaller pieces than 128 bits or all of it"""
    stores: int
    wide_stores: int
    narrow_stores: int
    fused: int
    """fp32 multiply-adds that the compiler fused, other than inside of its own divisions, logarithms and the like"""
    seconds: float
    """to compile; 0 for a variant that this process compiled before"""


def launches_of(case: Case, dtype: torch.dtype) -> list[Launch]:
    """The launches of the case's kernel."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **options):
        launches.append(Launch(kernel, arguments, options))

    with null_driver(), mock.patch.object(JITFunction, "run", record):
        OPERATIONS[case.operation](case.rows.tensor(dtype), torch.ones(case.rows.batch))
    return [launch for launch in launches if name_of(launch.kernel) == case.kernel]


class _Target(NullDriver):
    """Makes Triton compile for a target."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self.target = target

    def get_current_device(self) -> Any:
        return f"null {self.target.arch}"  # Triton keeps the compiled variants of each device apart


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel, with its texts in ``asm``, as a launch on the target would run it."""
    with mock.patch.object(type(driver), "active", _Target(TARGETS[target])):
        return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)


def facts_of(launch: Launch, target: str) -> Facts:
    """Compile a launch for a target and read off what it uses."""
    start = time.perf_counter()
    compiled = compile_launch(launch, target)
    seconds = time.perf_counter() - start
    usage, accesses = (_nvidia if TARGETS[target].backend == "cuda" else _amd)(compiled.asm)
    threads = TARGETS[target].warp_size * launch.options["num_warps"]
    counts = {}
    for kind in ("load", "store"):
        found = [width for name, width in accesses if name == kind]
        counts |= {f"{kind}s": len(found), f"wide_{kind}s": sum(width >= 128 for width in found)}
        counts |= {f"narrow_{kind}s": _missing(_possible(compiled.asm["ttir"], kind, threads), found)}
    return Facts(**usage, **counts, shared=compiled.metadata.shared, seconds=round(seconds, 3))


def _nvidia(asm: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Registers and the like; (load | store, bits a thread) of every access to global memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", printed).groups())
    fused = len(re.findall(r"\bfma\.rn\.f32\b", asm["ptx"]))  # those of the library's functions flush: .ftz
    # the machine code has one access for each of these
    found = re.findall(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\s", asm["ptx"])
    accesses = [("load" if name == "ld" else "store", int(width) * int(count or 1)) for name, count, width in found]
    return {"registers": registers, "stack": stack, "spills": 0, "fused": fused}, accesses


def _amd(asm: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """As ``_nvidia``, except that scalars are not loaded by what is counted here."""
    text = asm["amdgcn"]
    names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spills": "vgpr_spill_count"}
    usage = {key: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for key, name in names.items()}
    usage["fused"] = len(re.findall(r"\bv_(?:pk_)?(?:fma|mad|mac)\w*_f32", text))
    if re.search(r"\bfdiv\b|@llvm\.\w*(?:log|exp|sqrt|rsq|rcp)|@__ocml", asm["llir"]):
        usage["fused"] = 0  # divisions and functions are made of fused operations, among which ours would not be seen
    found = re.findall(r"^\s*(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)", text, re.M)
    return usage, [(name, _AMD_BITS[width]) for name, width in found]


def _possible(ttir: str, kind: str, threads: int) -> list[int]:
    """Bits of each load or store that a thread would make of its part of a block, up to 128 at a time."""
    widths = []
    for shape, element in re.findall(rf"tt\.{kind} .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>", ttir):
        each = math.prod(map(int, shape.split("x"))) // threads
        if each > 1:  # else there is nothing to gather
            widths += [min(each * int(element), 128)] * math.ceil(each * int(element) / 128)
    return widths


def _missing(possible: list[int], found: list[int]) -> int:
    """How many of the possible widths have no counterpart at least as wide."""
    return max((sum(p >= width for p in possible) - sum(f >= width for f in found) for width in possible), default=0)


def limit_of(case: Case, target: str) -> int:
    """Registers that a thread may use."""
    return case.registers if TARGETS[target].backend == "cuda" else case.vgprs


def broken(case: Case, target: str, facts: Facts) -> list[str]:
    """What of the case's budget a variant breaks, in words."""
    limit, found = limit_of(case, target), []
    if facts.stack > case.stack or facts.spills:
        found.append(f"{facts.stack} bytes of stack, {facts.spills} registers spilled")
    if facts.registers > limit:
        found.append(f"{facts.registers} registers, at most {limit}")
    if facts.fused:
        found.append(f"{facts.fused} fused multiply-adds")
    if case.rows.aligned and case.vectors:
        narrow = {"loads": facts.narrow_loads, "stores": facts.narrow_stores}
        found += [f"{count} wide {kind} are missing" for kind, count in narrow.items() if count > 0]
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``torch.name``."""
    return str(dtype).removeprefix("torch.")


HEADER = f"{'kernel':28}{'operation':18}{'rows':13}{'dtype':10}{'aligned':9}{'target':8}"
HEADER += f"{'regs':>9}{'stack':>7}{'shared':>8}{'128-bit/loads':>15}{'seconds':>9}"


def line(case: Case, dtype: torch.dtype, target: str, facts: Facts) -> str:
    """A row of the table."""
    text = f"{case.kernel:28}{case.operation:18}{case.rows.name:13}{dtype_name(dtype):10}"
    text += f"{'yes' if case.rows.aligned else 'no':9}{target:8}{facts.registers:5}/{limit_of(case, target):<3}"
    text += f"{facts.stack:7}{facts.shared:8}{facts.wide_loads:12}/{facts.loads:<2}{facts.seconds:9.2f}"
    return "  BROKEN: ".join([text, *filter(None, ["; ".join(broken(case, target, facts))])])


def write_rows(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the table and where it was made, one line a row."""
    lines = ",\n".join(json.dumps(list(row.values())) for row in rows)
    columns, made = json.dumps(list(rows[0])), json.dumps(machine("cpu"))
    write_atomically(Path(path), f'{{"machine": {made},\n"columns": {columns},\n"rows": [\n{lines}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write it with --json; 1 when a budget is broken, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kernels = sorted({case.kernel for case in CASES})
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="NAME", help="GPUs")
    parser.add_argument("--kernel", nargs="+", default=kernels, choices=kernels, metavar="NAME", help="kernels")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    options = parser.parse_args(arguments)
    print(HEADER)
    selected, rows = [case for case in CASES if case.kernel in options.kernel], []
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for case in selected:
            for dtype in case.dtypes:
                (launch,) = launches_of(case, dtype)
                for target in options.target:
                    facts = facts_of(launch, target)
                    print(line(case, dtype, target, facts), flush=True)
                    rows.append(
                        {"kernel": case.kernel, "operation": case.operation, "rows": case.rows.name}
                        | {"dtype": dtype_name(dtype), "aligned": case.rows.aligned, "target": target}
                        | dataclasses.asdict(facts) | {"broken": broken(case, target, facts)}
                    )  # fmt: skip
    seconds, failed = sum(row["seconds"] for row in rows), sum(bool(row["broken"]) for row in rows)
    print(f"{len(rows)} variants, {seconds:.0f} s of compilation, {failed} over budget")
    if options.json:
        write_rows(options.json, rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
