"""The operator tests fail when a kernel is broken on purpose: every line of the lists below breaks one.

A line is tried on a copy of kernels/, in a fork of a process that has imported torch already.
"""

import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

import engine

FOLDER = Path(__file__).parent
KERNELS = Path(importlib.util.find_spec("engine.kernels").origin).parent  # not imported: the forks import copies
FAILED = 1  # pytest's exit status


class Mutation(NamedTuple):
    what: str
    file: str
    old: str
    """stands in the file exactly once"""
    new: str
    tests: str
    """file::test of those that must notice, without test_ and .py of the file"""


LOSS = "policy_loss::test_loss_statistics_and_gradients_are_those_of_float64_autograd"
SAMPLE = "gaussian_policy::test_sample_is_mean_plus_scaled_noise_in_the_dtype_of_x"
LOG_PROB = "gaussian_policy::test_log_prob_is_the_density_of_the_guided_policy"
GRADIENTS = "gaussian_policy::test_gradients_of_both_predictions_are_those_of_autograd_in_float64"
ONE_GRADIENT = "gaussian_policy::test_only_the_prediction_that_asks_gets_a_gradient"
ROUNDS = "gaussian_policy::test_a_row_too_long_for_its_programs_takes_several_rounds"
SAME_BITS = "gaussian_policy::test_rollout_and_update_score_a_step_with_the_same_bits"
UNSCORED = "gaussian_policy::test_deterministic_steps_are_sampled_and_never_scored"
BOUNDS = "memory::test_kernels_touch_nothing_but_elements_of_their_tensors"
LARGE = "large_tensors::test_elements_beyond_2_31_are_reached"
DIVERGENCE = "policy_divergence::test_value_and_gradient_are_those_of_the_closed_form_in_float64"
ADVANTAGE = "group_advantage::test_advantage_is_the_deviation_from_the_group_over_the_population_std"
STREAMS = "noise::test_the_noise_of_a_sample_does_not_depend_on_its_batch"

