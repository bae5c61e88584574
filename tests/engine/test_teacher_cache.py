"""The teacher draws each condition once; a file that does not belong to the question is never an answer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.conditions import ConditionPool
from engine.models.loading import fingerprint
from engine.models.pipelines import load_pipeline
from engine.sources import Classes
from engine.teacher_cache import TeacherCache

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture
def teacher(tiny_teacher):
    return load_pipeline(tiny_teacher).denoiser


@pytest.fixture
def pool(teacher):
    return ConditionPool("train", 0, 12, Classes(teacher.classes), teacher.latent_shape)


@pytest.fixture
def cache(tmp_path, teacher):
    """`cache(...)`: a new object on the same folder."""

    def make(denoiser=teacher, *, steps=STEPS, guidance=1.0, batch_size=None) -> TeacherCache:
        weights = fingerprint(denoiser)
        return TeacherCache(
            tmp_path / "cache", denoiser, weights, steps=steps, guidance=guidance, batch_size=batch_size
        )

    return make


def files(cache: TeacherCache | Path) -> set[Path]:
    folder = cache if isinstance(cache, Path) else cache.folder
    return {path for path in folder.rglob("*") if path.is_file()}


def draw(cache: TeacherCache, pool: ConditionPool, *indices: int) -> torch.Tensor:
    return cache.targets(pool, torch.tensor(indices), CPU)


def test_each_condition_is_drawn_once(cache, pool):
    first = cache()
    drawn = draw(first, pool, 0, 3, 7)
    assert first.passes == 3 * STEPS
    assert torch.equal(draw(first, pool, 7, 0), drawn[[2, 0]])
    assert first.passes == 3 * STEPS
    draw(first, pool, 0, 1, 2, 3)
    assert first.passes == 5 * STEPS
    assert len(files(first)) == 5


def test_a_condition_that_is_asked_for_twice_at_once_is_drawn_once(cache, pool):
    drawing = cache()
    twice = draw(drawing, pool, 3, 5, 3)
    assert drawing.passes == 2 * STEPS
    assert torch.equal(twice[0], twice[2])
    assert torch.equal(twice, draw(cache(), pool, 3, 5, 3))


def test_a_new_process_reads_what_another_has_drawn(cache, pool):
    drawn = draw(cache(), pool, 0, 3, 7)
    second = cache()
    assert torch.equal(draw(second, pool, 0, 3, 7), drawn)
    assert second.passes == 0


def test_guidance_costs_two_passes_a_step(cache, pool):
    guided = cache(guidance=2.0)
    draw(guided, pool, 0, 3, 7)
    assert guided.passes == 3 * STEPS * 2


def test_a_longer_pool_reads_the_files_of_a_shorter_one(cache, pool):
    draw(cache(), pool, 0, 11)
    longer = cache()
    draw(longer, dataclasses.replace(pool, size=500), 0, 11)
    assert longer.passes == 0


def test_batches_change_nothing_but_rounding(tmp_path, cache, pool):
    whole = draw(cache(), pool, *range(7))
    for path in files(cache()):
        path.unlink()
    batched = cache(batch_size=3)
    torch.testing.assert_close(draw(batched, pool, *range(7)), whole, rtol=1e-5, atol=1e-4)
    assert batched.passes == 7 * STEPS


@pytest.mark.parametrize("name", ["conv_in.weight", "conv_out.bias", "class_embedding.weight"])
def test_other_weights_are_another_teacher(cache, pool, teacher, name):
    draw(cache(), pool, 0)
    with torch.no_grad():
        dict(teacher.network.named_parameters())[name].view(-1)[-1] += 1e-4
    changed = cache()
    draw(changed, pool, 0)
    assert changed.passes == STEPS
    assert len(files(changed)) == 2


@pytest.mark.parametrize("change", [{"steps": 5}, {"guidance": 2.0}, {"guidance": 1.0001}])
def test_other_steps_or_guidance_are_another_question(cache, pool, change):
    before = draw(cache(), pool, 0)
    changed = cache(**change)
    after = draw(changed, pool, 0)
    assert changed.passes > 0
    assert not torch.equal(before, after)
    assert len(files(changed)) == 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "held_out"}])
def test_other_noise_is_another_question(cache, pool, change):
    before = draw(cache(), pool, 0)
    other = cache()
    after = draw(other, dataclasses.replace(pool, **change), 0)
    assert other.passes == STEPS
    assert not torch.equal(before, after)


def test_the_same_noise_with_another_class_is_another_question(cache, pool):
    before = draw(cache(), pool, 11)  # class 1 of 10
    other = cache()
    after = draw(other, dataclasses.replace(pool, source=Classes(7)), 11)  # class 4 of 7, from the same noise
    assert other.passes == STEPS
    assert not torch.equal(before, after)


def test_another_schedule_is_another_teacher(cache, pool, teacher):
    draw(cache(), pool, 0)
    schedule = dataclasses.replace(teacher.schedule, alphas_cumprod=teacher.schedule.alphas_cumprod * 0.999)
    other = cache(dataclasses.replace(teacher, schedule=schedule))
    draw(other, pool, 0)
    assert other.passes == STEPS


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("hello")


def of_another_shape(path):
    save_file({"latent": torch.zeros(1, 4, 4)}, path)


def of_another_name(path):
    save_file({"image": load_file(path)["latent"]}, path)


def not_finite(path):
    save_file({"latent": load_file(path)["latent"].fill_(torch.nan)}, path)


@pytest.mark.parametrize("damage", [cut, empty, text, of_another_shape, of_another_name, not_finite])
def test_a_damaged_file_is_drawn_again_and_replaced(cache, pool, damage):
    first = cache()
    drawn = draw(first, pool, 0)
    (path,) = files(first)
    damage(path)
    second = cache()
    assert torch.equal(draw(second, pool, 0), drawn)
    assert second.passes == STEPS
    assert torch.equal(load_file(path)["latent"], drawn[0])
    assert files(second) == {path}


def test_what_a_killed_writer_left_is_not_read(cache, pool):
    first = cache()
    drawn = draw(first, pool, 0)
    (path,) = files(first)
    path.rename(path.with_suffix(".123.tmp"))
    second = cache()
    assert torch.equal(draw(second, pool, 0), drawn)
    assert second.passes == STEPS


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_targets_are_those_of_stock_diffusers(tiny_teacher, cache, pool, stock_ddim, guidance):
    indices = torch.tensor([0, 4, 9, 11])
    targets = cache(guidance=guidance).targets(pool, indices, CPU)
    expected = stock_ddim(tiny_teacher, pool.initial_noise(indices), indices % 10, STEPS, guidance)
    torch.testing.assert_close(targets, expected, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------- in a run


@pytest.mark.usefixtures("quick_finish")
@pytest.mark.parametrize("guidance", [1, 2])
def test_a_run_costs_its_teacher_one_drawing_of_each_condition(tmp_path, tiny_config, guidance):
    config = tiny_config(
        tmp_path / "run", f"teacher.guidance={guidance}", "rollout.pool=9", "rollout.conditions=4", "iterations=4"
    )
    summary = engine.distill(config).metrics
    pool = ConditionPool("train", config.seed, 9, Classes(10), (1, 8, 8))
    drawn = {int(index) for iteration in range(4) for index in pool.draw(4, iteration=iteration)}
    assert len(drawn) == 9
    assert summary["passes"]["teacher"] == len(drawn) * STEPS * guidance
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["passes/teacher"] for row in rows) == summary["passes"]["teacher"]
    assert rows[-1]["passes/teacher"] == 0
    held_out = 8
    assert len(files(tmp_path / "run" / "teacher_cache")) == len(drawn) + held_out


@pytest.mark.usefixtures("quick_finish")
def test_a_run_reads_the_cache_that_another_run_filled(tmp_path, tiny_config):
    cache = f"teacher.cache={tmp_path / 'shared'}"
    first = engine.distill(tiny_config(tmp_path / "first", cache)).metrics
    second = engine.distill(tiny_config(tmp_path / "second", cache)).metrics
    assert first["passes"]["teacher"] == 8 * STEPS
    assert second["passes"]["teacher"] == 0
    assert first["student"] == second["student"]
    assert not (tmp_path / "first" / "teacher_cache").exists()
