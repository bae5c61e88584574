"""One run of a text pipeline with everything on: several rewards, parts, standardisation, encoders, DPM-Solver++."""

import json

import pytest

import engine
from engine.evaluate import evaluate_run
from engine.prompts import read_prompts, split
from engine.run_directory import read_metrics

WORDS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "house", "tree")]


@pytest.fixture(scope="module")
def run(tiny_pipeline, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"caption": words}) + "\n" for words in [*WORDS, WORDS[0]])
    )
    config = {
        "output_dir": str(folder / "run"),
        "iterations": 2,
        "teacher": {"path": str(tiny_pipeline("sd")), "steps": 4, "guidance": 3.0},
        "student": {"steps": 3, "guidance": 2.0},
        "lora": {"rank": 2},
        "prompts": {"path": str(folder / "prompts.jsonl"), "held_out": 0.6, "negative": "the house"},
        "rollout": {"conditions": 3, "group_size": 2, "pool": 4, "chunks": 3, "batch_size": 2},
        "reward": {
            "terms": {
                "clip": {"path": str(clip), "batch_size": 2},
                "words": {"kind": "clip_text", "path": str(clip), "weight": 0.5},
                "jpeg": {"weight": 0.1},
            },
            "standardize": True,
        },
        "vae": {"slicing": True, "batch_size": 3},
        "objective": {"kl_coef": 0.1},
        "model": {"gradient_checkpointing": True},
        "optimizer": {"kind": "adamw8bit"},
        "train": {"micro_batch": 2, "threads": 1},
        "evaluation": {
            "every": 1,
            "held_out": 2,
            "samples": 100,
            "encoders": {"clip": {"kind": "clip", "path": str(clip)}},
            "dpm": True,
        },
        "logging": {"tensorboard": False},
    }
    return engine.distill(config)


def test_each_term_is_logged_with_its_spread_and_no_total_is_standardised(run):
    for row in read_metrics(run.output_dir / "metrics.jsonl"):
        for name in ("clip", "words", "jpeg"):
            assert row[f"reward/{name}_std"] >= 0
        parts = row["reward/clip"] + 0.5 * row["reward/words"] + 0.1 * row["reward/jpeg"]
        assert row["reward/mean"] == pytest.approx(parts, rel=1e-6)
        assert row["ratio/first_pass_error"] < 1e-3
        assert row["grad_norm"] > 0


def test_the_reference_of_adapters_is_the_network_without_them(run):
    first, second = read_metrics(run.output_dir / "metrics.jsonl")
    assert first["loss/kl"] == 0  # B starts at 0, so the adapters change nothing yet
    assert second["loss/kl"] > 0


def test_prompts_are_encoded_once_and_those_that_are_held_out_are_not_trained_on(run):
    summary = run.metrics
    parts = split(read_prompts(run.output_dir.parent / "prompts.jsonl"), 0.6)
    needed = sum(min(size, len(parts[name])) for name, size in (("train", 4), ("held_out", 2), ("evaluation", 100)))
    assert len(list((run.output_dir / "prompt_cache").rglob("*.safetensors"))) == needed + 1  # the negative prompt
    assert summary["passes"]["teacher"] <= 4 * 4 * 2
    for row in ("teacher", "teacher_few_steps", "teacher_few_steps_dpm", "student"):
        assert {"fd", "kid", "clip_score", "paired_cosine"} <= set(summary[row])
    assert (run.output_dir / "samples.png").stat().st_size > 1000


def test_a_finished_run_is_evaluated_again_with_the_same_figures(run):
    again = evaluate_run(run.output_dir, [], None)
    for key in ("fd", "kid", "clip_score"):
        assert again["by_steps"][0]["student"][key] == pytest.approx(run.metrics["student"][key], rel=1e-3, abs=1e-5)
