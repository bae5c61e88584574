"""How objectives act together: gradients that add up, turns, roles that learn apart, and an exact continuation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import EngineError, load_config, zero
from engine.objectives.contract import Examples, Loss, Objective, Role

DISTILLING = ("train.batch_size=8", "train.micro_batch=8", "train.updates=1")


class Toy(Objective):
    """A critic beside the student, whose losses and calls a test can foretell."""

    kind = "dmd2"

    @staticmethod
    def roles(config):
        def linear(roles):
            torch.manual_seed(0)
            return torch.nn.Linear(64, 1)

        return {"critic": Role(linear, lr=0.5), "copy": Role(linear, lr=None)}

    def __init__(self, context):
        super().__init__(context)
        self.calls = []

    def before_student(self):
        return ("critic", "critic")

    def draw(self, role, number):
        assert not torch.is_grad_enabled()
        self.calls.append((role, number))
        indices = torch.arange(8)
        x = self.context.pool.initial_noise(indices)
        return Examples({"x": x, "t": torch.full((8,), 500)}, self.context.pool.condition(indices))

    def loss(self, role, examples):
        critic = self.context.networks["critic"]
        trained = [p.requires_grad for p in critic.parameters()]
        student = [p.requires_grad for p in self.context.student.network.parameters()]
        assert (all(trained), any(student)) == ((True, False) if role == "critic" else (False, True))
        if role == "critic":
            return Loss((critic(examples["x"].flatten(1)) - 1).square().mean())
        image = self.context.student.guided(examples["x"], examples["t"], examples.condition)
        return Loss(critic(image.flatten(1)).mean(), {"toy/image": image.detach().mean()})

    def stepped(self, role, number):
        self.calls.append((f"{role} stepped", number))


@pytest.fixture
def toy(start, monkeypatch):
    """`toy("key=value", ...)`: a trainer whose objective dmd2 is the toy."""
    import engine.parts

    known = engine.parts.objective_class
    monkeypatch.setattr(engine.parts, "objective_class", lambda kind: Toy if kind == "dmd2" else known(kind))
    return lambda *overrides: start("objective.kind=dmd2", *DISTILLING, *overrides)


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in zero.full_parameters(engine)}


def gradient(trainer) -> torch.Tensor:
    """The student's gradient in the first optimizer step, all parameters in one vector."""
    found = []
    objective = next(iter(trainer.parts.values())).objective
    objective.check = lambda figures: found.append(
        torch.cat([p.grad.flatten() for p in trainer.engine.module.parameters()]).clone()
    )
    trainer.train_iteration()
    return found[0]


def test_joined_objectives_train_on_the_weighted_sum_of_their_gradients(start):
    reward = "reward.terms={pixel: 1}"
    regression = gradient(start("objective.kind=regression", reward, *DISTILLING))
    draft = gradient(start("objective.kind=draft", reward, *DISTILLING))
    both = gradient(start("objective.kind=regression", "objective.joined={draft: 500}", reward, *DISTILLING))
    assert 0.1 < 500 * draft.norm() / regression.norm() < 10
    torch.testing.assert_close(both, regression + 500 * draft, rtol=1e-4, atol=1e-6 * float(regression.norm()))


