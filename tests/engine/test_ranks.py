"""Several ranks: the same run as on one, to rounding, and the collectives that make it so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engine
from engine import preflight, ranks
from engine.errors import EngineError
from engine.roles import load_roles
from engine.run_directory import read_metrics

TRAIN = Path(engine.__file__).parent / "train.py"
CORES = len(os.sched_getaffinity(0))
FIXED = (
    "rollout.conditions=4",
    "rollout.group_size=4",
    "policy.window=null",
    "policy.eta=1",
    "advantage.clip=5",
    "objective.clip_range=1e-2",
    "objective.step_weights=none",
    "optimizer.eps=1e-8",
    "optimizer.weight_decay=0",
    "optimizer.max_grad_norm=1",
    "optimizer.lr=1e-4",
    "optimizer.schedule=constant",
    "ema.decay=0.9",
    "train.micro_batch=6",
    "train.ratio_tolerance=1e-3",
    "evaluation.held_out=9",
    "evaluation.every=2",
    "iterations=2",
)


def by_the_launcher(launch, arguments: list[str], cwd: Path) -> None:
    launcher, port = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"], launch.free_port()
    run = subprocess.run(
        [*launcher, "--master_port", str(port), str(TRAIN), *arguments],
        cwd=cwd,
        env=launch.clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))  # memory that would stay when the run is over


def by_environment(launch, arguments: list[str], cwd: Path) -> None:
    """As other launchers start ranks: nothing but variables."""
    processes = launch.start_ranks([[str(TRAIN), *arguments]] * 2, cwd)
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][1][-4000:] + said[1][1][-4000:]


JOINED = (
    "consistency", "diff_instruct", "dmd2", "draft", "flash_dmd", "progressive", "regression", "vardiu",
)  # fmt: skip
ALL = (
    "zero.stage=2",
    "objective.kind=grpo",
    f"objective.joined={{{', '.join(f'{kind}: 1' for kind in JOINED)}}}",
    *(f"objective.{kind}.critic.warmup=0" for kind in ("diff_instruct", "dmd2", "flash_dmd")),
    "reward.terms={pixel: 1}",
    "train.batch_size=8",
    "train.micro_batch=4",
)


@pytest.mark.parametrize(
    ("run", "overrides"),
    [
        (by_the_launcher, ("zero.stage=0", "objective.kind=grpo", "advantage.scale=group_std")),
        (by_environment, ("zero.stage=2", "objective.kind=ppo", "advantage.scale=global_std")),
        (by_environment, ALL),
    ],
    ids=["launcher, stage 0, grpo", "environment, stage 2, ppo", "environment, stage 2, all objectives together"],
)
def test_two_ranks_give_the_metrics_of_one(tiny_overrides, tmp_path, launch, run, overrides):
    overrides = [*tiny_overrides, *FIXED, *overrides]
    engine.distill(engine.load_config({}, [*overrides, f"output_dir={tmp_path / 'one'}"]))
    run(launch, [*overrides, f"output_dir={tmp_path / 'two'}", "train.threads=null"], tmp_path)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for alone, together in zip(one, two, strict=True):
        assert set(alone) == set(together)
        for name, value in alone.items():
            if name.startswith("time/"):
                continue
            if name == "passes/student_forward" and "loss/dmd2" in alone:
                # more by the calls that a rank makes for company, without a row to walk
                assert value <= together[name] <= 1.1 * value
            elif name.startswith("passes/") or name in ("iteration", "lr"):
                assert together[name] == value, name
            elif name == "ratio/first_pass_error":
                assert together[name] < 1e-4
            else:
                # seen, from the rounding of other batch sizes: rewards 7e-6 relative, the norm 9e-6, the loss 5e-7
                absolute = 5e-6 if name in ("loss/loss", "loss/grpo") else 1e-7
                assert together[name] == pytest.approx(value, rel=3e-5, abs=absolute), name
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["threads_per_rank"] == max(1, CORES // 2)


# the collectives


def test_shares_are_contiguous_cover_everything_and_differ_by_one_at_most(monkeypatch):
    for world_size in (1, 2, 3, 7):
        monkeypatch.setattr(ranks, "world_size", lambda size=world_size: size)
        for count in range(20):
            parts = []
            for rank in range(world_size):
                monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
                parts.append(list(range(count))[ranks.share(count)])
            assert [item for part in parts for item in part] == list(range(count))
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert count % world_size or len(set(sizes)) == 1


def test_more_ranks_than_held_out_conditions_are_refused(tiny_config, tmp_path):
    config = tiny_config(tmp_path, "rollout.conditions=4", "evaluation.held_out=3")
    with pytest.raises(EngineError, match=r"evaluation\.held_out=3 is fewer than the 4 ranks"):
        preflight.check(config, load_roles(config), 4)


def test_one_rank_alone_gathers_and_broadcasts_what_it_has():
    ranks.start(1)
    tensor = torch.arange(6.0).view(3, 2)
    assert ranks.world_size() == 1
    assert ranks.is_first()
    assert torch.equal(ranks.gather(tensor), tensor)
    assert ranks.broadcast({"a": 1}) == {"a": 1}
    assert ranks.share(5) == slice(0, 5)


TALK = """
import json, sys, torch
from engine import ranks

given = json.loads(sys.argv[1])
ranks.start(given)
r = ranks.rank()
print(json.dumps({
    "rank": r,
    "rows": ranks.gather(torch.arange(2 * (r + 1), dtype=torch.float64).view(-1, 2) + 10 * r).tolist(),
    "nothing of rank 0": ranks.gather(torch.ones(r, 1)).tolist(),
    "dtype": str(ranks.gather(torch.ones(1, dtype=torch.int64)).dtype),
    "broadcast": ranks.broadcast({"from": r}),
    "share": [ranks.share(5).start, ranks.share(5).stop],
    "first": ranks.is_first(),
    "threads": torch.get_num_threads(),
}))
"""


def test_two_ranks_gather_rows_of_different_counts_in_the_order_of_ranks(tmp_path, launch):
    processes = launch.start_ranks([["-c", TALK, "null"], ["-c", TALK, "3"]], tmp_path)
    said = [json.loads(process.communicate(timeout=120)[0].strip().splitlines()[-1]) for process in processes]
    for rank, word in enumerate(said):
        assert word["rank"] == rank
        assert word["rows"] == [[0, 1], [10, 11], [12, 13]]  # one row of rank 0, then two of rank 1
        assert word["nothing of rank 0"] == [[1.0]]
        assert word["dtype"] == "torch.int64"
        assert word["broadcast"] == {"from": 0}
        assert word["first"] == (rank == 0)
    assert [word["share"] for word in said] == [[0, 2], [2, 5]]
    assert said[0]["threads"] == max(1, CORES // 2)  # the cores over the ranks of this machine
    assert said[1]["threads"] == 3  # as asked
