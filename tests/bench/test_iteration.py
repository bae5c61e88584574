"""bench.iteration: that the loops are what they are called, do equal work on equal inputs, and are counted right."""

import dataclasses
import json

import pytest
import torch

from bench.iteration import __main__ as command
from bench.iteration import measure, problems, summary
from bench.iteration.plain import RECIPES, Ddim, PlainLoop, fp32_copy, images, log_prob
from engine import preflight, ranks
from engine.models.digits import TEACHER_DIR
from engine.rl.losses import pair_loss

SIZES = {
    "iterations": 5,
    "teacher": {"steps": 6},
    "student": {"steps": 4},
    "rollout": {"conditions": 2, "group_size": 4, "pool": 6},
    "reward": {"terms": {"pixel": 1.0}},
    "evaluation": {"held_out": 8},
    "train": {"micro_batch": 8, "ratio_tolerance": 1e-2},
    "optimizer": {"lr": 1e-4},
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "num_layers": 1, "norm_num_groups": 2}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 12,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
TINY_DIT = problems.Problem(lambda: problems.dit(**DIT, sample_size=8, num_embeds_ada_norm=10), (1, 8, 8), 10, SIZES)
TINY_TEXT = problems.Problem(lambda: problems.text_unet(3, **UNET), (4, 8, 8), 3, SIZES)


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    ranks.start(1)


def teacher_of(problem, precision="fp32"):
    return problem.teacher(torch.device("cpu"), precision)


def plain(name, problem, teacher, **overrides):
    config, student = problem.config(0, **overrides), fp32_copy(teacher)
    reward = preflight.check(config, measure.roles_of(teacher, student), 1)
    return PlainLoop(RECIPES[name], config, teacher, student, reward)


@pytest.mark.parametrize("problem", [TINY_DIT, TINY_TEXT], ids=["dit", "text_unet"])
def test_passes_are_as_predicted_in_every_loop(problem):
    records = measure.train(problem, measure.LOOPS, 0, teacher_of(problem), None)
    counted = {name: record.passes for name, record in records.items()}
    assert counted == {name: measure.predicted_passes(name, problem.config(0)) for name in measure.LOOPS}


