"""Comparisons: what is asked for, what is run again, what it cost, and what the table says."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import Future

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine
from engine import compare
from engine.comparing import runs, settings, work
from engine.comparing.flops import FlopCounter
from engine.comparing.result import COLUMNS, hold_to_budget, markdown, rows
from engine.models.pipelines import load_pipeline

pytestmark = pytest.mark.usefixtures("quick_finish")

KEYS = ("reward.terms={pixel: 1}", "evaluation.samples=100")
GRPO = "{name: grpo, config: grpo, set: [iterations=2, rollout.pool=8]}"
OTHER = "{name: other, config: ppo, set: [optimizer.lr=3e-3, iterations=2, rollout.pool=8]}"


class InProcess:
    """An executor that runs at once, in this process."""

    def __init__(self, workers, mp_context, initializer):
        initializer()

    def shutdown(self, **how):
        return None

    def submit(self, function, job):
        future = Future()
        try:
            future.set_result(function(job))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def asked(tmp_path, tiny_overrides):
    """`asked(*overrides)`: a comparison of tiny runs."""
    free = ("seed=", "objective.", "optimizer.lr=", "iterations=", "rollout.pool=")
    mine = [key for key in tiny_overrides if not key.startswith(free)]

    def make(*overrides: str) -> settings.Comparison:
        where = f"output_dir={tmp_path / 'out'}"
        return settings.read(
            None, [where, f"compare.methods=[{GRPO}, {OTHER}]", *mine, *KEYS, "compare.seeds=[0, 1]", *overrides]
        )

    return make


@pytest.fixture
def run(asked, monkeypatch):
    """`run(*overrides)`: compare in this process; `run.jobs` are those that really ran."""
    monkeypatch.setattr(runs, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(work, "_evaluators", {})
    once = work.run

    def make(*overrides: str):
        return compare.compare(asked(*overrides), ["words"])

    def noted(job):
        make.jobs.append(job.name)
        return once(job)

    make.jobs = []
    monkeypatch.setattr(work, "run", noted)
    return make


# ---------------------------------------------------------------------- what is asked for


def test_overrides_win_over_the_file_and_that_over_a_methods_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "compare: {seeds: [4], methods: [grpo, {name: slow, config: grpo, set: [optimizer.lr=1e-9, iterations=7]}]}\n"
        "iterations: 3\nobjective: {kl_coef: 0.5, dmd2: {gan_weight: 0}}\nrollout: {pool: 512}\n"
    )
    comparison = settings.read(file, ["rollout.pool=256", "compare.budgets=[1, 2.5]", f"output_dir={tmp_path}/out"])
    assert [(job.method, job.budget, job.config.seed, job.config.iterations) for job in comparison.jobs({})] == [
        ("grpo", 1.0, 4, 3),
        ("slow", 1.0, 4, 3),
        ("grpo", 2.5, 4, 8),
        ("slow", 2.5, 4, 8),
    ]
    grpo, slow = comparison.methods.values()
    assert (grpo.optimizer.lr, slow.optimizer.lr) == (engine.load_config().optimizer.lr, 1e-9)
    assert (slow.rollout.pool, slow.objective.kl_coef, slow.objective.dmd2.gan_weight) == (256, 0.5, 0)
    assert slow.train.threads == 1


def test_the_shipped_methods_are_named_by_their_files():
    comparison = settings.read(None, ["compare.methods=[ppo, grpo]"], quick=True)
    assert [config.objective.kind for config in comparison.methods.values()] == ["ppo", "grpo"]
    assert [job.config.iterations for job in comparison.jobs({})] == [round(engine.load_config().iterations / 4)] * 2
    assert comparison.jobs({})[0].config.evaluation.samples == 1000


def test_quick_takes_a_quarter_of_what_iterations_do_not_shrink():
    method = "{name: dmd2, config: dmd2, set: [rollout.pool=400, objective.dmd2.critic.warmup=40]}"
    (config,) = settings.read(None, [f"compare.methods=[{method}]"], quick=True).methods.values()
    assert (config.rollout.pool, config.objective.dmd2.critic.warmup) == (100, 10)
    (config,) = settings.read(None, [f"compare.methods=[{method}]", "rollout.pool=77"], quick=True).methods.values()
    assert config.rollout.pool == 77
    (config,) = settings.read(None, ["compare.methods=[grpo]"], quick=True).methods.values()
    assert config.rollout.pool == 256 > config.rollout.conditions


def test_the_default_comparison_is_of_methods_that_are_shipped():
    comparison = settings.read(None, [])
    assert {name: config.objective.kind for name, config in comparison.methods.items()} == {
        name: name for name in ("grpo", "ppo", "progressive", "consistency", "regression", "dmd2", "flash_dmd")
    }


def test_quick_gives_way_to_what_is_asked_for():
    comparison = settings.read(None, ["compare.methods=[grpo]", "compare.seeds=[3, 5]"], quick=True)
    assert [job.config.seed for job in comparison.jobs({})] == [3, 5]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("compare.methods=[grop]", "grop is not a shipped method; allowed are grpo, "),
        ("compare.methods=[grpo, grpo]", "grpo is taken already"),
        ("compare.methods=[{name: teacher, config: grpo}]", "teacher is taken already"),
        ("compare.methods=[]", "compare.methods: "),
        ("compare.seeds=[1, 1]", "names one twice"),
        ("compare.budgets=[0]", "compare.budgets.0: "),
        ("compare.seed=1", "unknown key compare.seed; allowed are compare.methods, compare.seeds"),
        ("objective.kind=grop", "objective.kind='grop' is not allowed"),
        (
            "compare.methods=[grpo, {name: b, config: grpo, set: [teacher.steps=20]}]",
            "grpo and b differ in teacher (steps: 50 and 20)",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path, capsys, override, says):
    assert compare.main([f"output_dir={tmp_path / 'out'}", "compare.methods=[grpo]", override]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- what it cost


def test_operations_are_those_of_pytorchs_own_counter(tiny_teacher):
    denoiser = load_pipeline(tiny_teacher).denoiser
    x, labels = torch.randn(3, 1, 8, 8, requires_grad=True), torch.tensor([1, 2, 3])

    def passes():
        denoiser.guided(x, labels, {"class_labels": labels}, guidance=2.0).square().mean().backward()

    with FlopCounterMode(display=False) as theirs:
        passes()
    counter = FlopCounter()
    for _ in range(2):
        with counter:
            passes()
    passes()
    assert counter.total == 2 * theirs.get_total_flops() > 0


def test_the_attention_of_a_cpu_is_counted():
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    with FlopCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    forward = 2 * (2 * 4 * 16 * 16 * 8) * 2
    assert counter.total == forward
    with counter:
        out.sum().backward()
    assert counter.total - forward == 2.5 * forward  # PyTorch's table: the scores are computed again


def test_the_operations_of_a_run_are_those_of_its_passes(run, asked):
    result = run("compare.seeds=[0]", "iterations=3")
    denoiser = load_pipeline(asked().methods["grpo"].teacher.path).denoiser
    x, condition = torch.randn(1, 1, 8, 8), {"class_labels": torch.tensor([1])}
    forward, both = FlopCounter(), FlopCounter()
    with forward, torch.no_grad():
        denoiser.guided(x, torch.tensor([5]), condition)
    with both:
        denoiser.guided(x, torch.tensor([5]), condition).sum().backward()
    for one in result["runs"]:
        passes = one["passes"]
        assert passes["teacher"] == 8 * 6  # a cache of its own: the whole pool, drawn in this run
        backward = passes["student_backward"] * (both.total - forward.total)
        assert one["flops"] == (passes["teacher"] + passes["student_forward"]) * forward.total + backward
        assert one["seconds"] > 0
        assert one["peak_bytes"] > 1e8


# ---------------------------------------------------------------------- runs


def test_a_run_is_the_run_of_distill(run, tmp_path):
    result = run(f"compare.methods=[{GRPO}]", "compare.seeds=[3]")
    config = {**result["methods"]["grpo"], "output_dir": str(tmp_path / "alone"), "seed": 3}
    summary = engine.distill(config).metrics
    assert result["runs"][0]["student"] == summary["student"]
    assert result["teacher"]["teacher"] == summary["teacher"]
    assert result["teacher"]["teacher_few_steps"] == summary["teacher_few_steps"]
    assert result["runs"][0]["passes"] == {k: v for k, v in summary["passes"].items() if "evaluation" not in k}


def test_every_student_is_judged_by_its_own_sampler(run):
    consistency = "[objective.kind=consistency, student.sampler=renoise, train.batch_size=8, iterations=1]"
    methods = f"compare.methods=[{GRPO}, {{name: consistency, config: grpo, set: {consistency}}}]"
    result = run(methods, "compare.seeds=[0]", "compare.match=false")
    assert result["failed"] == {}
    assert [one["student"]["eta"] for one in result["runs"]] == [0.0, 1.0]


def test_each_term_of_a_reward_is_kept(run):
    one = run(f"compare.methods=[{GRPO}]", "compare.seeds=[0]", "iterations=1", "reward.terms={pixel: 2, jpeg: 0.1}")[
        "runs"
    ][0]
    assert set(one["reward_terms"]) == {"pixel", "jpeg"}
    assert one["reward_terms"]["jpeg"] < 0
    assert one["reward"] == pytest.approx(2 * one["reward_terms"]["pixel"] + 0.1 * one["reward_terms"]["jpeg"])


def test_a_comparison_writes_its_result_and_goes_on_with_what_is_missing(run, tmp_path):
    first = run("compare.seeds=[0]")
    assert run.jobs == ["teacher", "grpo-x1-seed0", "other-x1-seed0"]
    assert len(work._evaluators) == 1  # so the teacher's images were drawn once
    run.jobs.clear()
    second = run("compare.seeds=[0, 1]")
    assert run.jobs == ["grpo-x1-seed1", "other-x1-seed1"]
    assert second["runs"][:2] == first["runs"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written == json.loads(json.dumps(second))
    assert written["command"] == "python -m engine.compare words"
    assert [row["seeds"] for row in written["rows"]] == [[0, 1], [0, 1]]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "compare.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:7]] == [
        "teacher, 6 steps",
        "teacher, 3 steps",
        "teacher, 3 steps of DPM-Solver++",
        "grpo",
        "other",
    ]
    run.jobs.clear()
    run("compare.seeds=[0, 1]")
    assert run.jobs == []


def test_methods_are_brought_to_the_operations_of_the_first(run, tmp_path):
    longer = f"compare.methods=[{GRPO}, {OTHER.replace('iterations=2', 'iterations=9')}]"
    most = "teacher.steps=60"  # most of the operations, and not of each iteration
    result = run(longer, most, "compare.seeds=[0, 1]")
    assert [(row["iterations"], row["budget_share"]) for row in result["rows"]] == [(2, 1), (2, 1)]
    assert run.jobs == [
        "teacher", "grpo-x1-seed0", "other-x1-seed0", "other-x1-seed0", "grpo-x1-seed1", "other-x1-seed1",
    ]  # fmt: skip
    assert result["warnings"] == []
    run.jobs.clear()
    assert run(longer, most, "compare.seeds=[0, 1]")["rows"] == result["rows"]
    assert run.jobs == []
    unmatched = run(longer, most, "compare.seeds=[0]", "compare.match=false", f"output_dir={tmp_path / 'other'}")
    assert (unmatched["rows"][1]["iterations"], len(unmatched["warnings"])) == (9, 1)


def test_phases_keep_their_lengths(run):
    phases = 'iterations=9, "objective.joined={regression: 1}", "objective.turns={ppo: 5, regression: 4}"'
    method = OTHER.replace("iterations=2", phases)
    result = run(f"compare.methods=[{GRPO}, {method}]", "compare.seeds=[0]")
    assert result["rows"][1]["iterations"] == 9
    assert len(result["warnings"]) == 1


def test_an_interrupted_search_for_equal_operations_goes_on_with_the_runs_that_it_left(run, tmp_path):
    longer = f"compare.methods=[{GRPO}, {OTHER.replace('iterations=2', 'iterations=9')}]"
    run(longer, "compare.seeds=[0]")
    (tmp_path / "out" / "iterations.json").unlink()  # which is written at the search's end
    run.jobs.clear()
    assert run(longer, "compare.seeds=[0]")["rows"][1]["iterations"] == 2
    assert run.jobs == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("iterations=4", "grpo-x1-seed0 of another configuration: iterations was 1 and is 4"),
        ("optimizer.eps=1e-6", "grpo-x1-seed0 of another configuration: optimizer.eps was 1e-08 and is 1e-06"),
        ("evaluation.samples=120", "teacher of another configuration: evaluation.samples was 100 and is 120"),
        ("compare.every=1", "compare.every was 0 and is 1"),
    ],
)
def test_runs_of_another_configuration_are_not_taken(run, override, says):
    run("compare.seeds=[0]", "iterations=1")
    with pytest.raises(engine.EngineError, match=says):
        run("compare.seeds=[0]", "iterations=1", override)


def test_a_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(engine.EngineError, match="holds something else"):
        run()


def test_a_failed_run_is_told_with_its_reason_and_tried_again(run, monkeypatch, tmp_path):
    train = work.train

    def fails(job):
        if job.method == "other":
            raise engine.EngineError("the loss is nan; nothing was updated with it")
        return train(job)

    monkeypatch.setattr(work, "train", fails)
    result = run("compare.seeds=[0]", "iterations=1")
    assert result["failed"] == {"other-x1-seed0": "the loss is nan; nothing was updated with it"}
    assert run.jobs == ["teacher", "grpo-x1-seed0", "other-x1-seed0"]
    assert "other-x1-seed0 failed: the loss is nan" in (tmp_path / "out" / "compare.md").read_text()
    assert [row["method"] for row in result["rows"]] == ["grpo"]
    monkeypatch.setattr(work, "train", train)
    run.jobs.clear()
    result = run("compare.seeds=[0]", "iterations=1")
    assert run.jobs == ["other-x1-seed0"]
    assert ([row["method"] for row in result["rows"]], result["failed"]) == (["grpo", "other"], {})


def test_evaluations_on_the_way_change_nothing_and_are_not_counted(run, tmp_path):
    plain = run(f"compare.methods=[{GRPO}]", "compare.seeds=[0]", "iterations=3")["runs"][0]
    watched = run(
        f"compare.methods=[{GRPO}]",
        "compare.seeds=[0]",
        "iterations=3",
        "compare.every=1",
        f"output_dir={tmp_path}/other",
    )["runs"][0]
    assert [point["iteration"] for point in watched["curve"]] == [1, 2, 3]
    assert watched["curve"][-1]["student"] == watched["student"] == plain["student"]
    assert watched["curve"][0]["student"]["fd"] != watched["student"]["fd"]
    assert watched["flops"] == plain["flops"] == watched["curve"][-1]["flops"] > watched["curve"][0]["flops"]
    assert watched["passes"] == plain["passes"]
    assert plain["curve"] == []


def test_the_command_compares_in_processes_of_its_own(asked, tiny_overrides, tmp_path, capsys):
    shared = [key for key in tiny_overrides if not key.startswith("seed=")]
    words = [f"output_dir={tmp_path / 'out'}", *shared, *KEYS, "compare.methods=[grpo]", "compare.seeds=[0]"]
    assert compare.main([*words, "compare.workers=1", "iterations=1"]) == 0
    printed = capsys.readouterr().out
    assert "| grpo | " in printed
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (result["cores"], result["workers"], len(result["runs"])) == (len(os.sched_getaffinity(0)), 1, 1)


# ---------------------------------------------------------------------- what the table says


ORPHAN = """
import multiprocessing, sys, time
from engine.comparing import work
def worker():
    work.end_with_parent()
    print("started", flush=True)
    time.sleep(300)
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=worker)
    process.start()
    print(process.pid, flush=True)
    process.join()
