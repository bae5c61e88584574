"""Target images of the deterministic teacher, drawn once per condition and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.conditions import ConditionPool
from engine.models.denoiser import Denoiser
from engine.rl.rollout import rollout
from engine.sampling import deterministic_policy


class TeacherCache:
    """Final latents of the teacher at eta = 0, one file a condition.

    A file's name is a hash of everything that its content depends on: the teacher's weights and schedule, the steps,
    the guidance, and the condition with its noise. A changed teacher therefore never meets an old file, a longer pool
    reuses a shorter one's, and runs and ranks may share a folder.

    Args:
        folder: created when needed.
        teacher: the denoiser that draws.
        weights: fingerprint of its network.
        steps: its number of steps.
        guidance: its guidance weight.
        batch_size: most latents in one forward pass; None: all.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Denoiser,
        weights: str,
        *,
        steps: int,
        guidance: float,
        batch_size: int | None = None,
    ) -> None:
        self.folder = folder
        self.teacher = teacher
        self.guidance = guidance
        self.batch_size = batch_size
        self.policy = deterministic_policy(teacher, steps)
        sampler = {name: getattr(self.policy, name).tolist() for name in ("timesteps", "a", "b")}
        what = {"weights": weights, "guidance": guidance, **sampler}
        self.key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        self.passes = 0
        self._memory: dict[str, Tensor] = {}

    def targets(self, pool: ConditionPool, indices: Tensor, device: torch.device) -> Tensor:
        """Teacher latents (N, C, H, W) fp32 of pool indices (N,); those not yet on disk are drawn and written.

        A file that cannot be read, or whose shape is another, is drawn again.
        """
        names = [self._name(pool, int(i)) for i in indices]
        # by name: a condition that comes twice is drawn once
        missing = list(
            {name: row for row, name in enumerate(names) if not self._load(name, pool.latent_shape)}.values()
        )
        if missing:
            rows = indices[torch.tensor(missing)]
            condition = {name: value.to(device) for name, value in pool.condition(rows).items()}
            drawn = rollout(
                self.teacher,
                self.policy,
                pool.initial_noise(rows).to(device),
                condition,
                guidance=self.guidance,
                batch_size=self.batch_size,
            )
            self.passes += drawn.passes
            for row, latent in zip(missing, drawn.final.cpu(), strict=True):
                self._store(names[row], latent)
        return torch.stack([self._memory[name] for name in names]).to(device)

    def _name(self, pool: ConditionPool, index: int) -> str:
        return hashlib.sha256(f"{self.key} {pool.key(index)}".encode()).hexdigest()[:40]

    def _load(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self._memory:
            return True
        try:
            latent = load_file(self._path(name))["latent"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return False
        if tuple(latent.shape) != tuple(shape) or not bool(latent.isfinite().all()):
            return False
        self._memory[name] = latent
        return True

    def _store(self, name: str, latent: Tensor) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"latent": latent.contiguous()}, unfinished)
        os.replace(unfinished, path)
        self._memory[name] = latent.clone()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"
