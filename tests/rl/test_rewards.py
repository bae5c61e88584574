"""Rewards: what each measures, their gradients, and that nonsense is refused instead of trained on."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from engine.models.digits import digits, load_reward_encoder
from engine.rl.rewards import (
    RewardError,
    class_log_prob_reward,
    composite_reward,
    feature_reward,
    pixel_reward,
)


class Encoding(NamedTuple):
    features: Tensor
    logits: Tensor


class Encoder(nn.Module):
    """A random linear encoder that counts its calls."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Parameter(torch.randn(16, 6, generator=generator), requires_grad=False)
        self.logits = nn.Parameter(torch.randn(16, 10, generator=generator), requires_grad=False)
        self.batches = []

    def forward(self, images: Tensor) -> Encoding:
        self.batches.append(len(images))
        flat = images.flatten(1)
        return Encoding(flat @ self.features, flat @ self.logits)


def batch(count: int = 5, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.rand(2, count, 1, 4, 4, generator=generator).to(dtype)
    return images, targets, {"class_labels": torch.arange(count) % 10}


ALL = {"feature": 1.0, "class_log_prob": 0.5, "pixel": -2.0}


def test_feature_is_the_cosine_of_the_two_encodings():
    encoder, (images, targets, condition) = Encoder(), batch()
    a, b = encoder(images).features, encoder(targets).features
    expected = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(feature_reward(encoder)(images, targets, condition), expected)
    torch.testing.assert_close(feature_reward(encoder)(images, images, condition), torch.ones(5))


def test_centring_spreads_cosines_that_saturate():
    class Saturated(Encoder):
        def forward(self, images):
            encoding = super().forward(images)
            return encoding._replace(features=encoding.features + 100)  # as features after a ReLU: one narrow cone

    encoder, (images, targets, condition) = Saturated(), batch(64)
    raw = feature_reward(encoder)(images, targets, condition)
    mean = encoder(targets).features.mean(0)
    centred = feature_reward(encoder, mean=mean)(images, targets, condition)
    assert raw.min() > 0.99
    assert centred.std() > 50 * raw.std()
    composite = composite_reward({"feature": 1.0}, encoder, feature_mean=mean)
    torch.testing.assert_close(composite(images, targets, condition)[0], centred)


def test_class_log_prob_is_that_of_the_label_that_was_asked_for():
    encoder, (images, targets, condition) = Encoder(), batch()
    table = encoder(images).logits.log_softmax(1)
    expected = torch.stack([table[i, label] for i, label in enumerate(condition["class_labels"])])
    torch.testing.assert_close(class_log_prob_reward(encoder)(images, targets, condition), expected)


def test_pixel_is_the_negative_mean_squared_error():
    images, targets, condition = batch()
    expected = torch.stack([-((x - y) ** 2).mean() for x, y in zip(images, targets, strict=True)])
    torch.testing.assert_close(pixel_reward(images, targets, condition), expected)
    assert pixel_reward(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), {}).item() == -1.0


