"""The table of compiled kernels: what it says, and when the command fails."""

import json
import subprocess
import sys
from pathlib import Path

from bench import aot
from bench.aot_cases import CASES, LARGE_GROUP, Rows

ADVANTAGES = [case for case in CASES if case.kernel == "group_advantage.advantage"]
SELECTED = ["--target", "gfx942", "--kernel", "group_advantage.advantage"]


def test_the_command_prints_and_writes_a_row_for_every_variant(tmp_path):
    file = tmp_path / "aot.json"
    command = [sys.executable, "-m", "bench.aot", *SELECTED, "--json", file]
    process = subprocess.run(command, cwd=Path(aot.__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    header, *lines, total = process.stdout.splitlines()
    written = json.loads(file.read_text())
    rows = [dict(zip(written["columns"], row, strict=True)) for row in written["rows"]]
    variants = [(case.rows.name, aot.dtype_name(dtype)) for case in ADVANTAGES for dtype in case.dtypes]
    assert [(row["rows"], row["dtype"]) for row in rows] == variants
    assert len(lines) == len(variants)
    assert {len(line) for line in lines} == {len(header)}
    for line, row in zip(lines, rows, strict=True):
        assert f" {row['registers']}/" in line
        assert f" {row['wide_loads']}/{row['loads']}" in line
        assert row["seconds"] > 0
    assert total.startswith(f"{len(variants)} variants")
    assert "bench.aot" in written["machine"]["command"]


def run(monkeypatch, capsys, case):
    """What the command returns and prints for one case."""
    monkeypatch.setattr(aot, "CASES", [case])
    return aot.main(SELECTED), capsys.readouterr().out


def test_a_kernel_over_its_budget_of_registers_fails(monkeypatch, capsys):
    case = ADVANTAGES[0]
    code, printed = run(monkeypatch, capsys, case)
    assert code == 0
    assert "BROKEN" not in printed
    code, printed = run(monkeypatch, capsys, case._replace(vgprs=1))
    assert code == 1
    assert "registers, at most 1" in printed


def test_a_kernel_that_reads_aligned_rows_piece_by_piece_fails(monkeypatch, capsys):
    case = next(case for case in ADVANTAGES if case.rows is LARGE_GROUP)
    shifted = case._replace(rows=case.rows._replace(offset=1), vgprs=512)
    assert run(monkeypatch, capsys, shifted)[0] == 0
    monkeypatch.setattr(Rows, "aligned", True)
    code, printed = run(monkeypatch, capsys, shifted)
    assert code == 1
    assert "wide loads are missing" in printed