def test_micro_batches_of_joined_objectives_change_nothing(start):
    kinds = ("objective.kind=regression", "objective.joined={draft: 0.25}", "reward.terms={pixel: 1}")
    whole = gradient(start(*kinds, *DISTILLING))
    parts = gradient(start(*kinds, *DISTILLING, "train.micro_batch=3"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6 * float(whole.norm()))


def test_objectives_take_turns_of_whole_iterations(start):
    trainer = start(
        "objective.kind=grpo", "objective.joined={regression: 0.5}", "objective.turns={grpo: 2, regression: 1}",
        "iterations=4", *DISTILLING,
    )  # fmt: skip
    rows = [trainer.train_iteration() for _ in range(4)]
    assert ["reward/mean" in row for row in rows] == [True, True, False, True]
    assert [row["passes/student_backward"] for row in rows] == [32, 32, 24, 32]  # 16 samples x 2; 8 chains of 3 steps


def test_a_policy_gradient_joined_with_a_distillation_stays_on_policy_and_tells_both_losses(start):
    trainer = start("objective.kind=grpo", "objective.joined={regression: 2}", *DISTILLING)
    row = trainer.train_iteration()
    assert row["ratio/first_pass_error"] < 1e-3
    assert row["loss/loss"] == pytest.approx(row["loss/grpo"] + 2 * row["loss/regression"], rel=1e-5, abs=1e-7)
    assert trainer.worst_ratio_error == row["ratio/first_pass_error"]


def test_roles_are_stepped_in_order_with_numbers_that_never_come_again(toy):
    trainer = toy("train.updates=2")
    trainer.train_iteration()
    trainer.train_iteration()
    drawn = [call for call in trainer.objective.calls if "stepped" not in call[0]]
    expected = []
    for step in range(4):
        expected += [("critic", 2 * step), ("critic", 2 * step + 1), ("student", step)]
    assert drawn == expected
    assert [call[0] for call in trainer.objective.calls[:6]] == ["critic", "critic stepped"] * 2 + [
        "student",
        "student stepped",
    ]


def test_a_role_learns_at_its_own_rate_and_a_gradient_that_flows_through_it_leaves_none(toy):
    trainer = toy("optimizer.lr=1e-3", "optimizer.eps=1e-30", "optimizer.max_grad_norm=1e9")
    critic = trainer.parts["dmd2"].learners["critic"].engine
    before, student = weights(critic), weights(trainer.engine)
    row = trainer.train_iteration()
    after = weights(critic)
    # Adam's step is its learning rate, whatever the gradient; the critic took two of them
    moved = (after["weight"] - before["weight"]).abs().max()
    assert 0.5 <= moved <= 1.001
    largest = max((value - student[name]).abs().max() for name, value in weights(trainer.engine).items())
    assert 0.5e-3 <= largest <= 1.001e-3
    assert all(p.grad is None or not p.grad.any() for p in critic.module.parameters())
    assert {"loss/loss", "loss/critic", "grad_norm/critic", "toy/image"} <= set(row)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_roles_learn_alike_in_every_zero_stage(toy, stage):
    rows = []
    for number in (0, stage):
        trainer = toy(f"zero.stage={number}", "optimizer.eps=1")
        rows.append((trainer.train_iteration(), weights(trainer.parts["dmd2"].learners["critic"].engine)))
    (plain, expected), (staged, found) = rows
    assert staged["loss/loss"] == pytest.approx(plain["loss/loss"], rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_restored_trainer_goes_on_with_its_roles_exactly(toy, tmp_path):
    straight = toy("iterations=2")
    straight.train_iteration()
    expected = straight.train_iteration()
    first = toy("iterations=2")
    first.train_iteration()
    with torch.no_grad():
        first.parts["dmd2"].networks["copy"].weight.fill_(7.0)
    first.save(tmp_path, "teacher")
    second = toy("iterations=2")
    second.restore(tmp_path)
    row = second.train_iteration()
    assert second.parts["dmd2"].networks["copy"].weight.unique().tolist() == [7.0]
    for name in ("loss/loss", "loss/critic", "grad_norm", "toy/image"):
        assert row[name] == expected[name]
    critics = [weights(trainer.parts["dmd2"].learners["critic"].engine) for trainer in (straight, second)]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[0])


def test_a_checkpoint_without_a_role_is_refused(toy, start, tmp_path):
    from shutil import rmtree

    trainer = toy()
    trainer.save(tmp_path, "teacher")
    rmtree(tmp_path / "deepspeed_dmd2_critic")
    with pytest.raises(EngineError, match="has no DeepSpeed state deepspeed_dmd2_critic"):
        toy().restore(tmp_path)


def test_a_critic_loss_that_is_not_finite_stops_the_run(toy, monkeypatch):
    trainer = toy()
    monkeypatch.setattr(
        trainer.objective, "loss", lambda role, examples: Loss(torch.tensor(torch.nan, requires_grad=True))
    )
    with pytest.raises(EngineError, match="iteration 1: the loss of the critic is nan"):
        trainer.train_iteration()


def test_the_networks_that_objectives_bring_are_counted(toy):
    trainer = toy()
    assert {"critic_forward", "critic_backward", "copy"} <= set(trainer.account.passes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.joined={grpo: 1}",), "objective.joined names grpo, which is objective.kind already"),
        (("objective.joined={ppo: 1}",), "one policy gradient is enough"),
        (("objective.turns={grpo: 1, dmd2: 1}",), "must name every objective and no other"),
        (("objective.bands={dmd2: [0.5, 1]}",), "objective.bands names dmd2, which does not act"),
        (("objective.bands={grpo: [0.5, 1]}",), "it acts on whole trajectories"),
        (("objective.joined={dmd2: 1}", "objective.bands={dmd2: [0.6, 0.5]}"), "is empty"),
        (("objective.joined={wgan: 1}",), "objective.joined"),
        (("objective.joined={dmd2: 0}",), "greater than 0"),
    ],
)
def test_objectives_that_cannot_be_joined_are_refused_with_the_reason(overrides, message):
    with pytest.raises(EngineError, match=message.replace(".", r"\.")):
        load_config({}, overrides)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path, start, monkeypatch):
    from engine import preflight

    trainer = start("objective.kind=regression", *DISTILLING)
    config = load_config(trainer.config, ["train.batch_size=9"])
    with pytest.raises(EngineError, match=r"train\.batch_size=9 is not a multiple of the 2 ranks"):
        preflight._sizes(config, trainer.student, 2)