def test_the_composite_is_the_weighted_sum_of_its_terms():
    encoder, inputs = Encoder(), batch()
    total, terms = composite_reward(ALL, encoder)(*inputs)
    assert list(terms) == list(ALL)
    torch.testing.assert_close(terms["feature"], feature_reward(encoder)(*inputs))
    torch.testing.assert_close(terms["class_log_prob"], class_log_prob_reward(encoder)(*inputs))
    torch.testing.assert_close(terms["pixel"], pixel_reward(*inputs))
    torch.testing.assert_close(total, terms["feature"] + 0.5 * terms["class_log_prob"] - 2 * terms["pixel"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rewards_are_fp32_whatever_the_images_are(dtype):
    total, terms = composite_reward(ALL, Encoder())(*batch(dtype=dtype))
    assert {value.dtype for value in (total, *terms.values())} == {torch.float32}
    assert {value.shape for value in (total, *terms.values())} == {(5,)}


def test_the_encoder_runs_once_on_images_and_once_on_targets():
    encoder, inputs = Encoder(), batch()
    composite_reward(ALL, encoder)(*inputs)
    assert encoder.batches == [5, 5]
    encoder.batches.clear()
    composite_reward({"class_log_prob": 1.0}, encoder)(*inputs)
    assert encoder.batches == [5]  # this term reads no target
    encoder.batches.clear()
    composite_reward({"pixel": 1.0}, encoder)(*inputs)
    assert encoder.batches == []


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_images_and_match_finite_differences(name):
    images, targets, condition = batch(2)
    images, targets = images.clamp(0.1, 0.9).requires_grad_(), targets.requires_grad_()
    reward = composite_reward({name: 1.0}, Encoder())
    reward(images, targets, condition)[0].sum().backward()
    assert targets.grad is None  # the teacher's image is a constant
    direction, step = torch.randn_like(images), 1e-2
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, targets, condition)[0].sum() for sign in (1, -1))
    assert float((images.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=2e-2, abs=1e-4)


def test_the_image_itself_as_target_still_has_its_gradient():
    images = batch()[0].requires_grad_()
    total, _ = composite_reward({"feature": 1.0, "pixel": 1.0}, Encoder())(images, images, {})
    total.sum().backward()
    assert images.grad is not None


def test_digit_rewards_prefer_the_same_digit_and_the_right_class():
    images, labels = (part[:200] for part in digits("held_out"))
    images = (images + 1) / 2
    reward = composite_reward({"feature": 1.0, "class_log_prob": 1.0}, load_reward_encoder())
    _, same = reward(images, images, {"class_labels": labels})
    _, other = reward(images, images.roll(1, 0), {"class_labels": (labels + 1) % 10})
    assert same["feature"].mean() > other["feature"].mean() + 0.3
    assert same["class_log_prob"].mean() > -0.5
    assert other["class_log_prob"].mean() < -2


# Errors


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, r"no reward in \{\}; give at least one of feature, class_log_prob, pixel"),
        ({"pixel": 0.0}, r"no reward in \{'pixel': 0.0\}"),
        (
            {"features": 1.0},
            r"no reward 'features'; did you mean 'feature'\? allowed are feature, class_log",
        ),
        ({"clip": 1.0, "pixel": 1.0}, r"no reward 'clip'; .*allowed are feature"),
        ({"pixel": float("nan")}, r"weight of pixel must be a finite number, got nan"),
        ({"pixel": "1"}, r"weight of pixel must be a finite number, got '1'"),
        ({"feature": 1.0}, r"feature reads an encoder, and none was given"),
    ],
)
def test_terms_that_make_no_reward_are_refused(terms, message):
    with pytest.raises(RewardError, match=message):
        composite_reward(terms, None)
    assert issubclass(RewardError, ValueError)


def test_a_reward_that_is_not_finite_names_its_term_and_counts_the_samples():
    images, targets, condition = batch()
    images[1, 0, 0, 0] = images[3, 0, 2, 2] = float("nan")
    with pytest.raises(RewardError, match=r"the reward pixel is not finite for 2 of 5 samples"):
        composite_reward({"pixel": 1.0}, None)(images, targets, condition)
    with pytest.raises(RewardError, match=r"the reward feature is not finite for 2 of 5"):
        composite_reward(ALL, Encoder())(images, targets, condition)


def test_images_outside_of_the_range_are_refused_not_rescaled():
    images, targets, condition = batch()
    reward = composite_reward({"pixel": 1.0}, None)
    with pytest.raises(RewardError, match=r"5 of 5 images leave \[0, 1\]: values from -\d.*clamp"):
        reward(images * 2 - 1.5, targets, condition)
    with pytest.raises(RewardError, match=r"1 of 5 targets leave \[0, 1\]"):
        reward(images, targets.index_fill(0, torch.tensor([2]), 1.01), condition)
    reward(images.index_fill(0, torch.tensor([2]), 1.0005), targets, condition)  # rounding is let through


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({}, r"needs the condition's class_labels, got nothing"),
        ({"class_labels": torch.zeros(4, dtype=torch.long)}, r"class_labels must be \(5,\).*got \(4,\)"),
        ({"class_labels": torch.tensor([0, 1, 2, 10, -1])}, r"2 of 5 class_labels are not classes 0..9"),
    ],
)
def test_class_labels_that_do_not_fit_are_refused(condition, message):
    images, targets, _ = batch()
    with pytest.raises(RewardError, match=message):
        composite_reward({"class_log_prob": 1.0}, Encoder())(images, targets, condition)


def test_images_and_targets_of_different_shapes_are_refused():
    images, targets, condition = batch()
    with pytest.raises(RewardError, match=r"of one shape, got \(5, 1, 4, 4\) and \(4, 1, 4, 4\)"):
        composite_reward({"pixel": 1.0}, None)(images, targets[:4], condition)