"""


def test_workers_end_with_a_command_that_is_killed(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    command = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(command.stdout.readline())
    assert command.stdout.readline() == "started\n"
    command.kill()
    try:
        assert command.communicate(timeout=60) == ("", None)  # the end of what nobody holds open any more
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def finished(method: str, seed: int, fd: float, flops: float, budget: float = 1.0) -> dict:
    student = dict.fromkeys(("recall", "precision", "density", "coverage", "paired_cosine"), 0.5)
    passes = {"student_forward": 1000, "student_backward": 500, "teacher": 2000}
    return {
        "method": method, "seed": seed, "budget": budget, "iteration": 40, "flops": flops * 1e12, "passes": passes,
        "student": {**student, "fd": fd, "class_accuracy": None}, "reward": 0.9, "seconds": 8.0, "peak_bytes": 2e9,
    }  # fmt: skip


def test_a_row_is_the_mean_and_deviation_over_seeds():
    table = rows([finished("a", 0, 1.0, 2.0), finished("b", 0, 3.0, 2.0), finished("a", 1, 2.0, 2.0)])
    assert [(row["method"], row["seeds"]) for row in table] == [("a", [0, 1]), ("b", [0])]
    assert table[0]["mean"]["fd"] == 1.5
    assert table[0]["std"]["fd"] == pytest.approx(statistics.stdev([1.0, 2.0]))
    assert table[1]["std"]["fd"] is None
    assert table[0]["mean"]["kilo_passes"] == 4.0  # a backward pass costs two forward ones
    assert table[0]["mean"]["class_accuracy"] is None
    assert set(table[0]["mean"]) == set(COLUMNS)


def test_the_terms_of_a_reward_have_columns_of_their_own():
    runs = [
        finished("a", seed, 1.0, 2.0) | {"reward_terms": {"pixel": 0.5, "jpeg": jpeg}}
        for seed, jpeg in enumerate((-2, -4))
    ]
    table = rows(runs)
    assert (table[0]["mean"]["reward: jpeg"], table[0]["mean"]["reward: pixel"]) == (-3.0, 0.5)
    hold_to_budget(table, "a")
    header, _, row = (line.split(" | ") for line in markdown({"teacher": {}, "rows": table}).splitlines())
    assert row[header.index("reward: jpeg")] == "-3.0000 ± 1.4142"


def test_a_row_off_the_budget_is_marked_with_what_would_meet_it():
    runs = [finished("a", 0, 1.0, 2.0), finished("b", 0, 1.0, 2.09), finished("c", 0, 1.0, 4.0)]
    table = rows([*runs, finished("c", 0, 1.0, 8.0, budget=4.0), finished("a", 0, 1.0, 8.1, budget=4.0)])
    assert hold_to_budget(table, "a") == [
        "c took 200% of a's operations in 40 iterations; about 20 would meet the budget"
    ]
    text = markdown({"teacher": {}, "rows": table})
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
        "a, 1 x", "b, 1 x", "c, 1 x (off budget)", "c, 4 x", "a, 4 x",
    ]  # fmt: skip
    assert "class accuracy" not in text
    assert "| 1.000 |" in text


def test_without_the_first_method_there_is_no_budget():
    table = rows([finished("b", 0, 1.0, 2.0)])
    assert hold_to_budget(table, "a") == ["a has no finished run, so nothing says what the budget is"]
    assert table[0]["budget_share"] is None
