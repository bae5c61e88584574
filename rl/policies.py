"""Sampler policies: every supported sampler as three vectors of per-step scalars.

With x the current latent and f the (guided) network output, each sampler here is the affine Gaussian policy

    mean = a x + b f,      x_next ~ N(mean, s^2 I),

so a sampler is nothing but (a, b, s) over its steps. They are computed once, on the host, in float64; the network and
the kernels never see a schedule. A step with s = 0 has no density: it is sampled, never scored.

`stochastic_steps` keeps the noise to a window of steps. The other steps are not the same (a, b) without the noise:
their noise parameter is 0, so each becomes the sampler's own deterministic step (DDIM at eta 0, Euler on the ODE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_TIMESTEPS = 1000.0  # flow-matching networks (SD3, FLUX) are conditioned on sigma * 1000


@dataclass(frozen=True, eq=False)
class GaussianPolicy:
    """The transition x_next ~ N(a x + b f, std^2 I) of each of T steps.

    Attributes:
        timesteps: (T,) what the network is conditioned on, in sampling order: int64 training timesteps for DDIM,
            float64 sigma * 1000 for flow matching, float64 sigma for EDM.
        a: (T,) float64, the weight of the latent in the mean.
        b: (T,) float64, the weight of the network output in the mean.
        std: (T,) float64, >= 0, the standard deviation; 0 marks a deterministic step.

    Raises:
        ValueError: when the vectors differ in length, are empty, or hold anything that is not a usable coefficient.
    """

    timesteps: Tensor
    a: Tensor
    b: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("timesteps", "a", "b", "std")}
        if len(set(shapes.values())) != 1 or self.timesteps.dim() != 1 or len(self.timesteps) == 0:
            raise ValueError(f"a policy needs four vectors of one length T >= 1, got shapes {shapes}")
        for name in ("a", "b", "std"):
            value = getattr(self, name)
            if value.dtype != torch.float64 or not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite float64, got {value.dtype}: {value.tolist()}")
        if bool((self.std < 0).any()):
            raise ValueError(f"std must be >= 0 at every step, got {self.std.tolist()}")

    @property
    def stochastic(self) -> Tensor:
        """(T,) bool: the steps that have a density (std > 0) and can be scored and trained."""
        return self.std > 0


def ddim_policy(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    *,
    eta: float,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float = 1.0,
    stochastic_steps: Sequence[int] | None = None,
) -> GaussianPolicy:
    """DDIM with noise eta (Song et al. 2020, arXiv 2010.02502, equations 12 and 16), for three parametrisations.

    With A_t the cumulative alpha at a step and A_s at the next kept timestep (`final_alpha_cumprod` at the end),
    s = eta sqrt((1 - A_s) / (1 - A_t) (1 - A_t / A_s)) and c = sqrt(1 - A_s - s^2), the step is
    sqrt(A_s) x0 + c eps + s z, with x0 and eps read off the prediction. Nothing is clipped.

    Args:
        alphas_cumprod: (train_timesteps,) the training schedule, in [0, 1); "epsilon" needs it above 0.
        timesteps: (T,) strictly descending indices into `alphas_cumprod`.
        eta: >= 0; 0 is the deterministic sampler, 1 the ancestral one. Above 1 only where c stays real.
        prediction_type: "epsilon" | "v_prediction" | "sample", as diffusers names them.
        final_alpha_cumprod: stands after the last step. 1.0 is the image without noise, and makes the last step
            deterministic; `alphas_cumprod[0]` (diffusers' `set_alpha_to_one=False`) leaves it a small std.
        stochastic_steps: positions 0..T-1 that keep their noise; the others take eta 0. None: all.

    Returns:
        The policy over int64 timesteps.

    Raises:
        ValueError: for schedules, timesteps, eta or a prediction type outside of the above.
    """
    steps, a_t, a_s = _kept(alphas_cumprod, timesteps, prediction_type, final_alpha_cumprod)
    noise = _noise("eta", eta, len(steps), stochastic_steps)

    std = noise * torch.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
    direction_sq = 1 - a_s - std**2
    if bool((direction_sq < -1e-12).any()):
        step = int(steps[int(direction_sq.argmin())])
        raise ValueError(f"eta={eta} asks for more noise than timestep {step} has; eta <= 1 is always allowed")
    c = direction_sq.clamp(min=0).sqrt()  # exactly 0 for eta 1 from pure noise, where rounding may fall below

    if prediction_type == "epsilon":
        a = torch.sqrt(a_s / a_t)
        b = c - torch.sqrt(a_s * (1 - a_t) / a_t)
    elif prediction_type == "v_prediction":
        a = torch.sqrt(a_s * a_t) + c * torch.sqrt(1 - a_t)
        b = c * torch.sqrt(a_t) - torch.sqrt(a_s * (1 - a_t))
    else:
        a = c / torch.sqrt(1 - a_t)
        b = torch.sqrt(a_s) - c * torch.sqrt(a_t / (1 - a_t))
    return GaussianPolicy(steps, a, b, std)


def renoise_policy(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    *,
    eta: float = 1.0,
    prediction_type: str = "epsilon",
    stochastic_steps: Sequence[int] | None = None,
) -> GaussianPolicy:
    """Multi-step consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1; LCM, arXiv 2310.04378): the
    image that the student predicts, with fresh noise at the next level.

    With g = c_skip x + c_out x0 the predicted image (`consistency_scalings`), a step is
    sqrt(A_s) g + sqrt(1 - A_s) (sqrt(1 - eta^2) eps + eta z), where eps is the noise that g leaves in x. The last step
    gives g itself. For flows the same sampler is `cps_policy` with noise_level 2 / pi arcsin(eta).

    Args:
        alphas_cumprod: as in `ddim_policy`.
        timesteps: (T,) strictly descending; LCM's are `models.schedules.consistency_timesteps`.
        eta: in [0, 1], the share of the next level's noise that is fresh; 1 is LCM, 0 a deterministic DDIM step.
        prediction_type: "epsilon" | "v_prediction" | "sample".
        stochastic_steps: positions 0..T-1 that keep their noise; the others take eta 0. None: all.

    Returns:
        The policy over int64 timesteps; its last step is deterministic.

    Raises:
        ValueError: for schedules, timesteps, eta or a prediction type outside of the above.
    """
    steps, a_t, a_s = _kept(alphas_cumprod, timesteps, prediction_type, 1.0)
    fresh = _noise("eta", eta, len(steps), stochastic_steps, largest=1.0)
    alpha, sigma, alpha_next, sigma_next = a_t.sqrt(), (1 - a_t).sqrt(), a_s.sqrt(), (1 - a_s).sqrt()
    skip, out = consistency_scalings(steps)
    # g = of_x x + of_f f, and eps = (x - alpha g) / sigma
    if prediction_type == "epsilon":
        of_x, of_f = skip + out / alpha, -out * sigma / alpha
    elif prediction_type == "v_prediction":
        of_x, of_f = skip + out * alpha, -out * sigma
    else:
        of_x, of_f = skip, out
    kept = (1 - fresh**2).sqrt() * sigma_next / sigma
    of_g = alpha_next - kept * alpha
    return GaussianPolicy(steps, kept + of_g * of_x, of_g * of_f, fresh * sigma_next)


def consistency_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of latent consistency models, with LCM's data deviation 0.5 and timesteps scaled by 10: the
    predicted image is the latent itself at timestep 0, and the network's from the first few timesteps on.

    Args:
        timesteps: (B,) training timesteps.

    Returns:
        (c_skip, c_out), each (B,) float64.
    """
    scaled = 10.0 * timesteps.double()
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def flow_sde_policy(
    sigmas: Tensor | Sequence[float], *, noise_level: float, stochastic_steps: Sequence[int] | None = None
) -> GaussianPolicy:
    """Flow-SDE of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): Euler-Maruyama with a diffusion that
    follows the noise, q = noise_level sqrt(sigma / (1 - sigma)).

    Where sigma = 1 the division takes the next sigma, as the authors' code does, so the first step stays finite.

    Args:
        sigmas: (T+1,) strictly descending in [0, 1]; x_sigma = (1 - sigma) x0 + sigma noise, and the network
            predicts the velocity noise - x0.
        noise_level: >= 0; 0 is Euler on the ODE.
        stochastic_steps: positions 0..T-1 that keep their noise; the others are Euler steps on the ODE. None: all.

    Returns:
        The policy over timesteps sigma * 1000. A step to sigma' = 0 keeps its noise, as in the paper.

    Raises:
        ValueError: for sigmas, a noise level or steps outside of the above.
    """
    nodes = _sigmas(sigmas, largest=1.0)
    noise = _noise("noise_level", noise_level, len(nodes) - 1, stochastic_steps)
    sigma = nodes[:-1]
    return _sde(nodes, noise * torch.sqrt(sigma / (1 - torch.where(sigma == 1, nodes[1:], sigma))))


