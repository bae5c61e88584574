"""Runs the operator tests of this folder once more, in a process in which every CPU tensor is computed by Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels import backend


@pytest.mark.skipif(backend.INTERPRETED, reason="this process is the interpreter")
def test_triton_kernels_pass_the_operator_tests_in_the_interpreter():
    # the interpreter is chosen when a kernel is decorated, so it needs a process of its own
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop(backend.VARIABLE, None)
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=folder.parents[1], env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 300
