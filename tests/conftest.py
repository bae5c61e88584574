"""Makes `bench` importable by the tests, without putting the checkout's root on the path: see engine/__init__.py."""

import importlib.util
import sys
from pathlib import Path

if "bench" not in sys.modules:
    _FOLDER = Path(__file__).resolve().parent.parent / "bench"
    _SPEC = importlib.util.spec_from_file_location(
        "bench", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    sys.modules["bench"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["bench"])
