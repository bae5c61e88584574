"""Encoded prompts, kept on disk so that the text encoders can be released before training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import ranks
from engine.errors import EngineError
from engine.models.denoiser import Condition
from engine.prompts import Prompt

NEGATIVE = "negative_"
"""What the names of the tensors begin with that encode the negative prompt; the others encode the prompt."""

Encode = Callable[[list[str], list[str]], Mapping[str, Tensor]]
"""B prompts and their B negative prompts -> tensors (B, ...). Row i of a tensor depends on nothing but prompt i, or,
where its name begins with `negative_`, negative prompt i."""

Text = tuple[str, bool]
"""A text, and whether it is read as a negative prompt."""


class PromptCache:
    """Tensors of encoded texts, one file a text.

    A file's name is a hash of the encoders and the text, so a changed encoder never meets an old file, and runs and
    ranks may share a folder. A prompt and its negative prompt are files of their own: the negative prompt that all
    prompts share is stored, read and encoded once.

    Args:
        folder: created when needed; on storage that all ranks see.
        encoder_key: identifies all that the tensors depend on beside the text: the text encoders, their tokenizers, the
            precision that they run in, and the resolution where a tensor tells it.
        encode: the encoders; set to None (`release`) once everything that will be read is prepared.
        batch_size: most prompts in one call of `encode`.
    """

    def __init__(self, folder: Path, encoder_key: str, encode: Encode | None, batch_size: int) -> None:
        self.folder = folder
        self.encoder_key = encoder_key
        self.encode = encode
        self.batch_size = batch_size

    def prepare(self, prompts: Sequence[Prompt]) -> int:
        """Encode this rank's share of what is not on disk yet; all ranks must be done before any of them loads.

        Returns:
            The number of texts that this rank encoded.

        Raises:
            EngineError: for an encoding that is not finite.
        """
        texts = [list(dict.fromkeys((prompt[part], part == 1) for prompt in prompts)) for part in (0, 1)]
        share = [text for part in texts for text in part[ranks.share(len(part))]]
        missing = [text for text in share if not self._is_whole(text)]
        for _ in self._encoded(missing):
            pass
        return len(missing)

    def load(self, prompts: Sequence[Prompt]) -> Condition:
        """Tensors (B, ...) of B prompts, on the CPU and in the encoders' precision.

        Raises:
            EngineError: when a file is missing or damaged and the encoders have been released.
        """
        texts = dict.fromkeys((prompt[part], part == 1) for prompt in prompts for part in (0, 1))
        known = {text: self._read(text) for text in texts}
        missing = [text for text, tensors in known.items() if tensors is None]
        known |= dict(self._encoded(missing))
        rows = [{**known[prompt.text, False], **known[prompt.negative, True]} for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def release(self) -> None:
        """Forget the encoders; from here on a text that is not on disk is an error."""
        self.encode = None

    def _encoded(self, texts: list[Text]) -> Iterator[tuple[Text, dict[str, Tensor]]]:
        """Encodes texts and writes them."""
        if texts and self.encode is None:
            raise EngineError(
                f"{self._path(texts[0])}: the encoding of {texts[0][0]!r} is missing or damaged, and the text encoders "
                f"are released; start again to encode it ({len(texts)} such texts), with a folder that all ranks see"
            )
        # Prompts and negative prompts are encoded side by side; where one kind has run out, an empty text stands in.
        pairs = list(zip_longest(*([text for text in texts if text[1] is part] for part in (False, True))))
        for first in range(0, len(pairs), self.batch_size):
            batch = pairs[first : first + self.batch_size]
            tensors = self.encode(
                *([text[0] if text else "" for text in column] for column in zip(*batch, strict=True))
            )
            for i, pair in enumerate(batch):
                for text in filter(None, pair):
                    own = {name: value[i].cpu() for name, value in tensors.items() if _encodes(name, text)}
                    self._write(text, own)
                    yield text, own

    def _is_whole(self, text: Text) -> bool:
        try:
            with safe_open(self._path(text), framework="pt"):  # reads the header, and holds it against the file's size
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def _read(self, text: Text) -> dict[str, Tensor] | None:
        try:
            return load_file(self._path(text))
        except (FileNotFoundError, SafetensorError):
            return None

    def _write(self, text: Text, tensors: dict[str, Tensor]) -> None:
        broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if broken:
            raise EngineError(
                f"the encoding of {text[0]!r} is not finite ({', '.join(broken)}); "
                "text encoders that overflow in fp16 need bf16 or fp32"
            )
        path = self._path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        # clone: a row of a batch shares its memory with the other rows
        save_file({name: value.clone() for name, value in tensors.items()}, unfinished, metadata={"text": text[0]})
        os.replace(unfinished, path)

    def _path(self, text: Text) -> Path:
        name = hashlib.sha256(repr((self.encoder_key, *text)).encode()).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"


def _encodes(name: str, text: Text) -> bool:
    return name.startswith(NEGATIVE) is text[1]
