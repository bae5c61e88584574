"""Rewards: what each measures, their gradients, and that nonsense is refused instead of trained on."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from engine.models.digits import digits, load_reward_encoder
from engine.rl.rewards import (
    RewardError,
    class_log_prob_reward,
    feature_reward,
    make_reward,
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
    total, terms = make_reward(ALL, device="cpu", encoder=encoder)(*inputs)
    assert list(terms) == list(ALL)
    torch.testing.assert_close(terms["feature"], feature_reward(encoder)(*inputs))
    torch.testing.assert_close(terms["class_log_prob"], class_log_prob_reward(encoder)(*inputs))
    torch.testing.assert_close(terms["pixel"], pixel_reward(*inputs))
    torch.testing.assert_close(total, terms["feature"] + 0.5 * terms["class_log_prob"] - 2 * terms["pixel"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rewards_are_fp32_whatever_the_images_are(dtype):
    total, terms = make_reward(ALL, device="cpu", encoder=Encoder())(*batch(dtype=dtype))
    assert {value.dtype for value in (total, *terms.values())} == {torch.float32}
    assert {value.shape for value in (total, *terms.values())} == {(5,)}


def test_the_encoder_runs_once_on_images_and_once_on_targets():
    encoder, inputs = Encoder(), batch()
    make_reward(ALL, device="cpu", encoder=encoder)(*inputs)
    assert encoder.batches == [5, 5]
    encoder.batches.clear()
    make_reward({"class_log_prob": 1.0}, device="cpu", encoder=encoder)(*inputs)
    assert encoder.batches == [5]  # this term reads no target
    encoder.batches.clear()
    make_reward({"pixel": 1.0}, device="cpu", encoder=encoder)(*inputs)
    assert encoder.batches == []


def test_a_target_stands_for_a_group_and_is_encoded_once():
    images, targets, condition = batch(6)
    encoder, targets = Encoder(), targets[:2]
    reward = make_reward(ALL, device="cpu", encoder=encoder)
    grouped = reward(images, targets, condition)[1]
    assert encoder.batches == [6, 2]
    repeated = reward(images, targets.repeat_interleave(3, 0), condition)[1]
    for name in ALL:
        torch.testing.assert_close(grouped[name], repeated[name])


def test_one_kind_may_appear_under_several_names():
    inputs = batch()
    terms = {"near": {"kind": "pixel", "weight": 2.0}, "pixel": 1.0, "ignored": {"kind": "pixel", "weight": 0.0}}
    total, scores = make_reward(terms, device="cpu")(*inputs)
    assert list(scores) == ["near", "pixel", "ignored"]
    torch.testing.assert_close(total, 3 * pixel_reward(*inputs))


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_images_and_match_finite_differences(name):
    images, targets, condition = batch(2)
    images, targets = images.clamp(0.1, 0.9).requires_grad_(), targets.requires_grad_()
    reward = make_reward({name: 1.0}, device="cpu", encoder=Encoder())
    reward(images, targets, condition)[0].sum().backward()
    assert targets.grad is None  # the teacher's image is a constant
    direction, step = torch.randn_like(images), 1e-2
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, targets, condition)[0].sum() for sign in (1, -1))
    assert float((images.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=2e-2, abs=1e-4)


def test_the_image_itself_as_target_still_has_its_gradient():
    images = batch()[0].requires_grad_()
    total, _ = make_reward({"feature": 1.0, "pixel": 1.0}, device="cpu", encoder=Encoder())(images, images, {})
    total.sum().backward()
    assert images.grad is not None


def test_digit_rewards_prefer_the_same_digit_and_the_right_class():
    images, labels = (part[:200] for part in digits("held_out"))
    images = (images + 1) / 2
    reward = make_reward({"feature": 1.0, "class_log_prob": 1.0}, device="cpu", encoder=load_reward_encoder())
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
        ({"mine": {"kind": "clap", "path": "x"}}, r"terms.mine: there is no reward 'clap'; did you mean 'clip'"),
        ({"mine": {"kind": 3}}, r"terms.mine: there is no reward 3; allowed are feature"),
        ({"clip": 1.0}, r"reward.terms.clip.path is missing; a clip term needs it: Directory in transformers format"),
        ({"aesthetic": {"path": "x"}}, r"reward.terms.aesthetic.head is missing; .*safetensors"),
        (
            {"clip": {"pth": "x"}},
            r"reward.terms.clip.pth is no key of a clip term; did you mean 'path'\? allowed are kind",
        ),
        ({"pixel": {"path": "x"}}, r"reward.terms.pixel.path is no key of a pixel term; allowed are kind, weight$"),
        ({"clip": {"path": "x", "batch_size": 0}}, r"reward.terms.clip.batch_size=0: .*greater than or equal to 1"),
        (
            {"clip": {"path": "x", "precision": "int8"}},
            r"reward.terms.clip.precision='int8': .*'fp32', 'bf16' or 'fp16'",
        ),
        ({"dino": {"path": "x", "tokens": "all"}}, r"reward.terms.dino.tokens='all': .*'cls' or 'patch'"),
        ({"perceptual": {"path": "x", "layers": []}}, r"reward.terms.perceptual.layers=\[\]: .*at least 1 item"),
        ({"perceptual": {"path": "x", "layers": [0, -1]}}, r"reward.terms.perceptual.layers.1=-1: "),
        ({"big": {"kind": "jpeg", "quality": 101}}, r"reward.terms.big.quality=101: .*less than or equal to 100"),
        ({"http": {"url": "localhost:80"}}, r"reward.terms.http.url='localhost:80': .*https\?://"),
        ({"http": {"url": "http://x", "timeout": float("inf")}}, r"reward.terms.http.timeout=inf: .*finite"),
        ({"pixel": {"weight": True}}, r"reward.terms.pixel.weight: .* must be a finite number, got True"),
        ({"pixel": float("nan")}, r"weight of pixel must be a finite number, got nan"),
        ({"pixel": "1"}, r"weight of pixel must be a finite number, got '1'"),
        ({"feature": 1.0}, r"feature reads an encoder, and none was given"),
    ],
)
def test_terms_that_make_no_reward_are_refused(terms, message):
    with pytest.raises(RewardError, match=message):
        make_reward(terms, device="cpu")
    assert issubclass(RewardError, ValueError)


def test_a_reward_that_is_not_finite_names_its_term_and_counts_the_samples():
    images, targets, condition = batch()
    images[1, 0, 0, 0] = images[3, 0, 2, 2] = float("nan")
    with pytest.raises(RewardError, match=r"the reward pixel is not finite for 2 of 5 samples"):
        make_reward({"pixel": 1.0}, device="cpu")(images, targets, condition)
    with pytest.raises(RewardError, match=r"the reward feature is not finite for 2 of 5"):
        make_reward(ALL, device="cpu", encoder=Encoder())(images, targets, condition)


def test_images_outside_of_the_range_are_refused_not_rescaled():
    images, targets, condition = batch()
    reward = make_reward({"pixel": 1.0}, device="cpu")
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
        make_reward({"class_log_prob": 1.0}, device="cpu", encoder=Encoder())(images, targets, condition)


def test_images_and_targets_of_different_shapes_are_refused():
    images, targets, condition = batch()
    with pytest.raises(RewardError, match=r"of one shape, got \(5, 1, 4, 4\) and \(4, 1, 4, 4\); or fewer"):
        make_reward({"pixel": 1.0}, device="cpu")(images, targets[:4], condition)
    for wrong in (targets[:0], targets[:, :, :3], targets[0], targets.repeat(2, 1, 1, 1)):
        with pytest.raises(RewardError, match=r"of one shape, got"):
            make_reward({"pixel": 1.0}, device="cpu")(images, wrong, condition)
