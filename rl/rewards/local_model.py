"""Frozen vision models of local directories in transformers format, one for all terms that read the same directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .contract import RewardError
from .preprocessing import Preprocessing
from .settings import ModelSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LocalModel:
    """A frozen model that looks at images and, where it is a CLIP model, at prompts. Calls keep no state.

    Args:
        directory: config.json, weights and preprocessor_config.json as transformers saves them; with "prompts" the
            tokenizer too.
        reads: what an encoding holds: "embedding" (CLIP's projected image embedding), "cls" and "patch" (tokens of the
            last layer) and numbers (hidden states); "prompts" keeps the text tower, which is dropped otherwise.
        batch_size: most images, or prompts, in one pass.
        dtype: of weights and activations.
        device: where the model stays.

    Raises:
        RewardError: the directory is not what it should be, with what is needed.
    """

    def __init__(
        self, directory: Path, *, reads: frozenset[str | int], batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.reads, self.batch_size, self.dtype, self.device = reads, batch_size, dtype, device
        self.preprocessing = Preprocessing.of(directory)
        # In fp32 at first, for a logit_scale that is not rounded.
        network = _load(directory)
        self.logit_scale = network.logit_scale.exp().item() if hasattr(network, "logit_scale") else 1.0
        if "prompts" in reads:
            self.tokenizer = _tokenizer(directory, network.config.text_config.vocab_size)
        elif hasattr(network, "text_model"):
            del network.text_model, network.text_projection
        self.network: nn.Module = network.to(device, dtype).eval().requires_grad_(False)
        self._try()

    def __call__(self, images: Tensor) -> dict[str | int, Tensor]:
        """Encodes images.

        Args:
            images: (B, 1 or 3, H, W) in [0, 1].

        Returns:
            What is read -> fp32, differentiable in the images: "embedding" (B, D), "cls" (B, D), "patch" (B, L, D), and
            hidden states as the model has them, (B, L, D) or (B, D, H, W).
        """
        parts = [self._encode(part) for part in images.split(self.batch_size)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's projected embeddings (B, D) fp32 of prompts, each cut at the model's length; equal ones run once."""
        different = list(dict.fromkeys(prompts))
        length = self.network.config.text_config.max_position_embeddings
        embedded = []
        for start in range(0, len(different), self.batch_size):
            tokens = self.tokenizer(
                different[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.device)
            output = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            embedded.append(self.network.text_projection(output.pooler_output).float())
        row = {prompt: index for index, prompt in enumerate(different)}
        return torch.cat(embedded)[[row[prompt] for prompt in prompts]]

    def _encode(self, images: Tensor) -> dict[str | int, Tensor]:
        layers = [key for key in self.reads if isinstance(key, int)]
        tower = getattr(self.network, "vision_model", self.network)
        pixels = self.preprocessing(images).to(self.dtype)
        output = tower(pixel_values=pixels, output_hidden_states=bool(layers))
        encoding = {}
        if "embedding" in self.reads:
            encoding["embedding"] = self.network.visual_projection(output.pooler_output)
        if "cls" in self.reads:
            encoding["cls"] = output.last_hidden_state[:, 0]
        if "patch" in self.reads:
            registers = getattr(self.network.config, "num_register_tokens", 0)
            encoding["patch"] = output.last_hidden_state[:, 1 + registers :]
        for layer in layers:
            if layer >= len(output.hidden_states):
                raise RewardError(f"it has hidden states 0..{len(output.hidden_states) - 1}, not {layer}")
            encoding[layer] = output.hidden_states[layer]
        return {key: value.float() for key, value in encoding.items()}

    @torch.no_grad()
    def _try(self) -> None:
        """One black image and one prompt, so that what does not fit together fails at the start."""
        side = getattr(self.network.config, "image_size", None)
        side = side if isinstance(side, int) else 224
        try:
            self(torch.zeros(1, 3, side, side, device=self.device))
            if "prompts" in self.reads:
                self.embed(["a"])
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"it does not run on an image: {_text(error)}") from error


Models = Callable[[Mapping[str, ModelSettings], torch.device], Mapping[str, LocalModel]]
"""What `load_models` does: a plan, which has no weights, does it in another way."""


def load_models(terms: Mapping[str, ModelSettings], device: torch.device) -> dict[str, LocalModel]:
    """Name of a term -> its model. Terms of the same directory and precision get the same one.

    Raises:
        RewardError: naming the term's `path`.
    """
    groups: dict[tuple[Path, str], dict[str, ModelSettings]] = {}
    for name, settings in terms.items():
        directory = Path(settings.path).expanduser().resolve()
        try:
            _check_directory(directory, settings.model_types)
        except RewardError as error:
            raise _named(name, settings, error) from None
        groups.setdefault((directory, settings.precision), {})[name] = settings
    models = {}
    for (directory, precision), sharing in groups.items():
        try:
            model = LocalModel(
                directory,
                reads=frozenset().union(*(settings.reads for settings in sharing.values())),
                batch_size=min(settings.batch_size for settings in sharing.values()),
                dtype=DTYPES[precision],
                device=device,
            )
        except RewardError as error:
            name, settings = next(iter(sharing.items()))
            raise _named(name, settings, error) from error.__cause__
        models |= dict.fromkeys(sharing, model)
    return models


def _named(name: str, settings: ModelSettings, error: RewardError) -> RewardError:
    return RewardError(f"reward.terms.{name}.path={settings.path}: {error}")


def _check_directory(directory: Path, model_types: tuple[str, ...] | None) -> None:
    needed = "a directory in transformers format (config.json, model.safetensors, preprocessor_config.json) is needed"
    if not directory.is_dir():
        raise RewardError(f"it {'is a file' if directory.exists() else 'does not exist'}; {needed}")
    try:
        config = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise RewardError(
            f"it has no config.json; {needed}. Weights of open_clip, as HPSv2 has them, must be converted to a "
            "CLIPModel, or served over http (docs/rewards.md)"
        ) from None
    except (OSError, ValueError) as error:
        raise RewardError(f"its config.json cannot be read: {error}") from None
    found = config.get("model_type")
    if model_types is not None and found not in model_types:
        raise RewardError(f"it holds a model of type {found!r}; one of {', '.join(model_types)} is needed")


def _load(directory: Path) -> nn.Module:
    from transformers import AutoModel  # seconds to import, and most runs on digits need none

    try:
        network, report = AutoModel.from_pretrained(
            directory,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
        )
    except Exception as error:
        raise RewardError(
            f"its weights cannot be loaded: {_text(error)}; is the download complete? model.safetensors is needed"
        ) from error
    # transformers draws such weights at random. The pooler of some checkpoints is missing, and nothing reads it.
    bad = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    bad += [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]  # name, or (name, shapes)
    if bad:
        raise RewardError(
            f"its weights do not fit its config.json: {len(bad)} are missing or of another shape, as {min(bad)}"
        )
    return network


def _tokenizer(directory: Path, vocabulary: int):
    from transformers import AutoTokenizer

    # Without these files transformers makes a tokenizer that knows no word, instead of failing.
    if not (directory / "tokenizer.json").is_file() and not (
        (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
    ):
        raise RewardError("it has no tokenizer, which the prompts need: tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise RewardError(f"its tokenizer cannot be loaded: {_text(error)}") from error
    if len(tokenizer) > vocabulary:
        raise RewardError(f"its tokenizer has {len(tokenizer)} words, and its text model {vocabulary}")
    return tokenizer


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
