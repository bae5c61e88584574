"""The keys of each reward term, and reading `reward.terms` with errors that name the key.

A term is `NAME: weight` or `NAME: {kind: ..., weight: ..., other keys}`. Its kind is its name unless it says otherwise,
so that one kind may appear twice.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .contract import RewardError

RewardTerms = Mapping[str, float | Mapping[str, Any]]
"""Name of a term -> its weight, or its settings."""

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class TermSettings(BaseModel):
    """Keys of every term."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    weight: float = 1.0
    """Factor of the term in the sum. 0: the term is computed and logged, but counts for nothing."""


class ModelSettings(TermSettings):
    """Keys of every term that looks through a model of a local directory."""

    path: str
    """Directory in transformers format: config.json, weights, preprocessor_config.json."""
    batch_size: Count = 32
    """Most images in one pass of the model. Terms that share a model run it at the smallest of theirs."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model's weights and activations; what is computed from its outputs is fp32."""

    model_types: ClassVar[tuple[str, ...] | None] = ("clip",)
    """`model_type` of the config.json that fit; None: any that looks at images."""

    @property
    def reads(self) -> frozenset[str | int]:
        """What of a LocalModel the term reads."""
        return frozenset({"embedding"})


class ClipTextSettings(ModelSettings):
    @property
    def reads(self) -> frozenset[str | int]:
        return frozenset({"embedding", "prompts"})


class DinoSettings(ModelSettings):
    tokens: Literal["cls", "patch"] = "cls"
    """Compare the images' class tokens, or their patch tokens position by position."""

    model_types: ClassVar[tuple[str, ...] | None] = (
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "dinov3_convnext",
    )

    @property
    def reads(self) -> frozenset[str | int]:
        return frozenset({self.tokens})


class AestheticSettings(ModelSettings):
    head: str
    """File (.safetensors, .pth or .pt) with the head that LAION trained on embeddings of this CLIP model."""


class PerceptualSettings(ModelSettings):
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Which of the model's hidden states are compared: 0 is the embedding, k the output of block (or stage) k."""

    model_types: ClassVar[tuple[str, ...] | None] = None

    @property
    def reads(self) -> frozenset[str | int]:
        return frozenset(self.layers)


class JpegSettings(TermSettings):
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality; DDPO's is 95."""


class EndpointSettings(TermSettings):
    url: Annotated[str, Field(pattern="^https?://")]
    """Where batches are posted (docs/rewards.md)."""
    batch_size: Count = 32
    """Most images in one request."""
    targets: bool = False
    """Send the teacher's images too."""
    timeout: Seconds = 60.0
    """Seconds without a sign of the server after which an attempt has failed."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Further attempts after one that failed for a reason that may pass."""
    backoff: Seconds = 1.0
    """Seconds before the first further attempt; each later one waits twice as long."""


class FunctionSettings(TermSettings):
    differentiable: bool = False
    """Whether gradients flow from the result to the images. False: the function is called without."""


KINDS: dict[str, type[TermSettings]] = {
    "feature": TermSettings,
    "class_log_prob": TermSettings,
    "pixel": TermSettings,
    "clip": ModelSettings,
    "clip_text": ClipTextSettings,
    "dino": DinoSettings,
    "aesthetic": AestheticSettings,
    "pickscore": ClipTextSettings,
    "hps": ClipTextSettings,
    "perceptual": PerceptualSettings,
    "jpeg": JpegSettings,
    "http": EndpointSettings,
}
"""Kind of a term -> its keys; besides, "module:function" is a function of the user's."""


def read_terms(terms: RewardTerms) -> dict[str, tuple[str, TermSettings]]:
    """Name -> (kind, settings) of checked terms.

    Raises:
        RewardError: no term counts, or an unknown kind or key or an unusable value, with its place.
    """
    read = {name: _term(name, entry) for name, entry in terms.items()}
    if not any(settings.weight for _, settings in read.values()):
        raise RewardError(f"reward.terms: no reward in {dict(terms)}; give at least one of {_known()} a weight")
    return read


def _term(name: str, entry: object) -> tuple[str, TermSettings]:
    place = f"reward.terms.{name}"
    values = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
    kind = values.pop("kind", name)
    if not isinstance(kind, str) or not (":" in kind or kind in KINDS):
        raise RewardError(f"{place}: there is no reward {kind!r}; {_nearest(kind, KINDS)}allowed are {_known()}")
    schema = FunctionSettings if ":" in kind else KINDS[kind]
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RewardError(f"{place}.weight: the weight of {name} must be a finite number, got {weight!r}")
    allowed = ["kind", *schema.model_fields]
    for key in values:
        if key not in allowed:
            raise RewardError(
                f"{place}.{key} is no key of a {kind} term; {_nearest(key, allowed)}allowed are {', '.join(allowed)}"
            )
    for key, field in schema.model_fields.items():
        if field.is_required() and key not in values:
            means = " ".join((field.description or "").split())
            raise RewardError(f"{place}.{key} is missing; a {kind} term needs it: {means}")
    try:
        return kind, schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RewardError(f"{place}.{key}={first['input']!r}: {first['msg']}") from None


def _known() -> str:
    return ", ".join([*KINDS, "module:function"])


def _nearest(given: object, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""
