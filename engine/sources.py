"""What conditions ask for: the classes of a class-conditional teacher, or the prompts of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine import ranks
from engine.config import Config
from engine.errors import EngineError
from engine.models.denoiser import Condition
from engine.models.pipelines import Pipeline
from engine.prompt_cache import PromptCache
from engine.prompts import Prompt, read_prompts, split
from engine.rl.rewards import Asked

SPLITS = ("train", "held_out", "evaluation")


class Source(Protocol):
    """What conditions ask for: the classes, or the prompts of one split."""

    def __len__(self) -> int: ...

    def condition(self, rows: Tensor) -> Condition:
        """Network conditions (len(rows), ...) of rows (N,) int64."""

    def asked(self, rows: Tensor) -> Asked:
        """The same for rewards and evaluation: `class_labels` (N,) int64, or `prompt`, N strings."""

    def name(self, row: int) -> str:
        """What identifies a row in a cache."""

    def caption(self, row: int) -> str:
        """What a picture writes over a column."""


@dataclass(frozen=True)
class Classes:
    """The classes 0..count-1 of a class-conditional network."""

    count: int
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.count

    def condition(self, rows: Tensor) -> Condition:
        return {"class_labels": rows}

    def asked(self, rows: Tensor) -> Asked:
        return {"class_labels": rows}

    def name(self, row: int) -> str:
        return f"class={row}"

    def caption(self, row: int) -> str:
        return self.names[row] if self.names else str(row)


@dataclass(frozen=True)
class Texts:
    """Prompts, each with its negative prompt, encoded in a cache."""

    prompts: Sequence[Prompt]
    cache: PromptCache

    def __len__(self) -> int:
        return len(self.prompts)

    def condition(self, rows: Tensor) -> Condition:
        return self.cache.load([self.prompts[row] for row in rows.tolist()])

    def asked(self, rows: Tensor) -> Asked:
        return {"prompt": [self.prompts[row].text for row in rows.tolist()]}

    def name(self, row: int) -> str:
        return f"prompt={self.prompts[row].text!r} negative={self.prompts[row].negative!r}"

    def caption(self, row: int) -> str:
        return self.prompts[row].text


def load_sources(config: Config, pipeline: Pipeline, folder: Path) -> dict[str, Source]:
    """What each split of conditions asks for. Classes are the same in all splits, prompts differ.

    Args:
        folder: of the run, which holds the encoded prompts unless prompts.cache names another folder.

    Returns:
        "train" | "held_out" | "evaluation" -> Source. The prompts are not encoded yet: `encode_prompts`.

    Raises:
        EngineError: prompts for a teacher that is conditioned on classes, no prompts for one that reads text, or a file
            that cannot be read.
    """
    path, classes = config.prompts.path, pipeline.denoiser.classes
    if classes is not None:
        if path is not None:
            raise EngineError(f"prompts.path={path}: the teacher is conditioned on classes, not on text")
        return dict.fromkeys(SPLITS, Classes(classes, pipeline.class_names))
    if path is None:
        raise EngineError(
            f"teacher.path={config.teacher.path} is conditioned on text, and prompts.path is not set; give a file of "
            "prompts"
        )
    prompts = read_prompts(path, column=config.prompts.column, negative=config.prompts.negative)
    if ranks.is_first():
        print(prompts.report, flush=True)
    cache = PromptCache(
        Path(config.prompts.cache) if config.prompts.cache else folder / "prompt_cache",
        pipeline.text_fingerprint(),
        lambda texts, negatives: pipeline.encode(texts, negatives, ranks.device()),
        config.prompts.batch_size,
    )
    return {name: Texts(rows, cache) for name, rows in split(prompts, config.prompts.held_out).items()}


def encode_prompts(config: Config, sources: Mapping[str, Source], pipeline: Pipeline) -> None:
    """Encode what the run will ask for, once, each rank its share, and let go of the text encoders."""
    sizes = {
        "train": config.rollout.pool,
        "held_out": config.evaluation.held_out,
        "evaluation": config.evaluation.samples,
    }
    for name, source in sources.items():
        if isinstance(source, Texts):
            source.cache.prepare(source.prompts[: sizes[name]])
    ranks.barrier()
    pipeline.release_encoders()
