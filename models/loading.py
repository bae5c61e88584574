"""Reading directories in diffusers format, so that whatever is wrong with one is said by its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .denoiser import Denoiser


class LoadingError(ValueError):
    """A directory that is missing, corrupt or of a kind that is not supported, or a request that it cannot meet."""


def fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 over weights and configuration of a denoiser's network: equal networks, equal fingerprints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(denoiser.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # A 0-d tensor, as bitsandbytes keeps some, has no bytes to be seen as.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    config = {key: value for key, value in denoiser.network.config.items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_json(directory: Path, part: str) -> dict[str, Any]:
    """A JSON file of a directory.

    Raises:
        LoadingError: it is not there, or not a mapping.
    """
    path = directory / part
    if not path.is_file():
        raise LoadingError(f"{directory} has no {part}; give a whole directory in diffusers format")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadingError(f"{path} is corrupt: {error}") from None
    if not isinstance(config, dict):
        raise LoadingError(f"{path} is corrupt: it holds a {type(config).__name__} instead of a mapping")
    return config


def load_weights(kind: type, directory: Path, part: str, **keywords: Any) -> nn.Module:
    """One component of diffusers with its weights, from safetensors, in eval mode.

    Args:
        kind: diffusers' class.
        part: the folder of the component.
        keywords: of `from_pretrained`.

    Raises:
        LoadingError: missing, truncated or foreign weights.
    """
    try:
        network, report = kind.from_pretrained(
            directory, subfolder=part, use_safetensors=True, local_files_only=True, output_loading_info=True, **keywords
        )
    except Exception as error:  # diffusers and safetensors raise many kinds for truncated or foreign files
        raise LoadingError(
            f"{directory}/{part} cannot be loaded as a {kind.__name__} from safetensors: {one_line(error)}"
        ) from None
    missing = report["missing_keys"]
    if missing:
        raise LoadingError(
            f"{directory}/{part} lacks {len(missing)} weights of a {kind.__name__}, such as {missing[0]}"
        )
    return network.eval()


def one_line(error: Exception) -> str:
    """What an error says, short enough for a line of a log."""
    return " ".join(str(error).split())[:300] or type(error).__name__
