"""Conditions: which are drawn when, and the noise that belongs to each."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.conditions import ConditionPool, noise, seed_of
from engine.sources import Classes

SHAPE = (1, 4, 4)


def pool(size: int, *, split: str = "train", seed: int = 0, classes: int = 10) -> ConditionPool:
    return ConditionPool(split, seed, size, Classes(classes), SHAPE)


# noise


def test_splits_and_seeds_share_no_noise():
    pools = [
        pool(40, split=split, seed=seed)
        for split in ("train", "held_out", "evaluation", "evaluation reference")
        for seed in (0, 1)
    ]
    rows = torch.cat([p.initial_noise(torch.arange(40)) for p in pools]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    # nor the same noise in another order or of another sign: independent rows are nearly orthogonal
    cosine = torch.nn.functional.normalize(torch.cat([rows[:, :8], rows[:, 8:]]), dim=1)
    assert (cosine @ cosine.T - torch.eye(len(cosine))).abs().max() < 0.9999
    assert len({p.key(3) for p in pools}) == len(pools)


def test_noise_is_standard_normal():
    rows = pool(2000).initial_noise(torch.arange(2000))
    assert rows.mean().abs() < 0.03  # 32,000 numbers: five standard errors of the mean are 0.028
    assert (rows.std() - 1).abs() < 0.02
    assert (rows.flatten(1)[:-1] * rows.flatten(1)[1:]).mean().abs() < 0.03  # one row says nothing of the next


def test_noise_does_not_depend_on_how_it_is_asked_for():
    ours, indices = pool(50), torch.tensor([7, 3, 49, 0])
    together = ours.initial_noise(indices)
    for row, index in enumerate(indices):
        assert torch.equal(ours.initial_noise(index[None])[0], together[row])
    torch.manual_seed(5)
    torch.randn(3)
    assert torch.equal(ours.initial_noise(indices), together)
    assert torch.equal(pool(5000).initial_noise(indices), together)  # a longer pool begins as a shorter one


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    pool(5).initial_noise(torch.arange(5))
    pool(5).draw(3, iteration=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_depend_on_every_part_and_on_their_order():
    parts = [
        ("step", 0, 1, 2, 3),
        ("step", 0, 1, 3, 2),
        ("step", 0, 12, 3),
        ("step", 0, 1, 23),
        ("initial", 0, 1, 2, 3),
        ("step", 1, 1, 2, 3),
    ]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of("x", i) < 2**63 for i in range(200))
    assert torch.equal(noise([2**63 - 1], SHAPE), noise([2**63 - 1], SHAPE))


# classes


@pytest.mark.parametrize(("size", "classes"), [(40, 10), (47, 10), (7, 10), (64, 3)])
def test_classes_are_balanced(size, classes):
    labels = pool(size, classes=classes).condition(torch.arange(size))["class_labels"]
    counts = torch.bincount(labels, minlength=classes)
    assert labels.dtype == torch.int64
    assert counts.max() - counts.min() <= 1
    assert len(counts) == classes


# draws


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.data())
def test_a_draw_is_of_different_indices_at_any_iteration(size, data):
    count = data.draw(st.integers(1, size))
    iteration = data.draw(st.integers(0, 10**6))
    drawn = pool(size).draw(count, iteration=iteration)
    assert drawn.dtype == torch.int64
    assert len(drawn) == count
    assert len(set(drawn.tolist())) == count
    assert set(drawn.tolist()) <= set(range(size))
    assert torch.equal(drawn, pool(size).draw(count, iteration=iteration))


@pytest.mark.parametrize(("size", "count"), [(12, 4), (12, 12), (5, 1)])
def test_every_index_is_drawn_once_per_pass_through_the_pool(size, count):
    ours = pool(size)
    passes = [
        torch.cat([ours.draw(count, iteration=first + i) for i in range(size // count)]).tolist()
        for first in range(0, 4 * size // count, size // count)
    ]
    for drawn in passes:
        assert sorted(drawn) == list(range(size))
    assert len({tuple(drawn) for drawn in passes}) == (1 if size == 1 else len(passes))  # each in an order of its own


@pytest.mark.parametrize(("size", "count"), [(8, 3), (10, 7), (9, 8)])
def test_every_index_is_drawn_about_equally_often_where_a_draw_does_not_divide_the_pool(size, count):
    iterations = 400
    counts = Counter(i for k in range(iterations) for i in pool(size).draw(count, iteration=k).tolist())
    expected = iterations * count / size
    assert all(abs(counts[i] - expected) < 0.1 * expected for i in range(size))


def test_draws_of_another_seed_are_another_order():
    assert pool(50).draw(50, iteration=0).tolist() != pool(50, seed=1).draw(50, iteration=0).tolist()
