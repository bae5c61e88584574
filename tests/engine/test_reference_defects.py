"""Each defect of the reference implementation, and of its peers, shown to be absent here.

Numbered as in our list of them. Where another test is the proof, it stands here by name:

1. Ratios that do not start at 1 under guidance: tests/rl/test_rollout.py,
   test_ratio_is_one_before_the_first_update.
2. A divergence without gradient, by a softmax over time: tests/rl/test_losses.py,
   test_gradient_is_that_of_the_published_formula_in_float64.
8. Optimizer steps lost by mis-set accumulation: tests/engine/test_zero.py,
   test_the_number_of_optimizer_steps_is_that_asked_for_whatever_the_micro_batch.
   A flag for 8-bit Adam that nothing reads: the same, test_adamw8bit_trains_with_states_of_8_bits.
9. Held-out conditions from the training pool: tests/engine/test_conditions.py, test_splits_and_seeds_share_no_noise.
   A Frechet distance over 3, coverage by the nearest ball only: tests/engine/test_metrics.py.
10. The last checkpoint instead of the best: tests/engine/test_trainer.py, test_the_best_student_is_kept_not_the_last.

Peers. Log-probs of tensors that are rounded afterwards: tests/rl/test_rollout.py,
   test_log_prob_is_of_the_rounded_sample_even_where_rounding_is_larger_than_the_noise.
   A crash where all advantages are zero: tests/engine/test_trainer.py,
   test_equal_rewards_leave_the_student_as_it_was.
   A resumed run that is another one: the tests of checkpoints.
"""

