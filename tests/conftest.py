"""Makes `bench` importable by the tests, without putting the checkout's root on the path: see engine/__init__.py."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent


def _import(name, path, **package):
    spec = importlib.util.spec_from_file_location(name, path, **package)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if "bench" not in sys.modules:
    _FOLDER = _TESTS.parent / "bench"
    _import("bench", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)])


@pytest.fixture(scope="session")
def tiny_pipelines():
    """The module tests/tiny_pipelines.py."""
    return _import("tiny_pipelines", _TESTS / "tiny_pipelines.py")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_pipelines, tmp_path_factory):
    """Maps a family of `tiny_pipelines.FAMILIES` to the directory of its tiny pipeline, to be read only."""
    return cache(lambda family: tiny_pipelines.build(family, tmp_path_factory.mktemp("pipelines") / family))
