"""The gradient of distribution matching against closed forms in float64: linear images of Gaussian noise."""

import pytest
import torch

from engine.models.process import score
from engine.models.schedules import DiffusionSchedule
from engine.objectives.score_matching import matching_gradient, matching_loss

LEVELS = [(0.9, 0.19**0.5), (0.6, 0.8), (0.2, 0.96**0.5), (0.3, 0.7)]  # (alpha, sigma); the last is of a flow


def gaussian_score(x, mean, covariance):
    return -(x - mean) @ torch.linalg.inv(covariance)


def kl(mean, covariance, mean_2, covariance_2):
    """KL(N(mean, covariance) || N(mean_2, covariance_2))."""
    inverse, gap = torch.linalg.inv(covariance_2), mean_2 - mean
    trace, log = torch.trace(inverse @ covariance), torch.logdet(covariance_2) - torch.logdet(covariance)
    return 0.5 * (trace + gap @ inverse @ gap - len(mean) + log)


class Linear:
    """Student images A z + b in d dimensions, z of k; the teacher's are N(mean, covariance)."""

    def __init__(self, d: int, k: int) -> None:
        generator = torch.Generator().manual_seed(10 * d + k)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight, self.bias = draw(d, k).requires_grad_(), draw(d).requires_grad_()
        root = draw(d, d)
        self.mean, self.covariance = draw(d), root @ root.T + 0.3 * torch.eye(d)
        # Points of equal weight with the moments of N(0, 1) up to the third: means over them of squares are exact.
        points = (d + k) ** 0.5 * torch.eye(d + k, dtype=torch.float64)
        self.z, self.noise = torch.cat([points, -points]).split([k, d], dim=1)

    def at(self, alpha, sigma):
        """The student's and the teacher's mean and covariance of noised images."""
        eye = sigma**2 * torch.eye(len(self.mean))
        own = alpha * self.bias, alpha**2 * self.weight @ self.weight.T + eye
        return *own, alpha * self.mean, alpha**2 * self.covariance + eye

    def images(self):
        return self.z @ self.weight.T + self.bias

    def predicted(self, alpha, sigma):
        """The images that the exact scores mean at the noised ones: teacher's, student's."""
        x = (alpha * self.images() + sigma * self.noise).detach()
        mean, covariance, mean_2, covariance_2 = (value.detach() for value in self.at(alpha, sigma))
        pairs = ((mean_2, covariance_2), (mean, covariance))
        return [(x + sigma**2 * gaussian_score(x, *of)) / alpha for of in pairs]

    def gradient(self, alpha, sigma, normaliser):
        images, (real, fake) = self.images(), self.predicted(alpha, sigma)
        count = len(images)
        levels = (torch.full((count,), value, dtype=torch.float64) for value in (alpha, sigma))
        loss = matching_loss(images, matching_gradient(images.detach(), real, fake, *levels, normaliser=normaliser))
        # the loss is a mean over dimensions, the KL their sum
        return torch.autograd.grad(loss * len(self.mean), (self.weight, self.bias))


@pytest.mark.parametrize(("d", "k"), [(1, 1), (2, 2), (3, 1), (2, 4)])
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_exact_scores_give_the_gradient_of_the_kl(d, k, alpha, sigma):
    student = Linear(d, k)
    expected = torch.autograd.grad(kl(*student.at(alpha, sigma)), (student.weight, student.bias))
    for ours, exact in zip(student.gradient(alpha, sigma, "none"), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_sigma2_weighs_the_kl_by_the_variance_of_the_noise(alpha, sigma):
    student = Linear(3, 2)
    plain, weighted = (student.gradient(alpha, sigma, normaliser) for normaliser in ("none", "sigma2"))
    for ours, exact in zip(weighted, plain, strict=True):
        torch.testing.assert_close(ours, sigma**2 * exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_sign_is_that_of_finite_differences_of_the_kl(alpha, sigma):
    student, step = Linear(1, 1), 1e-5
    _, ours = student.gradient(alpha, sigma, "none")
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            student.bias += sign * step
            ends.append(kl(*student.at(alpha, sigma)))
            student.bias -= sign * step
    assert ours.item() == pytest.approx((ends[0] - ends[1]).item() / (2 * step), rel=1e-6)


def test_a_step_against_the_dmd_gradient_comes_closer_to_the_teacher():
    student = Linear(2, 2)
    before = kl(*student.at(0.6, 0.8)).item()
    gradient = student.gradient(0.6, 0.8, "dmd")
    with torch.no_grad():
        student.weight -= 0.01 * gradient[0]
        student.bias -= 0.01 * gradient[1]
    assert kl(*student.at(0.6, 0.8)).item() < before


def test_the_dmd_gradient_is_the_difference_over_the_distance_of_each_image():
    generator = torch.Generator().manual_seed(0)
    image, real, fake = (torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    levels = torch.ones(3), torch.ones(3)
    ours = matching_gradient(image, real, fake, *levels, normaliser="dmd")
    for row in range(3):
        scale = (image[row] - real[row]).abs().mean()
        torch.testing.assert_close(ours[row], (fake[row] - real[row]) / scale, rtol=1e-12, atol=0)


def test_an_image_that_is_the_teachers_own_is_not_moved():
    image = torch.zeros(2, 1, 2, 2)
    image[1] = 1
    real, fake = torch.zeros_like(image), torch.zeros_like(image)
    fake[1] = 3
    for difference in (fake, real):
        ours = matching_gradient(image, real, difference, torch.ones(2), torch.ones(2), normaliser="dmd")
        assert ours[0].abs().max() == 0
    assert matching_gradient(image, real, fake, torch.ones(2), torch.ones(2), normaliser="dmd")[1].min() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_losses_gradient_is_the_given_one_over_the_number_of_elements(dtype):
    generator = torch.Generator().manual_seed(0)
    image = (100 * torch.randn(4, 2, 3, generator=generator)).to(dtype).requires_grad_()
    given = 1e-3 * torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    loss = matching_loss(image, given)
    assert loss.item() == pytest.approx(0.5 * given.square().mean().item(), rel=1e-9)
    (ours,) = torch.autograd.grad(loss, image)
    torch.testing.assert_close(
        ours.double(), given / given.numel(), rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=0
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_difference_of_images_is_that_of_scores(kind):
    schedule = DiffusionSchedule(torch.linspace(0.99, 0.01, 10, dtype=torch.float64), 1.0, kind, lambda steps: None)
    generator = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(10, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    timestep = torch.arange(10)
    from engine.models.process import levels, to_image

    alpha, sigma = levels(schedule, timestep)
    images = (to_image(schedule, x, prediction, timestep) for prediction in (real, fake))
    ours = matching_gradient(x, *images, alpha, sigma, normaliser="none")
    scores = score(schedule, x, fake, timestep) - score(schedule, x, real, timestep)
    torch.testing.assert_close(ours, alpha.view(-1, 1, 1, 1) * scores, rtol=1e-10, atol=1e-12)
