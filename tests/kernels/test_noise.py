"""Noise that is drawn inside policy_sample: the published generator, normal, and independent wherever it should be."""

import math

import pytest
import torch
from scipy import stats

from engine.kernels import policy_log_prob, policy_sample
from engine.kernels.noise import philox


def draw(shape, seed, offset=None, *, device="cpu", dtype=torch.float32):
    """The noise itself: a step with a = b = 0 and std = 1."""
    x = torch.zeros(shape, dtype=dtype, device=device)
    return policy_sample(x, x, 0.0, 0.0, 1.0, seed=seed, offset=offset)[0]


def numbers(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Salmon et al. publish with Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_bits_are_those_of_philox(counter, key, expected):
    words = philox(*(numbers(word) for word in counter), numbers(key))
    assert tuple(map(int, words)) == expected


@pytest.mark.parametrize("offset", [0, 5, 2**32 + 1, -1])
@pytest.mark.parametrize("seed", [0, 7, 2**62 + 3, -1])
def test_normals_are_box_muller_of_the_philox_words(seed, offset, device):
    drawn = draw((2, 9), seed, offset, device=device).cpu().double()
    for row in range(2):
        stream = (offset + row) % 2**64
        for quad in range(3):
            words = philox(*map(numbers, (quad, 0, stream % 2**32, stream >> 32)), numbers(seed))
            expected = []
            for radius, turn in (words[:2], words[2:]):
                r = math.sqrt(-2 * math.log((int(radius) + 1) / 2**32))
                # a quarter of the circle around one of the four half axes: top bits choose it, the rest is the angle
                angle = 2 * math.pi * ((int(turn) % 2**30) / 2**32 - 1 / 8)
                point = (-1 if int(turn) >> 31 else 1) * math.cos(angle), math.sin(angle)
                expected += [r * value for value in (point[::-1] if int(turn) >> 30 & 1 else point)]
            part = drawn[row, 4 * quad : 4 * quad + 4]
            torch.testing.assert_close(part, torch.tensor(expected[: len(part)]).double(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(16, 4096), (300, 51)])
def test_moments_and_distribution_are_standard_normal(shape, device):
    z = draw(shape, 2026, device=device).cpu().double().flatten()
    n = len(z)
    # moments of a standard normal, and the standard error of each over n draws
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < 4 * math.sqrt(variance / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert z.abs().max() < 6.67


def test_samples_steps_and_ranks_draw_uncorrelated_noise(device):
    n, rows = 4096, 4
    # samples of a batch; the next step advances the offset beyond them; another rank has another seed
    streams = torch.cat([draw((rows, n), seed, step * rows, device=device) for seed in (1, 2) for step in range(2)])
    z = streams.cpu().double()
    correlation = torch.corrcoef(z) - torch.eye(len(z))
    assert correlation.abs().max() < 5 / math.sqrt(n)
    shifted = torch.corrcoef(torch.stack([row[lag : n - 4 + lag] for row in z[:2] for lag in range(4)]))
    assert (shifted - torch.eye(8)).abs().max() < 5 / math.sqrt(n)  # neighbours share one counter
    assert torch.corrcoef(z.square()).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)


def test_the_noise_of_a_sample_does_not_depend_on_its_batch(device):
    seed, offset = numbers(3, 3, 9, 9, device=device), numbers(10, 11, 10, 12, device=device)
    whole = draw((4, 1, 8, 9), seed, offset, device=device)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 4
    for i in range(4):
        alone = draw((1, 1, 8, 9), seed[i], int(offset[i]), device=device)
        assert torch.equal(alone, whole[i : i + 1])
    assert torch.equal(draw((2, 1, 8, 9), 3, 10, device=device), whole[:2])  # one offset numbers the samples
    assert torch.equal(draw((2, 1, 8, 9), 3, numbers(10)[0].to(device), device=device), whole[:2])


def test_a_longer_sample_begins_like_a_shorter_one(device):
    assert torch.equal(draw((2, 2800), 1, device=device)[:, :77], draw((2, 77), 1, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_drawing_inside_is_sampling_with_that_noise(layout, dtype, device, truth):
    s = truth.batch((3, 4, 6, 5), dtype=dtype, device=device)
    x, pred, uncond = (t.to(memory_format=layout) for t in (s.x, s.pred, s.pred_uncond))
    guided = {"pred_uncond": uncond, "guidance": 2.0}
    x_next, log_prob = policy_sample(x, pred, s.a, s.b, s.std, seed=5, **guided)
    noise = torch.empty_like(x, dtype=torch.float32)
    noise.copy_(draw((3, 120), 5, device=device).as_strided(noise.shape, noise.stride()))
    expected, _ = policy_sample(x, pred, s.a, s.b, s.std, noise=noise, **guided)
    assert torch.equal(x_next, expected)
    assert x_next.stride() == x.stride()
    assert torch.equal(log_prob, policy_log_prob(x, x_next, pred, s.a, s.b, s.std, **guided))


def test_streams_advanced_in_place_draw_new_noise(device):
    offset = numbers(0, 1, device=device)
    first = draw((2, 8), 1, offset, device=device)
    offset += 2
    second = draw((2, 8), 1, offset, device=device)
    assert torch.equal(torch.cat([first, second]), draw((4, 8), 1, device=device))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"noise": torch.rand(2, 3), "generator": torch.Generator()},
            ValueError,
            "noise and generator are given; pass one of them",
        ),
        ({"seed": 1, "noise": torch.rand(2, 3)}, ValueError, "noise and seed are given; pass one of them"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "generator and seed are given; pass one of them"),
        ({"offset": 1}, ValueError, "offset numbers the streams of a seed; pass seed too"),
        ({"seed": 1.0}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"seed": torch.rand(2)}, TypeError, "seed has dtype torch.float32; it must be int64"),
        (
            {"seed": 1, "offset": numbers(1, 2, 3)},
            ValueError,
            r"offset has shape \(3,\), but the batch holds 2 samples",
        ),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808 does not fit into 64 bits"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    x = torch.rand(2, 3)
    with pytest.raises(error, match=message):
        policy_sample(x, x, 1.0, 1.0, 1.0, **arguments)
