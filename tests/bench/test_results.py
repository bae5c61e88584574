"""The page of results: it says what the committed files say."""

import json

import pytest

from bench import results
from engine.comparing import settings

COMPARISONS = results.ROOT / "bench" / "comparisons"
RUN = {"method": "a", "budget": 1.0, "seed": 0}


def point(iteration: int, fd: float) -> dict:
    passes = {"student_forward": 99, "student_backward": 10 * iteration}
    return {
        "iteration": iteration,
        "flops": 1e12 * iteration,
        "seconds": iteration,
        "passes": passes,
        "student": {"fd": fd},
    }


def row(method: str, fd: float, deviation: float | None) -> dict:
    mean = dict.fromkeys(results.COLUMNS, 0.5) | {"fd": fd}
    std = dict.fromkeys(results.COLUMNS) | {"fd": deviation}
    return {"method": method, "budget": 1.0, "mean": mean, "std": std, "budget_share": 1.0}


@pytest.fixture
def folder(tmp_path):
    runs = [
        {**RUN, "curve": [point(10, 4.0), point(20, 2.0), point(30, 1.0)]},
        {**RUN, "method": "b", "curve": [point(40, 3.0), point(80, 2.5)]},
    ]
    content = {
        "rows": [row("a", 1.0, 0.25), row("b", 2.5, None)],
        "teacher": {"teacher": {"steps": 50, "fd": 0.125}},
        "methods": {"a": {"iterations": 30}, "b": {"iterations": 80}},
        "runs": runs,
        "command": "python -m engine.compare", "date": "2026-11-21", "processor": "a chip", "cores": 2,
        "versions": {"python": "3.11", "torch": "2.13"},
    }  # fmt: skip
    (tmp_path / "given.json").write_text(json.dumps(content))
    figures = {"log_density": -7.0, "log_density_sd": 0.02, "log_mmd": -7.3, "log_mmd_sd": 0.2, "modes": 39.5}
    mixture = {
        "machine": {
            "command": "python -m bench.mixture",
            "date": "today",
            "processor": "a chip",
            "python": "3",
            "torch": "2",
        },
        "floors": {"log_density": -6.86, "log_mmd": -8.4},
        "summary": [{"method": "VarDiU flow", "seeds": [0, 1], **figures, "modes_sd": 0.7, "seconds": 60.4}],
    }
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("{{figure given a fd}}", "1.000 ± 0.250"),
        ("{{figure given b fd}}", "2.500"),
        ("{{figure given teacher fd}}", "0.125"),
        ("{{gain given a b fd}}", "60.0%"),
        ("{{gain given b a fd}}", "-150.0%"),
        (
            "{{reached given a b}}",
            "after 20 iterations, 25.0% of its generator sample-steps, 25.0% of its operations, 25.0% of its seconds",
        ),
        ("{{reached given b a}}", "not within 80 iterations"),
        ("{{source given}}", "`python -m engine.compare`; 2026-11-21, a chip, 2 cores, Python 3.11, torch 2.13"),
        ('{{mixture mixture "VarDiU flow" log_density}}', "-7.000 ± 0.020"),
        ("{{source mixture}}", "`python -m bench.mixture`; today, a chip, Python 3, torch 2"),
        (
            "{{mixture mixture}}",
            "| | mean log-density | log-MMD | modes | seeds | seconds |\n|---|---|---|---|---|---|\n"
            "| samples of the target | -6.860 | -8.400 | | | |\n"
            "| VarDiU flow | -7.000 ± 0.020 | -7.300 ± 0.200 | 39.5 ± 0.7 | 2 | 60 |",
        ),
        ("{{table absent}}, {{figure absent a fd}}", "not measured, not measured"),
    ],
)
def test_a_placeholder_says_what_its_file_says(folder, asked, said):
    assert results.page(f"Before {asked} after", folder) == f"Before {said} after"


def test_a_table_has_the_teacher_and_every_method(folder):
    lines = results.page("{{table given}}", folder).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" teacher, 50 steps ", " 0.125 "], [" a ", " 1.000 ± 0.250 "], [" b ", " 2.500 "],
    ]  # fmt: skip


@pytest.mark.parametrize("asked", ["{{tabel given}}", "{{table}}", "{{figure given c fd}}", "{{figure given a fid}}"])
def test_a_placeholder_that_says_nothing_is_an_error(folder, asked):
    with pytest.raises(ValueError, match=r"placeholder|has not"):
        results.page(asked, folder)


def test_the_committed_page_is_what_the_committed_files_give():
    assert results.main(["--check"]) == 0


def changed(then: dict, now: dict, path: str = "") -> list[str]:
    """Keys that both have, with other values; a key that came later says what was done before it."""
    found = []
    for key in then.keys() & now.keys():
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            found += changed(then[key], now[key], f"{path}{key}.")
        elif then[key] != now[key]:
            found.append(f"{path}{key}: {then[key]} then, {now[key]} now")
    return found


@pytest.mark.parametrize("name", ["digits_compare", *sorted(file.stem for file in COMPARISONS.glob("*.yaml"))])
def test_committed_comparisons_are_of_the_configurations_that_are_shipped(name):
    record = json.loads((results.RESULTS / f"{name}.json").read_text())
    file = COMPARISONS / f"{name}.yaml"
    overrides = [f"compare.methods={json.dumps(record['settings']['methods'])}"]
    asked = settings.read(file if file.exists() else None, [] if file.exists() else overrides)
    assert list(record["methods"]) == list(asked.methods)
    for method, config in asked.methods.items():
        now = json.loads(json.dumps(config.as_dict()))
        for free in ("iterations", "output_dir"):  # operations are matched by the first
            del now[free]
        assert not changed(record["methods"][method], now), method