def dance_sde_policy(
    sigmas: Tensor | Sequence[float], *, eta: float, stochastic_steps: Sequence[int] | None = None
) -> GaussianPolicy:
    """Dance-SDE of DanceGRPO (Xue et al. 2025, arXiv 2505.07818): Euler-Maruyama with the constant diffusion eta.

    Args:
        sigmas: (T+1,) strictly descending in [0, 1], read as in `flow_sde_policy`.
        eta: >= 0; 0 is Euler on the ODE.
        stochastic_steps: positions 0..T-1 that keep their noise; the others are Euler steps on the ODE. None: all.

    Returns:
        The policy over timesteps sigma * 1000. A step to sigma' = 0 keeps its noise, as in the paper.

    Raises:
        ValueError: for sigmas, eta or steps outside of the above.
    """
    nodes = _sigmas(sigmas, largest=1.0)
    return _sde(nodes, _noise("eta", eta, len(nodes) - 1, stochastic_steps))


def cps_policy(
    sigmas: Tensor | Sequence[float], *, noise_level: float, stochastic_steps: Sequence[int] | None = None
) -> GaussianPolicy:
    """Coefficients-preserving sampling (Wang and Yu 2025, arXiv 2509.05952): fresh noise replaces predicted noise.

    The step is (1 - sigma') x0 + sigma' (cos(h) noise + sin(h) z) with h = noise_level pi / 2, so the latent carries
    the schedule's own amount of noise whatever the level.

    Args:
        sigmas: (T+1,) strictly descending in [0, 1], read as in `flow_sde_policy`.
        noise_level: in [0, 1]; 0 is Euler on the ODE, 1 replaces all noise.
        stochastic_steps: positions 0..T-1 that keep their noise; the others are Euler steps on the ODE. None: all.

    Returns:
        The policy over timesteps sigma * 1000. A step to sigma' = 0 is deterministic.

    Raises:
        ValueError: for sigmas, a noise level or steps outside of the above.
    """
    nodes = _sigmas(sigmas, largest=1.0)
    angle = _noise("noise_level", noise_level, len(nodes) - 1, stochastic_steps, largest=1.0) * (math.pi / 2)
    sigma, sigma_next = nodes[:-1], nodes[1:]
    kept = sigma_next * angle.cos()
    a = (1 - sigma_next) + kept
    b = kept * (1 - sigma) - (1 - sigma_next) * sigma
    return GaussianPolicy(sigma * FLOW_TIMESTEPS, a, b, sigma_next * angle.sin())