# fmt: off
TRITON = [
    Mutation("sums run beyond the row", "rows.py", "m = o < n", "m = o >= 0", BOUNDS),
    Mutation("sums use 32-bit offsets", "rows.py", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", LARGE),
    Mutation("half precision stays", "rows.py", "other=0.0).to(tl.float32)\n\n\n", "other=0.0)\n\n\n", SAMPLE),
    Mutation("b and std swapped", "rows.py", "tl.load(p_std + i_row)", "tl.load(p_b + i_row)", SAMPLE),
    Mutation("guidance forgotten", "rows.py", "(b_f - b_uncond) * guidance", "(b_f - b_uncond)", LOG_PROB),
    Mutation("noise not scaled", "rows.py", "b_noise * std", "b_noise", SAMPLE),
    Mutation("scored before rounding", "rows.py", "b_next = b_next.to(tl.float32)", "b_next = b_noise * std + b_mean",
             SAME_BITS),
    Mutation("later rounds repeat the first", "rows.py", "(i * SPLIT + i_split)", "i_split", ROUNDS),
    Mutation("half of the even pairs lost", "rows.py", "_sum_neighbours(left + right,", "_sum_neighbours(left,",
             LOG_PROB),
    Mutation("half of the odd pairs lost", "rows.py", "_sum_strided(left + right", "_sum_strided(left", LOG_PROB),
    Mutation("partial sums of others read", "rows.py", "mask=o < rows * SPLIT", "mask=o >= 0", BOUNDS),
    Mutation("gap written over spread", "rows.py", "o_partial += tl.num_programs(0)", "o_partial += 0", LOSS),
    Mutation("gap of the sum", "rows.py", "_squares(b_f - load(p_ref", "_squares(b_f + load(p_ref", DIVERGENCE),

    Mutation("gradient beyond the row", "policy_backward.py", "m = o < n", "m = o >= 0", BOUNDS),
    Mutation("gradient uses 32-bit offsets", "policy_backward.py", ".to(tl.int64)", "", LARGE),
    Mutation("gradient of the first block only", "policy_backward.py", "(i_program % tiles) * BLOCK", "tiles * 0",
             GRADIENTS),
    Mutation("gradient of the first row for all", "policy_backward.py", "i_row if PER_ROW else 0", "0", GRADIENTS),
    Mutation("gradient's sign", "policy_backward.py", "load(p_next + o, m) - b_mean", "b_mean - load(p_next + o, m)",
             GRADIENTS),
    Mutation("gradient without guidance", "policy_backward.py", "b_df *= guidance", "b_df *= 1.0", GRADIENTS),
    Mutation("unconditional gradient's weight", "policy_backward.py", "b_df * (1.0 - guidance)", "b_df * guidance",
             ONE_GRADIENT),
    Mutation("no gradient of the penalty", "policy_backward.py", "(grad * tl.load(p_gap_slope + i_row))", "0.0", LOSS),

    Mutation("a half forgotten", "gaussian_policy.py", "scale * -0.5", "scale * -1.0", LOG_PROB),
    Mutation("constant not summed", "gaussian_policy.py", "_HALF_LOG_TWO_PI) * count", "_HALF_LOG_TWO_PI)", LOG_PROB),
    Mutation("std = 0 scored", "gaussian_policy.py", "tl.where(m_scored, b_log_prob, 0.0)", "b_log_prob", UNSCORED),
    Mutation("std = 0 moved", "gaussian_policy.py", "tl.where(m_scored, b_slope, 0.0)", "b_slope", UNSCORED),
    Mutation("scores beyond the batch", "gaussian_policy.py", "m = o < rows", "m = o >= 0", BOUNDS),
    Mutation("slope without b", "gaussian_policy.py", "b_slope = b_b *", "b_slope =", GRADIENTS),

    Mutation("exponent not clamped", "policy_divergence.py", "tl.where(m_large, _EXPONENT_LIMIT, b_value)", "b_value",
             "policy_divergence::test_exponents_stop_at_the_limit_and_so_does_the_gradient"),
    Mutation("infinite distance hidden", "policy_divergence.py", 'b_distance == float("inf")',
             "b_distance != b_distance",
             "policy_divergence::test_non_finite_predictions_are_not_hidden"),
    Mutation("exp(x) - 1 cancels", "policy_divergence.py", "tl.abs(x) < 0.5", "tl.abs(x) < 0.0",
             "policy_divergence::test_tiny_divergences_keep_their_relative_accuracy"),
    Mutation("the series ends early", "policy_divergence.py", "(1.0 / 5) *", "0.0 *", DIVERGENCE),
    Mutation("divergence beyond the batch", "policy_divergence.py", "m = o < rows", "m = o >= 0", BOUNDS),
    Mutation("slope's factor forgotten", "policy_divergence.py", "b_slope * factor", "b_slope", DIVERGENCE),

    Mutation("clip without its lower side", "policy_loss.py", "b_ratio < lowest, lowest,", "b_ratio < 0.0, lowest,",
             "policy_loss::test_the_clip_cuts_the_gradient_only_where_moving_on_would_help"),
    Mutation("minimum for maximum", "policy_loss.py", "m_clipped = b_held > b_free", "m_clipped = b_held < b_free",
             LOSS),
    Mutation("huge ratios keep their gradient", "policy_loss.py", "m_clipped | m_cut", "m_clipped",
             "policy_loss::test_huge_log_ratios_stay_finite_and_move_nothing"),
    Mutation("clamp hides an infinity", "policy_loss.py", "b_clamped + (b_log_ratio - b_log_ratio)", "b_clamped",
             "policy_loss::test_non_finite_inputs_make_the_loss_non_finite"),
    Mutation("ratio of a step not scored", "policy_loss.py", "tl.where(m_scored, b_log_prob - b_old, 0.0)",
             "b_log_prob - b_old", "policy_loss::test_a_deterministic_step_has_ratio_one_no_kl_and_no_gradient"),
    Mutation("weight not in the gradient", "policy_loss.py", "b_spread_slope *= b_weight", "b_spread_slope *= 1.0",
             LOSS),
    Mutation("penalty's gradient not scaled", "policy_loss.py", "b_gap_slope * kl_coef / rows", "b_gap_slope / rows",
             LOSS),
    Mutation("steps not scored counted", "policy_loss.py", "tl.where(m & m_scored, 1.0", "tl.where(m, 1.0",
             "policy_loss::test_clip_fraction_counts_scored_samples_only"),
    Mutation("loss of the last block only", "policy_loss.py", "b_total += tl.where", "b_total = tl.where", LOSS),

    Mutation("sample std", "group_advantage.py", "tl.sum(b_square) / count", "tl.sum(b_square) / (count - 1)",
             ADVANTAGE),
    Mutation("eps forgotten", "group_advantage.py", "+ tl.cast(eps, tl.float32)", "",
             "group_advantage::test_eps_is_added_to_the_std"),
    Mutation("0 / 0", "group_advantage.py", "tl.where(divisor == 0.0, 1.0, divisor)", "divisor",
             "group_advantage::test_equal_rewards_and_groups_of_one_give_exact_zeros"),
    Mutation("global std of a group", "group_advantage.py", "start * 0, total", "start, group_size", ADVANTAGE),
    Mutation("only clipped above", "group_advantage.py", "b_advantage < -clip", "b_advantage > clip",
             "group_advantage::test_advantages_are_clipped_on_both_sides"),
    Mutation("rewards use 32-bit offsets", "group_advantage.py", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)",
             "large_tensors::test_rewards_beyond_2_31_are_reached"),

    Mutation("one seed for all", "rows.py", "i_row if SEEDS else 0", "0", STREAMS),
    Mutation("one offset for all", "rows.py", "tl.load(p_offset) + i_row", "tl.load(p_offset)", STREAMS),
    Mutation("offsets of 32 bits", "noise.py", "(offset >> 32 & 0xFFFFFFFF)", "(offset * 0)",
             "noise::test_normals_are_box_muller_of_the_philox_words"),
    Mutation("a quarter of the circle", "noise.py", "tl.where(turn >> 31 == 1, -cosine, cosine)", "cosine",
             "noise::test_normals_are_box_muller_of_the_philox_words"),
]
TORCH = [
    Mutation("guidance forgotten", "rows.py", ".mul_(guidance).add_(base)", ".add_(base)", LOG_PROB),
    Mutation("a and b swapped", "rows.py", "x.to(f.dtype) * column(a,", "x.to(f.dtype) * column(b,", LOG_PROB),
    Mutation("sums split over threads", "rows.py", "_CHUNK = 16384", "_CHUNK = 2**40",
             "gaussian_policy::test_long_rows_keep_their_bits_on_several_threads"),
    Mutation("layout lost", "rows.py", "return result.copy_(values)", "return values.to(like.dtype)",
             "gaussian_policy::test_channels_last_is_kept_and_scored_alike "
             "gaussian_policy::test_inputs_of_different_layouts_agree"),
    Mutation("std = 0 moved", "gaussian_policy.py", ".mul_(scale).masked_fill_(unscored, 0.0)", ".mul_(scale)",
             UNSCORED),
    Mutation("scored before rounding", "gaussian_policy.py", "x_next - mean), *rows, count)\n\n\ndef _sample_fake",
             "noise.to(dtype) * column(std, x, dtype)), *rows, count)\n\n\ndef _sample_fake", SAME_BITS),
    Mutation("unconditional gradient's weight", "policy_backward.py", "in_layout(df * (1.0 - guidance)",
             "in_layout(df * guidance", ONE_GRADIENT),
    Mutation("exp(x) - 1 cancels", "policy_divergence.py", "exponent.expm1()", "(exponent.exp() - 1.0)",
             "policy_divergence::test_tiny_divergences_keep_their_relative_accuracy"),
    Mutation("minimum for maximum", "policy_loss.py", "torch.minimum(free, held)", "torch.maximum(free, held)", LOSS),
    Mutation("clamp hides an infinity", "policy_loss.py", ".add_(log_ratio * 0.0)", "",
             "policy_loss::test_non_finite_inputs_make_the_loss_non_finite"),
    Mutation("an empty batch divides by 0", "policy_loss.py", "max(x.shape[0], 1)", "x.shape[0]",
             "policy_loss::test_an_empty_batch_has_loss_zero_with_a_graph"),
    Mutation("equal rewards are rounded apart", "group_advantage.py", "rewards - rewards[:, :1]", "rewards",
             "group_advantage::test_equal_rewards_and_groups_of_one_give_exact_zeros"),
]
# fmt: on
LISTS = {"1": TRITON, "0": TORCH}
"""by the value of TRITON_INTERPRET"""


