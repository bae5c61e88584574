"""Running statistics of terms against those of all their values at once."""

import json

import pytest
import torch

from engine.rl.rewards import RewardError, Standardizer, make_reward


def batches(offset=0.0):
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": offset + torch.randn(n, generator=generator), "b": -50 + 9 * torch.rand(n, generator=generator)}
        for n in (7, 1, 12, 40)
    ]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_running_statistics_are_those_of_all_values(offset):
    standardizer, parts = Standardizer({"a": 1.0, "b": 1.0}), batches(offset)
    for part in parts:
        standardizer.update(part)
    assert standardizer.count == 60
    for name, (mean, std) in standardizer.statistics().items():
        values = torch.cat([part[name] for part in parts]).double()
        assert mean == pytest.approx(float(values.mean()), rel=1e-12)
        assert std == pytest.approx(float(values.std(unbiased=False)), rel=1e-9)


def test_the_total_weighs_deviations_in_units_of_their_spread():
    standardizer, parts = Standardizer({"a": 0.5, "b": -2.0}), batches()
    for part in parts:
        standardizer.update(part)
    everything = {name: torch.cat([part[name] for part in parts]) for name in ("a", "b")}
    total = standardizer.total(everything)
    units = [(v.double() - v.double().mean()) / v.double().std(unbiased=False) for v in everything.values()]
    torch.testing.assert_close(total.double(), 0.5 * units[0] - 2 * units[1], rtol=1e-5, atol=1e-5)
    assert total.dtype == torch.float32
    # other samples are measured by the same statistics
    torch.testing.assert_close(standardizer.total({k: v[:5] for k, v in everything.items()}), total[:5])


def test_scale_and_offset_of_a_term_do_not_matter():
    plain, scaled = Standardizer({"a": 1.0, "b": 1.0}), Standardizer({"a": 1.0, "b": 1.0})
    part = batches()[3]
    other = {"a": 1000 * part["a"] + 7, "b": part["b"]}
    plain.update(part)
    scaled.update(other)
    torch.testing.assert_close(plain.total(part), scaled.total(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_a_term_without_spread_counts_for_nothing(value):
    standardizer = Standardizer({"a": 1.0, "b": 3.0})
    constant = torch.full((40,), value)
    constant[::2] = torch.nextafter(constant[::2], torch.tensor(1e9))  # rounding is no spread
    part = batches()[3] | {"b": constant if value else torch.zeros(40)}
    standardizer.update(part)
    alone = Standardizer({"a": 1.0})
    alone.update(part)
    assert torch.equal(standardizer.total(part), alone.total(part))


def test_a_checkpoint_goes_on_exactly():
    first, parts = Standardizer({"a": 1.0, "b": 1.0}), batches()
    first.update(parts[0])
    second = Standardizer({"a": 1.0, "b": 1.0})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for part in parts[1:]:
        first.update(part)
        second.update(part)
    assert torch.equal(first.total(parts[2]), second.total(parts[2]))
    assert first.state_dict() == second.state_dict()


def test_a_checkpoint_is_a_copy():
    standardizer, parts = Standardizer({"a": 1.0, "b": 1.0}), batches()
    standardizer.update(parts[0])
    state = standardizer.state_dict()
    before = json.dumps(state)
    standardizer.update(parts[2])
    assert json.dumps(state) == before


def test_statistics_that_do_not_exist_are_refused():
    standardizer = Standardizer({"a": 1.0})
    with pytest.raises(RewardError, match=r"update the standardizer with a batch"):
        standardizer.total({"a": torch.zeros(2)})
    with pytest.raises(RewardError, match=r"of the terms b, c, and this run has a"):
        standardizer.load_state_dict(Standardizer({"c": 1.0, "b": 2.0}).state_dict())


def test_gradients_pass_through_the_total():
    standardizer, part = Standardizer({"a": 2.0}), batches()[3]
    standardizer.update(part)
    values = part["a"].clone().requires_grad_()
    standardizer.total({"a": values}).sum().backward()
    std = standardizer.statistics()["a"][1]
    torch.testing.assert_close(values.grad, torch.full((40,), 2 / std))


def test_a_reward_has_statistics_on_demand_and_its_own_total_is_the_plain_sum():
    images, targets = torch.rand(4, 3, 8, 8), torch.rand(2, 3, 8, 8)
    plain = make_reward({"pixel": 2.0, "jpeg": 1.0}, device="cpu")
    standardized = make_reward({"pixel": 2.0, "jpeg": 1.0}, device="cpu", standardize=True)
    assert plain.standardizer is None
    assert standardized.standardizer.weights == {"pixel": 2.0, "jpeg": 1.0}
    assert torch.equal(plain(images, targets, {})[0], standardized(images, targets, {})[0])
