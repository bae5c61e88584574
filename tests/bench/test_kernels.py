"""The kernel benchmark: what it counts, what it compares with, and that it refuses figures of a wrong operation."""

import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bench.kernels import __main__ as command
from bench.kernels import checking, counting, eager, interpreted, timing
from bench.kernels.operations import OPERATIONS, Row, prepare

LOSS = Row("policy_loss", "sd15", 4, "fp32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run without a GPU: exit status, files, and rows by operation and batch."""
    folder = tmp_path_factory.mktemp("run")
    names = ["policy_loss", "policy_sample", "group_advantage"]
    options = ["--operation", *names, "--latent", "sd15", "rewards", "--batch", "1", "4", "--dtype", "bf16", "fp32"]
    files = ["--json", str(folder / "kernels.json"), "--plot", str(folder / "kernels.png")]
    status = command.main([*options, "--device", "cpu", *files])
    result = json.loads((folder / "kernels.json").read_text())
    rows = {(row["operation"], row["batch"], row["dtype"]): row for row in result["rows"]}
    return status, folder, result, rows


def test_loss_takes_three_launches_and_reads_and_writes_only_what_it_must(run):
    ours = run[3]["policy_loss", 4, "bf16"]["ours"]
    assert ours["launches"] == 3
    # forward reads x, x_next, pred and pred_ref; backward reads them again and writes a gradient: 9 x 2 bytes
    assert 18 <= ours["bytes_per_element"] <= 18.9
    requested = ours["forward"]["requested_bytes"] + ours["backward"]["requested_bytes"]
    assert requested <= 18.9 * 4 * 4 * 64 * 64
    assert ours["check"]["passed"]


def test_sampling_takes_two_launches_and_no_bytes_for_noise(run):
    ours = run[3]["policy_sample", 4, "bf16"]["ours"]
    assert ours["launches"] == 2
    assert 6 <= ours["bytes_per_element"] <= 6.3


def test_eager_loss_is_counted_operator_by_operator(run):
    forward, backward = (run[3]["policy_loss", 4, "bf16"]["eager"][name] for name in ("forward", "backward"))
    elements = 4 * 4 * 64 * 64
    # fp32: 27 operands of 4 bytes; bf16: three inputs are raised before, and one gradient is lowered after
    assert forward["bytes"] / elements == pytest.approx(27 * 4 + 3 * 6, abs=0.1)
    assert backward["bytes"] / elements == pytest.approx(27 * 4 + 6, abs=0.1)
    assert forward["launches"] + backward["launches"] > 60


def test_bytes_per_element_do_not_depend_on_the_batch(run):
    for operation in ("policy_loss", "policy_sample"):
        for name in ("eager", "ours"):
            one, four = (run[3][operation, batch, "fp32"][name]["bytes_per_element"] for batch in (1, 4))
            assert one == pytest.approx(four, rel=0.01)


def test_compile_is_counted_or_the_reason_is_given(run):
    for row in run[3].values():
        compiled = row["compile"]
        assert ("launches" in compiled) != ("not counted" in compiled)
        if "launches" in compiled:
            assert compiled["launches"] < row["eager"]["launches"]
            assert compiled["bytes_per_element"] < row["eager"]["bytes_per_element"]


def test_result_says_of_what_code_and_machine_it_is(run):
    status, folder, result, _ = run
    assert status == 0
    assert result["machine"]["torch"] == torch.__version__
    assert {"commit", "command", "date", "processor"} <= set(result["machine"])
    assert result["gpu"] is None
    assert {"bytes_per_element", "bandwidth_share"} <= set(result["method"])
    assert (folder / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert not any("us" in key or key == "peak_bytes" for row in result["rows"] for key in row["ours"])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_passes_its_check(name):
    operation = OPERATIONS[name]
    for dtype in operation.dtypes:
        case = prepare(Row(name, next(iter(operation.shapes)), 2, dtype))
        outcome = checking.check(case, case.run(operation.ours))
        assert outcome.passed, f"{dtype}: {outcome}"


def wrong_value(results, inputs):
    return (results[0] * 1.001, *results[1:])


def wrong_gradient(results, inputs):
    return (results[0] + 0.1 * (inputs["pred"] - inputs["pred"].detach()).sum(), *results[1:])


def not_finite(results, inputs):
    return (results[0] * torch.nan, *results[1:])


def one_missing(results, inputs):
    return results[:-1]


@pytest.fixture(params=[wrong_value, wrong_gradient, not_finite, one_missing])
def broken(request, monkeypatch):
    """The loss, wrong in one way."""
    original = OPERATIONS["policy_loss"]

    def ours(**given):
        return request.param(original.ours(**given), given)

    monkeypatch.setitem(OPERATIONS, "policy_loss", dataclasses.replace(original, ours=ours))


@pytest.mark.usefixtures("broken")
def test_wrong_operation_has_no_speed(monkeypatch):
    timed = []
    verify = timing.verify
    monkeypatch.setattr(timing, "verify", lambda row, device: verify(row, device="cpu"))
    monkeypatch.setattr(timing, "speed", lambda row, function: timed.append(function) or {"cold_us": 1.0})
    monkeypatch.setattr(timing, "release_memory", lambda: None)
    figures = timing.measure(LOSS)
    assert "wrong results" in figures["ours"]["refused"]
    assert figures["eager"] == {"cold_us": 1.0}
    assert OPERATIONS["policy_loss"].ours not in timed
    assert len(timed) == 2


@pytest.mark.usefixtures("broken")
def test_wrong_operation_has_no_counts_and_fails_the_command(monkeypatch, capsys):
    def count_here(module, rows, environment):
        return [interpreted.count(row) if module == "interpreted" else {"not counted": "not asked"} for row in rows]

    monkeypatch.setattr(counting, "count_elsewhere", count_here)
    assert command.main(["--operation", "policy_loss", "--latent", "sd15", "--dtype", "fp32", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "ours refused: wrong results" in output
    assert "70 / - / -" in output


def test_formulas_are_those_of_the_distributions():
    case = prepare(LOSS)
    s = {name: value.detach().double() for name, value in case.inputs.items()}
    a, b, std = (s[name].view(-1, 1, 1, 1) for name in ("a", "b", "std"))
    policy, reference = (Normal(a * s["x"] + b * s[name], std.expand_as(s["x"])) for name in ("pred", "pred_ref"))
    log_prob = policy.log_prob(s["x_next"]).mean((1, 2, 3))
    kl = kl_divergence(policy, reference).mean((1, 2, 3))
    ratio = (log_prob - s["old_log_prob"]).exp()
    surrogate = torch.minimum(s["advantage"] * ratio, s["advantage"] * ratio.clamp(1 - 1e-4, 1 + 1e-4))
    actual = eager.policy_loss(**s | {"mean_ref": reference.mean})
    expected = ((0.04 * kl - surrogate).mean(), log_prob, ratio)
    torch.testing.assert_close(actual[:3], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[4], kl, rtol=1e-10, atol=0)
    assert 0 < actual[3] < 1
    step = {name: s[name] for name in ("x", "x_next", "pred", "a", "b", "std")}
    torch.testing.assert_close(eager.policy_log_prob(**step)[0], log_prob, rtol=1e-12, atol=0)
    divergence = eager.policy_divergence(s["pred"], s["pred_ref"], s["b"], s["std"])[0]
    torch.testing.assert_close(divergence, kl, rtol=1e-10, atol=0)


def test_counter_takes_views_and_allocations_for_free():
    x = torch.randn(4, 8)
    counter = counting.Counter()
    with counter:
        x.view(2, 16)[:, 3].unsqueeze(0).detach()
        torch.empty_like(x)
    assert counter.take() == {"launches": 0, "bytes": 0}


def test_counter_adds_what_operators_read_and_write():
    x, y = torch.randn(4, 8), torch.randn(4, 1)
    counter = counting.Counter()
    for run, size in (
        (lambda: x.bfloat16(), 32 * (4 + 2)),
        (lambda: x + y.expand(4, 8), 4 * (32 + 4 + 32)),
        (lambda: x.mul_(2), 4 * (32 + 32)),
        (lambda: x.copy_(y), 4 * (4 + 32)),
        (lambda: torch.randn_like(x), 4 * 32),
        (lambda: x.sum(), 4 * (32 + 1)),
    ):
        with counter:
            run()
        assert counter.take() == {"launches": 1, "bytes": size}


def test_traffic_is_the_union_of_what_is_accessed():
    traffic = interpreted.Traffic()

    class Pointers:
        def __init__(self, *addresses):
            self.data = np.array(addresses, dtype=np.uint64)

        def get_element_ty(self):
            return SimpleNamespace(primitive_bitwidth=32)

    for addresses, mask in (
        ((100, 104, 108, 112), (1, 1, 1, 0)),
        ((104, 108, 112, 116), (1, 1, 0, 0)),
        ((200, 200, 300, 304), (1, 1, 1, 1)),
        ((0,), (0,)),
    ):
        traffic.add(Pointers(*addresses), SimpleNamespace(data=np.array(mask, dtype=bool)))
    assert traffic.requested == 4 * (3 + 2 + 4)
    assert traffic.distinct() == 4 * (3 + 3)


def test_process_that_dies_leaves_a_reason():
    answers = list(counting.count_elsewhere("no_such_module", [LOSS, LOSS, LOSS], {}))
    assert ["exit status 1" in answer["not counted"] for answer in answers] == [True] * 3


def test_internals_that_changed_leave_a_reason(monkeypatch, capsys):
    def count(row):
        raise AttributeError("module has no attribute 'GraphLowering'")

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([LOSS])))
    counting.answer(count)
    assert "no attribute 'GraphLowering'" in json.loads(capsys.readouterr().out)["not counted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "pass numbers >= 1"),
        (["--operation", "group_advantage", "--latent", "sd15"], "no chosen operation has a chosen latent"),
        (["--operation", "policy_los"], "policy_loss"),
        (["--json", __file__], "is not overwritten"),
    ],
)
def test_options_that_cannot_be_met_are_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        command.main(options)
    assert message in capsys.readouterr().err