def nodes(mutations):
    """Their tests as pytest takes them, each once."""
    tests = dict.fromkeys(test.partition("::") for mutation in mutations for test in mutation.tests.split())
    return [f"{FOLDER}/test_{file}.py::{test}" for file, _, test in tests]


def run_tests(kernels: Path, tests: list[str]) -> tuple[int, str]:
    """Exit status of pytest, negative for a signal, and what it said, with engine.kernels found in a folder."""
    log = kernels.with_suffix(".log")
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # ends a mutation that hangs, which then counts as survived
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        engine.__path__.insert(0, str(kernels.parent))
        os._exit(pytest.main(["-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *tests]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text()[-3000:]


def main() -> None:
    """Print as JSON what became of the untouched kernels, and then of each mutation for this process's back end."""
    import hypothesis  # noqa: F401
    import torch  # noqa: F401

    mutations = LISTS[os.environ["TRITON_INTERPRET"]]
    results = []
    gc.freeze()  # pytest collects garbage when it ends: not what was imported here
    with tempfile.TemporaryDirectory() as folder:
        for i, mutation in enumerate([None, *mutations]):
            copy = Path(folder, str(i), "kernels")
            shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
            if mutation is not None:
                source = copy / mutation.file
                source.write_text(source.read_text().replace(mutation.old, mutation.new))
            results.append(run_tests(copy, nodes(mutations if mutation is None else [mutation])))
    json.dump(results, sys.stdout)


@pytest.fixture(scope="module")
def outcomes():
    """(exit status, output) of every mutation, and of none, by (TRITON_INTERPRET, mutation)."""
    processes, found = {}, {}
    for interpret in LISTS:
        environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the tests use none, and each fork would load them
        processes[interpret] = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True
        )
    for interpret, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        found |= zip([(interpret, m) for m in (None, *LISTS[interpret])], json.loads(output), strict=True)
    return found


CASES = [pytest.param(key, m, id=f"{m.file}: {m.what}") for key, mutations in LISTS.items() for m in mutations]
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="starts the interpreter itself")


@pytest.mark.parametrize("interpret", LISTS)
def test_the_tests_named_here_pass_on_the_kernels_as_they_are(interpret, outcomes):
    status, output = outcomes[interpret, None]
    assert status == 0, output


@pytest.mark.parametrize(("interpret", "mutation"), CASES)
def test_a_broken_kernel_fails_its_tests(interpret, mutation, outcomes):
    source = (KERNELS / mutation.file).read_text()
    assert source.count(mutation.old) == 1, f"{mutation.old!r} stands {source.count(mutation.old)} times in the file"
    status, output = outcomes[interpret, mutation]
    assert status == FAILED, f"exit status {status} of {mutation.tests}\n{output}"


if __name__ == "__main__":
    main()
