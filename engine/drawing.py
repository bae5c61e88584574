"""The images of an evaluation, batch by batch: from a sampler to 8-bit images, drawn once and kept where asked.

No more than one batch of images is in memory. All ranks draw the same number of batches of the same size, because a
network whose weights are partitioned needs all of them in each pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import ranks
from engine.conditions import ConditionPool
from engine.config import Config
from engine.dpm import dpm_sample, dpm_scheduler
from engine.image_store import ImageStore, to_uint8
from engine.metrics import SSIM_WINDOW, psnr, ssim
from engine.models.denoiser import Condition, Denoiser
from engine.models.loading import fingerprint
from engine.models.pipelines import Pipeline
from engine.rl import GaussianPolicy
from engine.rl.rewards import Asked
from engine.sampling import deterministic_policy, make_policy, sample
from engine.sources import Source

ODE, DPM = "ode", "dpmsolver++"
"""Samplers that are no policy of noise: the deterministic one, and DPM-Solver++."""

BATCH = 32
"""Images in memory at once where rollout.batch_size does not say it."""


@dataclass(frozen=True)
class Sampler:
    """Who draws, and how.

    Attributes:
        denoiser: the network.
        steps: number of steps.
        guidance: its weight.
        kind: `ODE`, `DPM` or a policy's.
        eta: the policy's noise; 0 for the other two.
    """

    denoiser: Denoiser
    steps: int
    guidance: float
    kind: str = ODE
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.eta and self.kind in (ODE, DPM):
            raise ValueError(f"eta={self.eta} needs a policy's kind; kind={self.kind} has no noise")

    @property
    def settings(self) -> tuple[int, float, str, float]:
        """All but the network."""
        return self.steps, self.guidance, self.kind, self.eta


@dataclass(frozen=True)
class Repeated:
    """A source whose rows come several times in turn, so that each is drawn from several seeds."""

    source: Source
    times: int

    def __len__(self) -> int:
        return len(self.source) * self.times

    def condition(self, rows: Tensor) -> Condition:
        return self.source.condition(rows // self.times)

    def asked(self, rows: Tensor) -> Asked:
        return self.source.asked(rows // self.times)

    def name(self, row: int) -> str:
        return self.source.name(row // self.times)

    def caption(self, row: int) -> str:
        return self.source.caption(row // self.times)


class Drawing:
    """Draws the images of condition pools.

    Args:
        config: of the run.
        pipeline: of the teacher; decodes everybody's latents.
        device: of this rank.
        exact: images stay as they are decoded, in [0, 1], all of a rank in one batch. False: 8-bit images, in batches.

    Attributes:
        passes: network evaluations of one latent, over all ranks.
    """

    def __init__(self, config: Config, pipeline: Pipeline, device: torch.device, *, exact: bool) -> None:
        self.config = config
        self.pipeline = pipeline
        self.device = device
        self.exact = exact
        self.passes = 0
        self._decoding: dict[str, Any] | None = None

    def batches(
        self, sampler: Sampler, pool: ConditionPool, store: ImageStore | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of a pool's images, (pool indices (B,), images (B, C, H, W)) at a time.

        The shares of all ranks are equal; where the pool does not divide, the last index comes more than once.

        Args:
            store: images that it holds are read instead of drawn, others drawn and written to it.
        """
        passes = 0
        for rows in self.share(pool).split(pool.size if self.exact else self.config.rollout.batch_size or BATCH):
            images = None if store is None else self._stored(store, rows)
            if images is None:
                latents, cost = self._latents(sampler, pool, rows)
                passes += cost
                images = self._decoded(latents)
                if store is not None:
                    for index, image in zip(rows.tolist(), images, strict=True):
                        store.write(index, image)
            yield rows, images
        self.passes += int(ranks.gather(torch.tensor([passes])).sum())

    def share(self, pool: ConditionPool) -> Tensor:
        """The pool indices that this rank draws, as many as every other rank."""
        largest = -(-pool.size // ranks.world_size())
        padded = torch.arange(largest * ranks.world_size()).clamp_max(pool.size - 1)
        return padded[ranks.share(len(padded))]

    def gather(self, pool: ConditionPool, values: Tensor) -> Tensor:
        """Values (rows of this rank's share, ...) -> those of the whole pool, in its order, on every rank."""
        return ranks.gather(values)[: pool.size]

    def store(self, folder: Path, sampler: Sampler, pool: ConditionPool, *, teacher: str, weights: str) -> ImageStore:
        """The images that a sampler draws of a pool.

        Args:
            teacher: fingerprint of the teacher's weights, which adapters lie on.
            weights: fingerprint of the sampler's weights.
        """
        keys = [pool.key(index) for index in range(pool.size)]
        if sampler.kind == DPM:
            schedule: Any = dict(dpm_scheduler(self.pipeline, sampler.steps).config)
        else:
            policy = self._policy(sampler)
            schedule = {name: getattr(policy, name).tolist() for name in ("timesteps", "a", "b", "std")}
        settings = {
            "teacher": teacher,
            "weights": weights,
            "sampler": sampler.kind,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "eta": sampler.eta,
            "schedule": _hash(json.dumps(schedule, sort_keys=True, default=str)),
            "split": pool.split,
            "seed": pool.seed,
            "images": pool.size,
            "conditions": _hash("\n".join(keys)),
            "latent_shape": pool.latent_shape,
            **self._shared_settings(),
        }
        return ImageStore(folder, settings)

    def _shared_settings(self) -> dict[str, Any]:
        """What all samplers' images depend on; found out once, as all of the files are read for it."""
        if self._decoding is None:
            pipeline = self.pipeline
            self._decoding = {
                "text_encoders": None if pipeline.text is None else pipeline.text_fingerprint(),
                "decoder": None if pipeline.vae is None else fingerprint(pipeline.denoiser.with_network(pipeline.vae)),
                "decoding": self.config.vae.model_dump(exclude={"batch_size"}),
            }
        return self._decoding

    def _policy(self, sampler: Sampler) -> GaussianPolicy:
        if sampler.kind == ODE:
            return deterministic_policy(sampler.denoiser, sampler.steps)
        return make_policy(sampler.denoiser, sampler.kind, sampler.steps, sampler.eta)

    def _latents(self, sampler: Sampler, pool: ConditionPool, rows: Tensor) -> tuple[Tensor, int]:
        if sampler.kind != DPM:
            return sample(
                sampler.denoiser,
                self._policy(sampler),
                pool,
                rows,
                guidance=sampler.guidance,
                device=self.device,
                batch_size=self.config.rollout.batch_size,
            )
        return dpm_sample(
            sampler.denoiser,
            dpm_scheduler(self.pipeline, sampler.steps),
            pool.initial_noise(rows).to(self.device),
            {name: value.to(self.device) for name, value in pool.condition(rows).items()},
            steps=sampler.steps,
            guidance=sampler.guidance,
        )

    def _decoded(self, latents: Tensor) -> Tensor:
        batch_size = self.config.vae.batch_size or self.config.rollout.batch_size
        images = self.pipeline.decode(latents, batch_size=batch_size)
        return images if self.exact else to_uint8(images).contiguous().cpu()

    def _stored(self, store: ImageStore, rows: Tensor) -> Tensor | None:
        """Stored images (B, C, H, W) of rows; None unless every rank has all of its own."""
        images = [store.read(index) for index in rows.tolist()]
        complete = torch.tensor([all(image is not None for image in images)])
        return torch.stack(images) if bool(ranks.gather(complete).all()) else None


def compare(images: Tensor, partners: ImageStore, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
    """PSNR and, of images that hold its window, SSIM (B,) with the partners' images of the same rows."""
    measures = {"psnr": psnr} | ({"ssim": ssim} if min(images.shape[-2:]) >= SSIM_WINDOW else {})
    values: dict[str, list[Tensor]] = {name: [] for name in measures}
    for image, row in zip(images, rows.tolist(), strict=True):  # one at a time, as they are compared in float64
        pair = [x[None].to(device) / 255 for x in (image, partners.read(row))]
        for name, measure in measures.items():
            values[name].append(measure(*pair).cpu())
    return {name: torch.cat(parts) for name, parts in values.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
