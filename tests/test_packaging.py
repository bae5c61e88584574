"""What a user installs: one importable name, nothing that shadows theirs, and all the data that it needs."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("engine", "kernels", "models", "rl")
SHIPPED = {".py", ".yaml", ".json", ".safetensors"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def import_name(path: Path) -> str:
    """engine/x -> engine/x, rl/x -> engine/rl/x"""
    return path.as_posix() if path.parts[0] == "engine" else f"engine/{path.as_posix()}"


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, because building a wheel writes into the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, copy / floor, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), ".", cwd=tree)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run_python("-m", "pip", "install", "--no-deps", "-q", "--target", str(target), str(wheel), cwd=target)
    return target


def test_the_wheel_holds_one_importable_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"engine"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_every_module_and_data_file_of_the_four_folders(tree, wheel):
    ours = {
        import_name(path.relative_to(tree))
        for floor in FLOORS
        for path in (tree / floor).rglob("*")
        if path.suffix in SHIPPED
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("engine/")}
    assert packed == ours


def test_the_installed_engine_lives_beside_a_projects_own_models_and_kernels(installed, tmp_path):
    for name in ("models", "kernels", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'the user'\n")
    program = """
import pathlib, sys
import engine, engine.kernels, engine.models, engine.rl
import models, kernels, rl
assert {models.OWNER, kernels.OWNER, rl.OWNER} == {"the user"}
for module in (engine, engine.kernels, engine.models, engine.rl):
    print(pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__)
"""
    lines = run_python("-c", program, str(installed), cwd=tmp_path, path=installed).splitlines()
    assert [line.split()[0] for line in lines] == ["True"] * 4, lines


def test_a_checkout_does_not_shadow_the_kernels_package_of_hugging_face(tree, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): pass\n")
    (tree / "engine" / "probe_of_the_test.py").write_text(
        "import kernels, engine\nkernels.get_kernel()\nprint(engine.__file__)\n"
    )
    try:
        loaded = run_python("-m", "engine.probe_of_the_test", cwd=tree, path=tmp_path)
    finally:
        (tree / "engine" / "probe_of_the_test.py").unlink()
    assert Path(loaded) == tree / "engine" / "__init__.py"


def test_every_folder_of_modules_is_a_listed_package():
    options = setup_cfg()
    listed = set(options["options"]["packages"].split())
    folders = dict(line.replace(" ", "").split("=") for line in options["options"]["package_dir"].split("\n") if line)
    found = {}
    for floor in FLOORS:
        for module in (ROOT / floor).rglob("*.py"):
            folder = module.parent.relative_to(ROOT)
            assert (ROOT / folder / "__init__.py").is_file(), f"{folder} holds modules but no __init__.py"
            found[import_name(folder).replace("/", ".")] = folder.as_posix()
    assert listed == set(found)
    assert folders == found


def test_no_module_of_engine_is_named_like_a_library():
    # `engine/train.py` is run as a script, and Python then looks for every import in its folder first.
    ours = {path.stem for path in (ROOT / "engine").iterdir() if path.suffix == ".py" or path.is_dir()}
    theirs = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert ours & theirs <= {"__init__", "__pycache__"}


def test_every_direct_dependency_is_pinned_for_the_tests():
    options = setup_cfg()
    declared = options["options"]["install_requires"] + options["options.extras_require"]["dev"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line) for line in lines), "exact versions, no local suffix"
    pinned = {re.split("==", line)[0].lower() for line in lines}
    assert {re.split("[>=<; ]", line)[0].lower() for line in declared.split("\n") if line} | {"setuptools"} <= pinned


# The Makefile, without installing anything


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # without the variables of the `make test` that may be running these tests
    theirs = ("MAKE", "MFLAGS", "ARGS", "PYTHON")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("Makefile", "setup.cfg", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_installs_once_and_again_when_the_requirements_change(checkout):
    assert "pip install" in run_make(checkout, "-n", "train").stdout
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    again = run_make(checkout, "-n", "train", "ARGS=seed=3").stdout
    assert "pip install" not in again
    assert "deepspeed engine/train.py seed=3" in again
    for name in ("setup.cfg", "constraints.txt", "pyproject.toml"):
        stamp = (checkout / ".venv" / ".installed").stat().st_mtime
        os.utime(checkout / name, (stamp + 10, stamp + 10))
        assert "pip install" in run_make(checkout, "-n", "test").stdout, name
        os.utime(checkout / name, (stamp - 10, stamp - 10))


@pytest.mark.parametrize(
    ("script", "shown"),
    [("echo Python 3.14.0; exit 1", "Python 3.14.0"), (None, "not found")],
    ids=["newer", "missing"],
)
def test_make_says_which_python_it_needs(checkout, script, shown):
    if script:
        (checkout / "snake").write_text(f"#!/bin/sh\n{script}\n")
        (checkout / "snake").chmod(0o755)
    done = run_make(checkout, "train", "PYTHON=./snake")
    assert done.returncode != 0
    assert "needs Python 3.10 to 3.12" in done.stderr
    assert shown in done.stderr
    assert not (checkout / ".venv").exists()