def test_a_sample_of_the_reference_recipe_costs_67_passes_at_50_and_5_steps():
    config = problems.PROBLEMS["cpu"]["digits_unet"].config(0)
    passes = measure.predicted_passes("reference_recipe", config)
    samples = config.iterations * config.rollout.conditions * config.rollout.group_size
    assert config.rollout.group_size == 8
    assert passes["teacher"] == 50 * samples
    assert passes["teacher"] + passes["student_forward"] + 2 * passes["student_backward"] == 67 * samples


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_plain_step_is_the_stock_ddim_step(eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(TEACHER_DIR, subfolder="scheduler")
    scheduler.set_timesteps(5)
    sampler = Ddim(teacher_of(TINY_DIT), 5, torch.device("cpu"))
    x, eps, noise = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(scheduler.timesteps):
        mean, std = sampler.mean_and_std(step, x, eps, eta)
        stock = scheduler.step(eps, timestep, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + std * noise, stock, rtol=1e-4, atol=1e-4)


def test_the_plain_log_prob_is_that_of_a_normal():
    x, mean = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(mean.double(), 0.3).log_prob(x.double()).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x, mean, torch.tensor(0.3)).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_plain_update_has_the_gradient_of_our_loss():
    teacher = teacher_of(TINY_DIT)
    ours = measure.build("ours_all_steps", TINY_DIT, 0, teacher).trainer
    batch, policy, size = ours.collector.draw_conditions(0), ours.objective.policies[0], 4
    trajectory = ours.collector.roll_out(batch, policy)
    advantage = torch.randn(8, generator=torch.Generator().manual_seed(0))
    pairs = torch.arange(len(trajectory.step))
    arguments = {"guidance": 1.0, "clip_range": 0.2, "weights": ours.objective.step_weights}
    student = teacher.with_network(fp32_copy(teacher))  # DeepSpeed's engine allows no backward but its own
    pair_loss(student, policy, trajectory, pairs, batch.condition, advantage, **arguments).loss.backward()

    loop = plain("reference_recipe", TINY_DIT, teacher, optimizer={"lr": 1.0, "max_grad_norm": 1e9})
    loop.optimizer = torch.optim.SGD(loop.student.parameters())
    before = {name: value.detach().clone() for name, value in loop.student.named_parameters()}
    latents = [*trajectory.latents.split(8), trajectory.next_latents[-8:]]
    old = dict(enumerate(trajectory.log_prob.split(8)))
    loop.update(latents, old, batch.indices.repeat_interleave(size), advantage)

    assert sorted(old) == [0, 1, 2]
    moved = torch.cat([(before[name] - value.detach()).flatten() for name, value in loop.student.named_parameters()])
    expected = torch.cat([value.grad.flatten() for value in student.network.parameters()])
    # The plain tables are fp32, as diffusers' are: 1 - alpha has few digits left in the late steps.
    assert (moved - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("name", RECIPES)
def test_all_loops_draw_the_same_conditions_and_targets(name):
    teacher = teacher_of(TINY_DIT)
    ours = measure.build("ours", TINY_DIT, 0, teacher).trainer
    loop = plain(name, TINY_DIT, teacher)
    for iteration in range(3):
        indices = ours.collector.draw_conditions(iteration).indices
        conditions = loop.pool.draw(2, iteration=iteration)
        targets = loop.draw_targets(conditions, conditions.repeat_interleave(4))
        expected = ours.collector.decode(ours.collector.teacher_latents(ours.pool, indices)).repeat_interleave(4, 0)
        torch.testing.assert_close(images(targets), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", measure.LOOPS)
def test_every_loop_starts_at_the_teacher_and_trains(name):
    teacher = teacher_of(TINY_DIT)
    loop = measure.build(name, TINY_DIT, 0, teacher)
    start = teacher.network.state_dict()
    assert all(torch.equal(value, start[key]) for key, value in loop.student.state_dict().items())
    phases = loop.iterate()
    assert set(phases) == set(measure.PHASES)
    moved = max((value.detach() - start[key]).abs().max().item() for key, value in loop.student.named_parameters())
    assert 0 < moved < 3 * 1e-4  # Adam's steps are about the learning rate each


def test_the_loops_run_in_bf16_as_they_do_on_a_gpu():
    low_precision = {
        "precision": "bf16",
        "iterations": 1,
        "rollout": {**SIZES["rollout"], "batch_size": 4},
        "train": {"micro_batch": 4, "ratio_tolerance": 1.0},
    }
    problem = dataclasses.replace(TINY_TEXT, settings={**SIZES, **low_precision})
    teacher = teacher_of(problem, "bf16")
    assert next(teacher.network.parameters()).dtype == torch.bfloat16
    records = measure.train(problem, measure.LOOPS, 0, teacher, lambda student: next(student.parameters()).sum().item())
    assert all(torch.tensor(record.reward).isfinite() for record in records.values())
    assert {name: record.passes for name, record in records.items()} == {
        name: measure.predicted_passes(name, problem.config(0)) for name in measure.LOOPS
    }


def test_a_prompt_changes_what_a_text_network_predicts():
    network = teacher_of(TINY_TEXT).network
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    first, second = (network(x, t, class_labels=torch.tensor([label])) for label in (0, 1))
    assert first.shape == x.shape
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "millions"), [("sd15", 860), ("sdxl", 2567), ("dit_xl", 750)])
def test_gpu_networks_have_the_published_sizes(name, millions):
    # DiT-XL/2 has 675 million in the paper; diffusers gives each block condition embeddings of its own.
    problem = problems.PROBLEMS["cuda"][name]
    with torch.device("meta"):
        network = problem.network()
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == pytest.approx(
        millions, rel=0.01
    )
    assert problem.config(0).iterations % 4 == 0  # every place of the window equally often


