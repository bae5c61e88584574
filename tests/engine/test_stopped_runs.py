"""What goes wrong while a run is going ends it with one line that says where, and with nothing that looks finished."""

import json

import pytest
import torch

import engine.train
from engine.models.denoiser import Denoiser

pytestmark = pytest.mark.usefixtures("quick_finish")


@pytest.fixture
def stopped(tmp_path, tiny_overrides, capsys):
    """`stopped(*arguments, says=parts)`: a run must stop in an iteration with one line of these parts, and nothing that
    it leaves may look finished."""

    def run(*arguments: str, says: tuple[str, ...]) -> None:
        code = engine.train.main([f"output_dir={tmp_path / 'out'}", *tiny_overrides, *arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(lines) == 1
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left & {"student", "summary.json", "samples.png"} == set()
        assert left >= {"config.yaml", "metrics.jsonl"}
        missing = [part for part in says if part not in lines[0]]
        assert not missing, f"{missing} not in: {lines[0]}"

    return run


def after(calls: int, usual, broken):
    """`usual` for a number of calls, then what `broken` makes of its result."""
    count = 0

    def function(*arguments, **keywords):
        nonlocal count
        count += 1
        result = usual(*arguments, **keywords)
        return broken(result) if count > calls else result

    return function


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_reward_that_is_not_finite_stops_the_run(stopped, monkeypatch, value):
    from engine.rl.rewards import composite

    broken = after(1, composite.pixel_reward, lambda reward: reward.index_fill(0, torch.tensor([3]), value))
    monkeypatch.setattr(composite, "pixel_reward", broken)
    stopped(
        "reward.terms={pixel: 1}",
        "evaluation.every=0",
        says=("iteration 2:", "pixel is not finite for 1 of 16", "optimizer.lr", "metrics.jsonl"),
    )


def test_a_held_out_reward_that_is_not_finite_stops_the_run(stopped, monkeypatch):
    from engine.rl.rewards import composite

    monkeypatch.setattr(composite, "pixel_reward", after(1, composite.pixel_reward, lambda reward: reward * torch.nan))
    stopped(
        "reward.terms={pixel: 1}",
        says=("iteration 1, on held-out conditions:", "pixel is not finite for 8 of 8", "optimizer.lr"),
    )


def test_a_loss_that_is_not_finite_stops_the_run(stopped, monkeypatch, tmp_path):
    from engine.objectives import policy_gradient

    broken = after(5, policy_gradient.pair_loss, lambda result: result._replace(loss=result.loss * torch.nan))
    monkeypatch.setattr(policy_gradient, "pair_loss", broken)
    # two updates of a micro-batch of 16 pairs: the sixth micro-batch is in iteration 3
    stopped("iterations=4", says=("iteration 3:", "loss is nan", "nothing was updated with it", "optimizer.lr"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]


def test_an_update_that_disagrees_with_the_rollout_stops_the_run(stopped, monkeypatch):
    predict = Denoiser.predict

    def inexact(self, *arguments, **keywords):
        prediction, unconditional = predict(self, *arguments, **keywords)
        if torch.is_grad_enabled():
            prediction = prediction + 0.01 * torch.randn_like(prediction)
        return prediction, unconditional

    monkeypatch.setattr(Denoiser, "predict", inexact)
    stopped(
        "train.ratio_tolerance=1e-5",
        says=("iteration 1:", "|ratio - 1|", "train.ratio_tolerance=1e-05", "Raise the tolerance only"),
    )


def test_a_first_rollout_that_cannot_be_scored_again_stops_the_run_before_any_update(stopped, monkeypatch):
    from engine.objectives import policy_gradient

    monkeypatch.setattr(policy_gradient, "first_pass_error", lambda *arguments, **keywords: float("inf"))
    monkeypatch.setattr(policy_gradient, "pair_loss", lambda *arguments, **keywords: pytest.fail("an update was made"))
    stopped("train.ratio_tolerance=0.5", says=("iteration 1:", "is inf", "train.ratio_tolerance=0.5"))


def test_a_tolerance_that_was_raised_lets_an_inexact_network_train(tmp_path, tiny_config, monkeypatch):
    from engine.objectives import policy_gradient

    monkeypatch.setattr(policy_gradient, "first_pass_error", lambda *arguments, **keywords: 0.1)
    engine.distill(tiny_config(tmp_path / "run", "train.ratio_tolerance=0.2", "iterations=1"))