def edm_ancestral_policy(
    sigmas: Tensor | Sequence[float], *, eta: float, stochastic_steps: Sequence[int] | None = None
) -> GaussianPolicy:
    """Ancestral Euler steps between EDM noise levels (Karras et al. 2022, arXiv 2206.00364, for the noise model).

    Euler goes down to sigma_dn = sqrt(sigma'^2 - s^2), then noise s = min(sigma', eta sqrt(sigma'^2 (sigma^2 -
    sigma'^2) / sigma^2)) brings the latent back to sigma'. The network predicts the denoised image.
    Few steps at eta 1 throw the ODE's direction away; 0.2 to 0.4 explores enough. End the sigmas at sigma_min rather
    than 0 to keep the last step stochastic.

    Args:
        sigmas: (T+1,) strictly descending, >= 0; x_sigma = x0 + sigma noise.
        eta: >= 0; 0 is Euler on the ODE.
        stochastic_steps: positions 0..T-1 that keep their noise; the others are Euler steps on the ODE. None: all.

    Returns:
        The policy over timesteps sigma. A step to sigma' = 0 is deterministic.

    Raises:
        ValueError: for sigmas, eta or steps outside of the above.
    """
    nodes = _sigmas(sigmas, largest=math.inf)
    noise = _noise("eta", eta, len(nodes) - 1, stochastic_steps)
    sigma, sigma_next = nodes[:-1], nodes[1:]
    # The fresh share u of the variance sigma'^2: from it both parts come without subtracting large squares.
    fresh = (noise**2 * (1 - (sigma_next / sigma) ** 2)).clamp(max=1)
    a = sigma_next / sigma * (1 - fresh).sqrt()
    return GaussianPolicy(sigma, a, 1 - a, sigma_next * fresh.sqrt())


