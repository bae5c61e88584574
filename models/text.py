"""The text encoders of a pipeline: loaded when a prompt is first encoded, and released when all are."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .denoiser import Condition
from .families import Family
from .loading import LoadingError, one_line, read_json

TOKENIZER_FILES = {
    "CLIP": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5": (("tokenizer.json",), ("spiece.model",)),
}


class TextEncoders:
    """Encodes prompts as the stock pipeline does, with the stock pipeline.

    Args:
        directory: in diffusers format, of a text family.
        index: its model_index.json.
        network: the denoising network, or one without weights: pipelines look at its config and dtype.
        resolution: (H, W) in pixels, which some networks are told.
        dtype: of the encoders.

    Attributes:
        cut: how many prompts were longer than the encoders read.
    """

    def __init__(
        self,
        directory: Path,
        family: Family,
        index: dict[str, Any],
        network: nn.Module,
        resolution: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self._directory, self._family, self._index = directory, family, index
        self._network, self._resolution, self._dtype = network, resolution, dtype
        self._parts = [
            name for name in sorted(index) if name.startswith(("tokenizer", "text_encoder")) and _given(index[name])
        ]
        self._pipeline: Any = None
        self.cut = 0

    @torch.no_grad()
    def encode(self, prompts: list[str], negative: list[str], device: torch.device | str) -> Condition:
        """B prompts and their B negative prompts as tensors (B, ...) on `device`.

        Raises:
            LoadingError: encoders or tokenizers that are missing, corrupt or not of one another.
        """
        with _quiet():
            if self._pipeline is None:
                self._pipeline = self._load()
            self._count_cut(prompts)
            for name in self._parts:
                if name.startswith("text_encoder"):
                    getattr(self._pipeline, name).to(device)
            tokens = next(iter(self._family.max_tokens.values()))
            return self._family.encode(self._pipeline, prompts, negative, self._resolution, tokens)

    def release(self) -> None:
        """Free the encoders; the next `encode` loads them again."""
        self._pipeline = None
        if self.cut > 1:
            warnings.warn(f"{self.cut} prompts were longer than the text encoders read, and were cut", stacklevel=3)

    def fingerprint(self) -> str:
        """SHA-256 over all that an encoding depends on beside the prompt."""
        digest = hashlib.sha256()
        settings = [self._family.name, *self._resolution, self._dtype, self._family.max_tokens]
        settings += [self._index.get("force_zeros_for_empty_prompt"), self._network.config.get("sample_size")]
        digest.update(repr(settings).encode())
        for part in self._parts:
            for path in sorted((self._directory / part).rglob("*")):
                if path.is_file():
                    digest.update(f"{path.relative_to(self._directory)} {path.stat().st_size}".encode())
                    with path.open("rb") as file:
                        while block := file.read(1 << 24):
                            digest.update(block)
        return digest.hexdigest()

    def _load(self) -> Any:
        import diffusers

        for name in self._parts:
            if name.startswith("tokenizer"):
                self._check_files(name)
        absent = {
            name: None for name, value in self._index.items() if isinstance(value, list) and name not in self._parts
        }
        kind = getattr(diffusers, self._index["_class_name"])
        try:
            pipeline = kind.from_pretrained(
                self._directory,
                torch_dtype=self._dtype,
                use_safetensors=True,
                local_files_only=True,
                **{**absent, self._family.component: self._network},
            )
        except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
            raise LoadingError(
                f"{self._directory}: {', '.join(self._parts)} cannot be loaded: {one_line(error)}"
            ) from None
        for name in self._parts:
            if name.startswith("tokenizer"):
                self._check_size(name, pipeline)
        return pipeline

    def _check_files(self, name: str) -> None:
        # Without its vocabulary a tokenizer of transformers loads all the same, and knows no word.
        folder = self._directory / name
        kind = "T5" if "T5" in self._index[name.replace("tokenizer", "text_encoder")][1] else "CLIP"
        sets = TOKENIZER_FILES[kind]
        if not any(all((folder / file).is_file() for file in files) for files in sets):
            raise LoadingError(
                f"{folder} holds no {kind} tokenizer; it needs {' or '.join(' and '.join(s) for s in sets)}"
            )
        given = read_json(self._directory, f"{name}/tokenizer_config.json").get("tokenizer_class", kind)
        if not given.startswith((kind, "PreTrainedTokenizer", "TokenizersBackend")):
            raise LoadingError(f"{folder} is a {given}, but the text encoder beside it needs a {kind} tokenizer")

    def _check_size(self, name: str, pipeline: Any) -> None:
        words = len(getattr(pipeline, name))
        size = getattr(pipeline, name.replace("tokenizer", "text_encoder")).config.vocab_size
        if not size / 2 <= words <= size:
            raise LoadingError(
                f"{self._directory}/{name} knows {words} tokens, but the text encoder beside it {size}; "
                "they are not of one another, or the tokenizer's files are cut"
            )

    def _count_cut(self, prompts: list[str]) -> None:
        name, most = next((name, most) for name, most in self._family.max_tokens.items() if name in self._parts)
        lengths = [len(ids) for ids in getattr(self._pipeline, name)(prompts).input_ids]
        longest = max(range(len(prompts)), key=lengths.__getitem__)
        if self.cut == 0 and lengths[longest] > most:
            warnings.warn(
                f"a prompt of {lengths[longest]} tokens is cut to the {most} that the text encoders read: "
                f"{json.dumps(prompts[longest][:60])}...; more of them are counted",
                stacklevel=4,
            )
        self.cut += sum(length > most for length in lengths)


def _given(entry: Any) -> bool:
    return isinstance(entry, list) and entry[0] is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the stock pipelines' own words on what is left out of them here, and on cut prompts."""
    import diffusers
    import transformers

    loggers = [package.utils.logging for package in (diffusers, transformers)]
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)  # older diffusers need it
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