def test_the_teachers_own_images_earn_the_highest_reward():
    teacher = teacher_of(TINY_DIT)
    judge = measure.Judge(TINY_DIT.config(0, student={"steps": 6}), teacher)
    assert judge(teacher.network) == 0.0
    assert measure.Judge(TINY_DIT.config(0), teacher)(teacher.network) < 0


def test_peak_memory_counts_what_is_alive_at_once():
    def work():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second * 2  # two of the three are alive

    assert measure._cpu_peak(work) == pytest.approx(2 * 4e6, rel=1e-3)


def test_peak_memory_holds_networks_optimizer_and_gradients():
    teacher = teacher_of(TINY_DIT)
    weights = sum(value.nbytes for value in teacher.network.parameters())
    assert (
        measure.peak_bytes(TINY_DIT, "reference_recipe", teacher) > 5 * weights
    )  # teacher, student, gradient, Adam's two


def record_of(seconds, reward):
    phases = [dict.fromkeys(measure.PHASES, value / 4) for value in seconds]
    passes = {"teacher": 60, "student_forward": 30, "student_backward": 10}
    return measure.Record(seconds, phases, passes, reward)


def test_speed_is_samples_over_the_fastest_seeds_time_of_each_iteration():
    records = [record_of([1.0, 9.0, 1.0, 1.0, 1.0], 0.0), record_of([3.0, 2.0, 1.0, 1.0, 1.0], 0.0)]
    cost = summary.cost("ours", records, TINY_DIT.config(0))
    assert cost["samples_per_second"] == pytest.approx(5 * 8 / 6)
    assert cost["samples_per_second_on_new_conditions"] == pytest.approx(3 * 8 / 4)  # a pool of 6, two an iteration
    assert cost["seconds_per_iteration"]["update"] == pytest.approx(6 / 5 / 4)
    assert cost["passes_per_sample"] == pytest.approx((60 + 30 + 20) / 40)


@pytest.mark.parametrize(
    ("own", "counts"), [([1.0, 1.2, 1.1], True), ([0.5, 0.7, 0.6], False), ([0.5, 1.7, 0.8], True)]
)
def test_speed_counts_only_where_the_reward_is_not_below_the_rivals(own, counts):
    rewards = {name: [1.0, 1.1, 1.2] for name in measure.LOOPS} | {"ours": own}
    assert summary.equal_result(rewards, "ours")["reference"]["speed_counts"] is counts


def test_the_command_writes_the_promised_keys(tmp_path, monkeypatch, capsys):
    short = {**SIZES, "iterations": 2}
    judged = dataclasses.replace(TINY_DIT, settings=short, judged=True, seeds=2)
    other = dataclasses.replace(TINY_DIT, settings=short)
    monkeypatch.setattr(problems, "PROBLEMS", {"cpu": {"first": judged, "second": other}})
    command.main(["--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    for part in (result, result["more_models"]["second"]):
        for name in ("ours", "reference_recipe", "flow_grpo_style"):
            assert {"samples_per_second", "peak_bytes", "passes"} <= set(part[name])
            assert part[name]["passes"] == part[name]["passes_predicted"]
            assert part[name]["peak_bytes"] > 0
        for rival in ("reference", "flow_grpo_style"):
            own, other = part["ours"], part["reference_recipe" if rival == "reference" else rival]
            ratio = own["samples_per_second"] / other["samples_per_second"]
            assert part[f"speedup_over_{rival}"] == pytest.approx(ratio)
    assert len(result["ours"]["held_out_reward"]["by_seed"]) == 2
    assert set(result["equal_result"]["ours"]) == {"reference", "flow_grpo_style", "flow_grpo_fast_style"}
    assert "equal_result" not in result["more_models"]["second"]
    assert capsys.readouterr().out.count("| ours |") == 2


def test_an_unknown_model_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        command.main(["--models", "sd9"])
    assert "sd9" in capsys.readouterr().err
