"""Numbers of rows and bytes of one rank's iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config import Config
from engine.objectives.settings import REWARDED
from engine.planning.networks import Networks
from engine.planning.states import FULL
from engine.planning.traces import condition_of, policy_of, size_of


@dataclass(frozen=True)
class Sizes:
    """Numbers of rows and bytes of one rank's iteration.

    Attributes:
        conditions: of a rank that the teacher draws at a time.
        samples: of a rank's rollout; 0 without one.
        part_conditions, part_samples: that are decoded and scored at once: of the largest part of a rollout
            (rollout.chunks), or without one of the held-out conditions; 0: none are.
        drawn: rows that a sampler walks at once, in passes of fewer.
        stochastic: steps of a rollout that are trained on.
        steps: kind -> examples of an optimizer step of the student.
        micro_batch: most examples in one pass of the update (train.micro_batch).
        student_rows, teacher_rows, decode_rows: latents in one pass without gradients.
        latent, row, image: bytes of a latent, of its condition and of its image.
        image_shape: (C, H, W).
    """

    conditions: int
    samples: int
    part_conditions: int
    part_samples: int
    drawn: int
    stochastic: int
    steps: dict[str, int]
    micro_batch: int
    student_rows: int
    teacher_rows: int
    decode_rows: int
    latent: int
    row: int
    image: int
    image_shape: tuple[int, int, int]

    @classmethod
    def of(cls, config: Config, nets: Networks, ranks: int) -> Sizes:
        """The sizes of a configuration on so many ranks."""
        size, most = config.rollout.group_size, config.rollout.batch_size
        examples = config.train.batch_size // ranks if config.objective.distilling else 0
        if config.objective.rewarded:
            conditions = math.ceil(config.rollout.conditions / ranks)
            part = math.ceil(conditions / min(config.rollout.chunks, conditions))
            part_samples = drawn = part * size
            samples = conditions * size
            stochastic = config.policy.window or int(policy_of(config, nets.student).stochastic.sum())
        else:
            held_out = math.ceil(config.evaluation.held_out / ranks) if config.evaluation.every else 0
            part = part_samples = min(most or held_out, held_out)
            conditions = drawn = max(examples, part)
            samples = stochastic = 0
        pairs = max(1, samples * stochastic // config.train.updates)
        steps = {kind: pairs if kind in REWARDED else examples for kind in config.objective.kinds}
        targets = max(conditions, examples)
        channels, height, width = nets.pipeline.denoiser.latent_shape
        vae = nets.pipeline.vae
        factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (channels if vae is None else 3, height * factor, width * factor)
        return cls(
            conditions=conditions,
            samples=samples,
            part_conditions=part,
            part_samples=part_samples,
            drawn=drawn,
            stochastic=stochastic,
            steps=steps,
            micro_batch=config.train.micro_batch,
            student_rows=min(most or part_samples, part_samples),
            teacher_rows=min(most or targets, targets),
            decode_rows=min(config.vae.batch_size or most or part_samples, part_samples),
            latent=FULL * channels * height * width,
            row=size_of(condition_of(config, nets, 1).values()),
            image=FULL * math.prod(shape),
            image_shape=shape,
        )

    @property
    def pairs_at_once(self) -> int:
        """(sample, step) pairs of a rollout in one pass of the update."""
        return min([self.micro_batch, *(count for kind, count in self.steps.items() if kind in REWARDED)])

    @property
    def in_update(self) -> int:
        """Bytes of a rank's conditions, teacher latents and trajectories: x and x_next of each pair, and the ends."""
        return self.conditions * (self.row + self.latent) + self.samples * self.latent * (2 * self.stochastic + 1)

    @property
    def in_rollout(self) -> int:
        """Bytes of the same while the last rows are drawn: their conditions, latents and noise come on top."""
        return self.in_update + self.drawn * (self.row + 3 * self.latent)
