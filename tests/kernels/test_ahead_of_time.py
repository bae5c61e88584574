"""Every Triton kernel compiles for the GPUs that we name, without one at hand, within its resources."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import backend
from engine.kernels.gaussian_policy import ROWS, WARPS, _score_kernel
from engine.kernels.group_advantage import _advantage_kernel
from engine.kernels.policy_divergence import _divergence_kernel
from engine.kernels.policy_loss import _loss_kernel
from engine.kernels.rows import _backward_kernel, _row_sums_kernel

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter replaces the compiler")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALL = {"SCORE": True, "GUIDED": True, "REFERENCE": True}
NONE = dict.fromkeys(ALL, False)
LONG = {"SPLIT": 64, "BLOCK": 2048, "ALIGNED": True}
ODD = {"SPLIT": 64, "BLOCK": 1024, "ALIGNED": False}
SHORT = {"SPLIT": 1, "BLOCK": 128, "ALIGNED": False}
# name: (kernel, constants, warps, whether rows are a multiple of 16 elements)
KERNELS = {
    "sample": (_row_sums_kernel, ALL | LONG | {"SAMPLE": True, "REFERENCE": False}, 8, True),
    "score": (_row_sums_kernel, ALL | LONG | {"SAMPLE": False}, 8, True),
    "score of odd rows": (_row_sums_kernel, ALL | ODD | {"SAMPLE": False}, 4, False),
    "gap": (_row_sums_kernel, NONE | SHORT | {"SAMPLE": False, "REFERENCE": True}, 1, False),
    "backward": (_backward_kernel, ALL | {"PER_ROW": False, "UNCOND_GRAD": True, "BLOCK": 2048}, 8, True),
    "log_prob": (_score_kernel, {"SPLIT": 64, "ROWS": ROWS}, WARPS, False),
    "divergence": (_divergence_kernel, {"EXPONENTIAL": True, "SPLIT": 64, "ROWS": ROWS}, WARPS, False),
    "loss": (
        _loss_kernel,
        {"WEIGHTED": True, "REFERENCE": True, "EXPONENTIAL": True, "SPLIT": 64, "ROWS": ROWS},
        WARPS,
        False,
    ),
    "advantage": (_advantage_kernel, {"SCALE": "global_std", "BLOCK": 64}, 1, False),
}


def compiled(name, target, *, ones=False):
    """The kernel for bf16 latents and fp32 scalars, pointers aligned as torch aligns them.

    With ``ones``, every integer is 1: Triton then compiles it as a constant, as for one row of one block.
    """
    kernel, constants, warps, aligned = KERNELS[name]
    latents = {"p_x", "p_next", "p_pred", "p_uncond", "p_ref", "p_noise", "p_d_pred", "p_d_uncond"}
    integers = {"n", "tiles", "rows", "blocks", "group_size", "total"}
    if ones:
        constants = constants | dict.fromkeys(integers.intersection(kernel.arg_names), 1)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.startswith("p_"):
            signature[argument] = "*bf16" if argument in latents else "*fp32"
        else:
            signature[argument] = "i32" if argument in integers else "fp32"
    divisible = [
        i
        for i, argument in enumerate(kernel.arg_names)
        if argument.startswith("p_") or (argument == "n" and aligned and not ones)
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "enable_fp_fusion": False})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_without_spills_or_fused_arithmetic(name, target, tmp_path):
    result = compiled(name, target)
    if target == "gfx942":
        text = result.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s*0\b", text)
        assert re.search(r"\.private_segment_fixed_size:\s*0\b", text)
        return
    # what a compiler may fuse differs between kernels; the fma.rn.ftz of the library's logarithm are its own
    assert "fma.rn.f32" not in result.asm["ptx"]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(result.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this build of Triton brings no cuobjdump to count resources with")
    usage = subprocess.run([tool, "--dump-resource-usage", binary], check=True, capture_output=True, text=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage)[1]) == 0
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 128


@pytest.mark.parametrize("name", ["sample", "score", "backward"])
def test_aligned_rows_are_read_in_128_bit_loads_from_64_bit_offsets(name):
    result = compiled(name, "sm_90")
    wide = re.findall(r"ld\.global\S*\.v4\.b32", result.asm["ptx"])
    latents = {"sample": 4, "score": 5, "backward": 5}[name]
    assert len(wide) == latents
    row_offsets = re.findall(r"arith\.muli %(?:i_row|i_program)\w*, %\w+ : (\w+)", result.asm["ttir"])
    assert row_offsets == ["i64"]


@pytest.mark.parametrize("name", ["gap", "backward", "log_prob", "divergence", "loss", "advantage"])
def test_kernel_compiles_for_one_row_of_one_element(name):
    assert compiled(name, "sm_90", ones=True).asm["cubin"]
