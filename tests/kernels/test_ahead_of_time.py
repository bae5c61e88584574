"""Every Triton kernel compiles for the GPUs that we name, without one at hand, within its budget of their resources."""

import importlib
import pkgutil
import re
import subprocess

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

import engine.kernels
from bench.aot import CUOBJDUMP, TARGETS, Launch, broken, compile_launch, facts_of, launches_of, name_of
from bench.aot_cases import CASES, ONE, SDXL
from engine.kernels import backend

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter replaces the compiler")
needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this build of Triton brings no cuobjdump")

# What a kernel does differently for another dtype shows on one GPU of a kind: the oldest, the one with the widest use,
# the first with an assembler of its own, and AMD's. `python -m bench.aot` compiles every pair.
EVERY_DTYPE = ("sm_75", "sm_90", "sm_100", "gfx942")


def launch_of(case, dtype=None):
    (launch,) = launches_of(case, dtype or case.dtypes[0])
    return launch


def case_name(case):
    return f"{case.kernel}-{case.operation}-{case.rows.name}".replace(" ", "_").replace(",", "")


each_case = pytest.mark.parametrize("case", CASES, ids=case_name)


def test_every_kernel_has_a_case():
    names = [module.name for module in pkgutil.iter_modules(engine.kernels.__path__, "engine.kernels.")]
    modules = [importlib.import_module(name) for name in names]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    kernels = {name_of(function) for function in functions if function.__name__.endswith("_kernel")}
    assert kernels == {case.kernel for case in CASES}
    assert kernels == {case.kernel for case in CASES if case.rows is ONE} | {
        # launched only where a group is too large for one program
        "group_norm.moments", "group_norm.statistics", "group_norm.apply", "group_norm.input_gradient",
    }  # fmt: skip


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=needs_cuobjdump if target.backend == "cuda" else ()) for name, target in TARGETS.items()],
)
@each_case
def test_kernel_keeps_its_budget(case, target):
    for dtype in case.dtypes if target in EVERY_DTYPE else case.dtypes[:1]:
        facts = facts_of(launch_of(case, dtype), target)
        assert not broken(case, target, facts), (dtype, facts)


@needs_cuobjdump
@pytest.mark.parametrize("kernel", ["rows.row_sums", "policy_backward.backward"])
def test_machine_code_has_the_counted_accesses_and_no_spills(kernel, tmp_path):
    case = next(case for case in CASES if case.kernel == kernel and case.rows is SDXL)
    facts = facts_of(launch_of(case), "sm_90")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compile_launch(launch_of(case), "sm_90").asm["cubin"])
    code = subprocess.run([CUOBJDUMP, "--dump-sass", binary], check=True, capture_output=True, text=True).stdout
    loads, stores = (re.findall(rf"\b{name}\.E\S*", code) for name in ("LDG", "STG"))
    assert (len(loads), len(stores)) == (facts.loads, facts.stores)
    assert sum(".128" in load for load in loads) == facts.wide_loads > 0
    assert sum(".128" in store for store in stores) == facts.wide_stores > 0
    assert not re.search(r"\b(LDL|STL|FFMA)\b", code)


def narrow_products(ttir):
    """Products of 32 bits that a program's number goes into: with as many programs as elements need, they overflow."""
    narrow, products = set(), []
    for name, operation, operands, kind in re.findall(r"(%\w+) = (\S+) (.*?) : .*?(\w+)>?(?: loc.*)?$", ttir, re.M):
        if operation == "tt.get_program_id" or narrow.intersection(re.findall(r"%\w+", operands)):
            if operation == "arith.muli" and kind.endswith("i32"):
                products.append(name)
            if kind.endswith("i32") and operation != "arith.remsi":
                narrow.add(name)
    return products


@pytest.mark.parametrize("target", [pytest.param("sm_90", marks=needs_cuobjdump), "gfx942"])
def test_fused_multiply_adds_are_found(target):
    case = next(case for case in CASES if case.kernel == "policy_backward.backward" and case.rows is SDXL)
    launch = launch_of(case)
    assert launch.options["enable_fp_fusion"] is False
    fusing = launch._replace(options=launch.options | {"enable_fp_fusion": True})
    assert "fused multiply-adds" in " ".join(broken(case, target, facts_of(fusing, target)))


# Programs that take a block of rows each: a number of row has 32 bits, and its offset in what holds many a row 64.
OF_ROWS = ("gaussian_policy.score", "policy_divergence.divergence")


@pytest.mark.parametrize("case", [case for case in CASES if case.kernel not in OF_ROWS], ids=case_name)
def test_offsets_of_programs_have_64_bits(case):
    ttir = compile_launch(launch_of(case), "sm_90").asm["ttir"]
    assert narrow_products(ttir) == []


@triton.jit
def _overflowing_kernel(p_x, n):
    tl.store(p_x + tl.program_id(0) // 2 * n + tl.arange(0, 128), 0.0)


def test_offsets_of_32_bits_are_found():
    launch = Launch(_overflowing_kernel, (torch.empty(256), 128), {"num_warps": 1})
    assert len(narrow_products(compile_launch(launch, "sm_90").asm["ttir"])) == 1


@pytest.mark.parametrize("case", [case for case in CASES if case.rows is ONE], ids=case_name)
def test_one_element_makes_every_integer_a_constant(case):
    launch = launch_of(case)
    integers = [argument for argument in launch.arguments if isinstance(argument, int)]
    assert 1 in integers
    assert max(integers) == 1 or case.operation == "geglu"  # whose rows have two halves
    assert compile_launch(launch, "sm_90").asm["ptx"]


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_100", "gfx942"])
def test_rows_are_summed_in_one_order(target):
    """Before `tl.sum`, thread i holds number i, in every variant: so it adds in an order that no dtype changes."""
    for case in CASES:
        for dtype in case.dtypes if case.kernel == "rows.row_sums" else ():
            text = compile_launch(launch_of(case, dtype), target).asm["ttgir"]
            layouts = re.findall(r"^\s+\}\) : \(tensor<\d+xf32, (#\w+)>\) -> f32", text, re.M)
            assert layouts
            for layout in layouts:
                definition = re.search(rf"^{layout} = (.*)", text, re.M)[1]
                bases = [int(base) for base in re.findall(r"\[(\d+)\]", definition)]
                one_each = "sizePerThread = [1]" in definition
                in_order = "register = []" in definition and bases == [2**i for i in range(len(bases))]
                assert one_each or in_order, definition
