"""Reading a configuration: YAML, dotted overrides, and errors that name the key, the value and what is allowed.

Dotted overrides (`optimizer.lr=1e-5`) replace single keys, their values read as YAML. Unknown keys are errors that name
the nearest valid one. The keys themselves: engine/settings.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from engine.errors import EngineError
from engine.settings import Config

CONFIGS = Path(__file__).resolve().parent / "configs"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number: YAML 1.1 wants a dot in it."""


_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load_config(source: str | Path | Mapping[str, Any] | Config | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration and apply dotted overrides.

    Args:
        source: path of a YAML file, a mapping, a Config, or None for `engine/configs/digits.yaml`.
        overrides: `key=value` strings with dotted keys; values are read as YAML.

    Raises:
        EngineError: unreadable file, unknown key (the nearest valid one is named), or a value that is not allowed.
    """
    tree = read_tree(CONFIGS / "digits.yaml" if source is None else source)
    for override in overrides:
        _apply(tree, override)
    _reject_unknown(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise EngineError(_explain(error.errors(), tree)) from None


def valid_keys() -> list[str]:
    """All dotted keys, sections before their members."""
    return list(_keys(Config, ""))


def read_tree(source: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    """The keys that a source sets, as nested mappings; not checked.

    Raises:
        EngineError: a file that cannot be read.
    """
    if isinstance(source, Config):
        return source.as_dict()
    if isinstance(source, Mapping):
        return _copy(source)
    path = Path(source)
    if not path.is_file():
        shipped = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise EngineError(
            f"configuration file {path} does not exist; give a YAML file, such as those shipped: {shipped}"
        )
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngineError(f"configuration file {path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise EngineError(f"configuration file {path} holds a {type(tree).__name__}; a mapping of keys is needed")
    return tree


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `key=value`.

    Raises:
        EngineError: it is not of that form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise EngineError(f"override {override!r} is not of the form key=value, such as optimizer.lr=1e-5")
    try:
        return key, yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise EngineError(f"the value of override {override!r} is not YAML") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    *sections, name = key.split(".")
    _known(key)
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise EngineError(f"{section}={below!r} is not a section, so {key} cannot be set in it")
        tree = below
    tree[name] = value


def _keys(model: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


OPEN_KEYS = (
    "evaluation.encoders",
    "objective.bands",
    "objective.joined",
    "objective.turns",
    "reward.terms",
    "student.architecture",
    "zero.deepspeed",
)
"""Keys whose value is a mapping of the user's own names."""


def _known(key: str) -> None:
    keys = valid_keys()
    if key in keys or any(key.startswith(open_key + ".") for open_key in OPEN_KEYS):
        return
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
    raise EngineError(f"unknown configuration key {key!r}; the nearest valid key is {near!r}")


def _reject_unknown(tree: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        _known(key)
        if isinstance(value, Mapping) and key not in OPEN_KEYS:
            _reject_unknown(value, f"{key}.")


def _explain(errors: Iterable[Mapping[str, Any]], tree: Mapping[str, Any]) -> str:
    by_key: dict[str, list[str]] = {}
    for error in errors:
        if error["type"] == "value_error":
            by_key[error["msg"].removeprefix("Value error, ")] = []
            continue
        # What follows the key in `loc` are the places in a list, and pydantic's names for the members of a union.
        key, value = "", tree
        for part in error["loc"]:
            if not isinstance(value, Mapping) or part not in value:
                break
            key, value = f"{key}.{part}" if key else str(part), value[part]
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
        if error["type"] == "model_type":
            message = f"a section of keys is needed, such as {next(k for k in valid_keys() if k.startswith(f'{key}.'))}"
        place = error["loc"][-1]
        if isinstance(place, int):
            message = f"its item {place}: {message}"
        by_key.setdefault(f"{key}={value!r} is not allowed: ", []).append(message)
    return "; ".join(start + ", or ".join(messages) for start, messages in by_key.items())