def _sde(nodes: Tensor, q: Tensor) -> GaussianPolicy:
    """Euler-Maruyama on the SDE with the marginals of the flow ODE and diffusion q: the score is written through v."""
    sigma, step = nodes[:-1], nodes.diff()
    a = 1 + q**2 * step / (2 * sigma)
    b = step * (1 + q**2 * (1 - sigma) / (2 * sigma))
    return GaussianPolicy(sigma * FLOW_TIMESTEPS, a, b, q * torch.sqrt(-step))


def _kept(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    prediction_type: str,
    final_alpha_cumprod: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept timesteps (T,), the cumulative alphas there, and those after each step."""
    schedule = _vector("alphas_cumprod", alphas_cumprod)
    steps = _timesteps(timesteps, len(schedule))
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
    a_t = schedule[steps]
    a_s = torch.cat([a_t[1:], torch.tensor([float(final_alpha_cumprod)], dtype=torch.float64)])
    _check_alphas(steps, a_t, a_s, prediction_type)
    return steps, a_t, a_s


def _vector(name: str, values: Tensor | Sequence[float]) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if vector.dim() != 1 or not bool(vector.isfinite().all()):
        raise ValueError(f"{name} must be one vector of finite numbers, got shape {tuple(vector.shape)}")
    return vector


def _sigmas(sigmas: Tensor | Sequence[float], *, largest: float) -> Tensor:
    nodes = _vector("sigmas", sigmas)
    if len(nodes) < 2:
        raise ValueError(f"sigmas has {len(nodes)} entries; T steps need T + 1 >= 2 of them")
    if float(nodes.min()) < 0 or float(nodes.max()) > largest:
        allowed = "in [0, 1]" if largest == 1.0 else ">= 0"
        raise ValueError(f"sigmas must be {allowed}, got {nodes.tolist()}")
    if bool((nodes.diff() >= 0).any()):
        raise ValueError(f"sigmas must descend strictly, got {nodes.tolist()}")
    return nodes


def _timesteps(timesteps: Tensor | Sequence[int], train_timesteps: int) -> Tensor:
    given = _vector("timesteps", timesteps)
    if len(given) == 0:
        raise ValueError("timesteps is empty; pass at least one")
    steps = given.to(torch.int64)
    if bool((steps != given).any()) or int(steps.min()) < 0 or int(steps.max()) >= train_timesteps:
        raise ValueError(f"timesteps must be integers in 0..{train_timesteps - 1}, got {given.tolist()}")
    if bool((steps.diff() >= 0).any()):
        raise ValueError(f"timesteps must descend strictly, got {steps.tolist()}")
    return steps


def _check_alphas(steps: Tensor, a_t: Tensor, a_s: Tensor, prediction_type: str) -> None:
    if float(a_t.min()) < 0 or float(a_t.max()) >= 1:
        raise ValueError(f"alphas_cumprod must be in [0, 1) at the kept timesteps {steps.tolist()}, got {a_t.tolist()}")
    if prediction_type == "epsilon" and float(a_t.min()) == 0:
        raise ValueError(
            f"alphas_cumprod is 0 at timestep {int(steps[int(a_t.argmin())])}, where epsilon says nothing about the "
            'image; a zero-terminal-SNR schedule needs prediction_type "v_prediction" or "sample"'
        )
    if not 0 < float(a_s[-1]) <= 1:
        raise ValueError(f"final_alpha_cumprod={float(a_s[-1])} is not in (0, 1]")
    if bool((a_s < a_t).any()):
        raise ValueError(f"each step must remove noise: alphas_cumprod goes from {a_t.tolist()} to {a_s.tolist()}")


def _noise(
    name: str, level: float, steps: int, stochastic_steps: Sequence[int] | None, *, largest: float = math.inf
) -> Tensor:
    """(steps,) float64: the noise parameter of every step, 0 outside `stochastic_steps`."""
    if not (math.isfinite(level) and 0 <= level <= largest):
        allowed = "a finite number >= 0" if largest == math.inf else f"in [0, {largest:g}]"
        raise ValueError(f"{name}={level} must be {allowed}")
    if stochastic_steps is None:
        return torch.full((steps,), float(level), dtype=torch.float64)
    outside = [step for step in stochastic_steps if step not in range(steps)]
    if outside:
        raise ValueError(f"stochastic_steps {outside} are not among the steps 0..{steps - 1}")
    noise = torch.zeros(steps, dtype=torch.float64)
    noise[list(stochastic_steps)] = float(level)
    return noise