import copy
import dataclasses
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from engine.models.digits import TEACHER_DIR
from engine.models.pipelines import load_pipeline
from engine.rl import flow_sde_policy
from engine.rl.advantages import grpo_advantage
from engine.rl.losses import pair_loss
from engine.rl.rollout import rollout


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_1_negative_advantages_have_the_whole_gradient_under_guidance(guidance):
    """The reference's ratios of 0.02 lay outside its clip range, where what should be unlearned has no gradient."""
    denoiser = load_pipeline(TEACHER_DIR).denoiser
    policy = flow_sde_policy([1.0, 0.7, 0.4, 0.0], noise_level=0.7)
    labels = torch.tensor([1, 1, 8, 8])
    generator = torch.Generator().manual_seed(0)
    trajectory = rollout(
        denoiser,
        policy,
        torch.randn(4, 1, 8, 8, generator=generator),
        {"class_labels": labels},
        guidance=guidance,
        step_noise=lambda step: torch.randn(4, 1, 8, 8, generator=generator),
    )
    gradients = []
    for sign in (1.0, -1.0):
        student = denoiser.with_network(copy.deepcopy(denoiser.network))
        result = pair_loss(
            student,
            policy,
            trajectory,
            torch.arange(12),
            {"class_labels": labels},
            torch.full((4,), sign),
            guidance=guidance,
            clip_range=1e-4,
        )
        result.loss.backward()
        assert result.clip_fraction == 0
        gradients.append(torch.cat([p.grad.flatten() for p in student.network.parameters()]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], -gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_3_groups_hold_one_condition_so_a_reward_of_the_condition_alone_teaches_nothing(start):
    """The reference's groups mixed prompts: easy prompts were reinforced, hard ones unlearned."""

    def reward_of_the_class(images, targets, asked):
        return asked["class_labels"].float() ** 2

    row = start("advantage.scale=none", reward=reward_of_the_class).train_iteration()
    assert row["reward/std"] > 1
    assert row["reward/within_group_std"] == row["advantage/std"] == row["grad_norm"] == 0


def test_3_samples_are_compared_with_the_teachers_image_of_their_own_condition(start):
    trainer = start("reward.terms={pixel: 1}")
    samples = trainer.collector.collect(0, trainer.objective.policies[0])
    latents = trainer.collector.teacher_latents(trainer.pool, samples.batch.indices)
    images, targets = ((x / 2 + 0.5).clamp(0, 1) for x in (samples.trajectory.final, latents))
    expected = [-((images[i] - targets[i // 4]) ** 2).mean().item() for i in range(16)]
    rewards, _ = trainer.objective.rewards(samples)
    assert rewards.tolist() == pytest.approx(expected, rel=1e-5)
    assert trainer.train_iteration()["reward/mean"] == pytest.approx(sum(expected) / 16, rel=1e-5)


@pytest.mark.parametrize("scale", ["global_std", "none"])
def test_3_with_two_samples_a_group_advantages_keep_the_size_of_the_difference(scale):
    advantage = grpo_advantage(torch.tensor([0.0, 0.1, 0.0, 1.0]), 2, scale=scale, clip=None).abs()
    assert advantage[2] == pytest.approx(10 * advantage[0].item(), rel=1e-4)


def test_4_the_divergence_is_from_the_initial_student_not_from_the_rollouts_policy(start):
    trainer = start("objective.kl_coef=0.1", "train.updates=1", "train.micro_batch=32", "optimizer.lr=1e-3")
    rows = [trainer.train_iteration() for _ in range(2)]
    # with one update an iteration every pair is scored by the very policy that drew it
    assert all(row["ratio/first_pass_error"] < 1e-4 for row in rows)
    assert rows[0]["loss/kl"] == 0
    assert rows[1]["loss/kl"] > 1e-3


@pytest.mark.parametrize(("clip_range", "binds"), [("1e-2", True), ("1e6", False)])
def test_4_the_clip_of_the_averaged_log_probs_ratio_binds(start, clip_range, binds):
    high = f"[1, {float(clip_range)}]" if not binds else clip_range
    trainer = start(f"objective.clip_range={high}", "train.updates=2", "train.inner_epochs=2", "optimizer.lr=1e-3")
    assert (trainer.train_iteration()["loss/clip_fraction"] > 0) == binds


def test_5_the_teachers_target_is_the_same_image_every_time(start):
    targets = []
    for seed in range(2):
        trainer = start()  # with an empty cache
        torch.manual_seed(seed)
        assert not bool(trainer.collector.targets.policy.stochastic.any())
        targets.append(trainer.collector.teacher_latents(trainer.pool, torch.tensor([3, 0])))
        assert trainer.account.passes["teacher"] == 2 * 6
    assert torch.equal(targets[0], targets[1])


def test_6_images_darker_than_mid_grey_keep_their_shades():
    decode = load_pipeline(TEACHER_DIR).decode
    shades = torch.linspace(-1, 1, 9).view(1, 1, 3, 3)
    torch.testing.assert_close(decode(shades).flatten(), torch.linspace(0, 1, 9))
    assert decode(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 1]


def test_7_the_encoder_sees_both_sides_alike(start):
    trainer = start("reward.terms={feature: 1}")
    seen = []
    collector, encoder = trainer.collector, trainer.reward.encoder
    collector.reward = dataclasses.replace(
        trainer.reward, encoder=lambda images: seen.append(images) or encoder(images)
    )
    batch = collector.draw_conditions(0)
    latents = collector.teacher_latents(trainer.pool, batch.indices)
    final = collector.roll_out(batch, trainer.objective.policies[0]).final
    collector.score(final, latents, trainer.pool, batch.indices)
    students, teachers = seen
    assert students.dtype == teachers.dtype == torch.float32
    assert students.shape == (16, 1, 8, 8)
    assert teachers.shape == (4, 1, 8, 8)  # each encoded once for its group
    assert all(side.min() >= 0 and side.max() <= 1 for side in seen)
    # the same latents are the same image on both paths
    scores = collector.score(latents.repeat_interleave(4, 0), latents, trainer.pool, batch.indices)
    torch.testing.assert_close(scores["feature"], torch.ones(16, dtype=torch.float64))


def test_8_inner_epochs_are_read(start):
    for epochs in (1, 3):
        row = start(f"train.inner_epochs={epochs}").train_iteration()
        assert row["passes/student_backward"] == epochs * 32


def test_8_a_batch_of_one_sample_trains_without_nan(start):
    sizes = ("rollout.conditions=1", "rollout.group_size=1", "train.updates=1", "train.micro_batch=1")
    trainer = start("objective.kind=ppo", "advantage.scale=global_std", "rollout.pool=1", *sizes)
    rows = [trainer.train_iteration() for _ in range(3)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["grad_norm"] == 0  # there is nothing yet to compare it with


def test_9_evaluation_has_the_guidance_of_training_and_no_noise(start):
    trainer = start("student.guidance=2", "teacher.guidance=2", "evaluation.held_out=8")
    trainer.evaluate_held_out()
    before = trainer.account.passes["evaluation"]
    assert before == 2 * 8 * 6 + 2 * 8 * 3  # the teacher's images, then the student's; both halves of guidance
    trainer.evaluate_held_out()
    assert trainer.account.passes["evaluation"] - before == 2 * 8 * 3


def test_9_evaluation_never_reuses_the_images_of_an_earlier_student(start):
    trainer = start("ema.decay=0", "optimizer.lr=1e-3")
    rewards = [trainer.evaluate_held_out()["reward/held_out_eta0"]]
    for _ in range(2):
        trainer.train_iteration()
        rewards.append(trainer.evaluate_held_out()["reward/held_out_eta0"])
    assert len(set(rewards)) == 3


def test_11_the_teacher_draws_each_condition_once_however_long_the_training(start):
    trainer = start("rollout.pool=8", "rollout.conditions=4", "evaluation.every=0")
    teacher = [trainer.train_iteration()["passes/teacher"] for _ in range(5)]
    assert teacher == [4 * 6, 4 * 6, 0, 0, 0]  # conditions x steps, and two iterations see the whole pool


# peers


def test_peers_divergence_is_scaled_by_the_variance_of_the_transition():
    """flow_grpo divides by 2 q^2, the diffusion, instead of the variance q^2 |D| of the step."""
    denoiser = load_pipeline(TEACHER_DIR).denoiser
    policy = flow_sde_policy([1.0, 0.7, 0.4, 0.0], noise_level=0.7)
    labels = {"class_labels": torch.tensor([2, 5])}
    noise = torch.randn(4, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trajectory = rollout(denoiser, policy, noise[3], labels, step_noise=lambda step: noise[step])
    moved = copy.deepcopy(denoiser.network)
    torch.nn.init.constant_(moved.conv_out.bias, 0.3)
    student, reference = denoiser.with_network(moved), denoiser
    found = pair_loss(
        student,
        policy,
        trajectory,
        torch.arange(6),
        labels,
        torch.zeros(2),
        guidance=1.0,
        clip_range=0.1,
        reference=reference,
        kl_coef=1.0,
    ).kl
    for pair in range(6):
        step, sample = int(trajectory.step[pair]), int(trajectory.sample[pair])
        x, a, b, std = trajectory.latents[pair], policy.a[step], policy.b[step], policy.std[step]
        time = policy.timesteps[step : step + 1].float()
        with torch.no_grad():
            p, q = (
                Normal(
                    a * x + b * d.network(x[None], time, class_labels=labels["class_labels"][sample][None]).sample, std
                )
                for d in (student, reference)
            )
        assert found[pair].item() == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-3)


def test_peers_the_variance_of_nearly_equal_rewards_is_exact():
    """A sum of squares in fp32 is negative or wrong here; two passes in fp64 are not."""
    rewards = 1000 + torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 1.0, 1.0]) * 1e-3
    advantage = grpo_advantage(rewards, 4, scale="global_std", clip=None)
    truth = rewards.double().view(2, 4)
    expected = (truth - truth.mean(1, keepdim=True)) / truth.std(unbiased=False)
    torch.testing.assert_close(advantage.double(), expected.flatten(), rtol=2e-3, atol=1e-6)  # eps is 1e-6 of 1e-3
    assert grpo_advantage(torch.full((8,), 1000.1), 4, scale="global_std", clip=None).tolist() == [0.0] * 8
