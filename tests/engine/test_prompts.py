"""Prompts from files: what is kept, counted as dropped or refused by its line, and what is never trained on."""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest

from engine import EngineError
from engine.prompts import Prompt, Prompts, Report, read_prompts, split


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


# ---------------------------------------------------------------------- formats

FORMATS = {
    "a.txt": "a cat\na dog\nthe sea",
    "crlf.txt": b"\xef\xbb\xbfa cat\r\na dog\r\nthe sea\r\n",
    "a.jsonl": '{"prompt": "a cat"}\n{"prompt": "a dog", "seed": 3}\n{"prompt": "the sea"}\n',
    "caption.jsonl": '{"caption": "a cat"}\n{"caption": "a dog"}\n{"caption": "the sea"}',
    "a.json": json.dumps(
        {
            "info": {"year": 2017},
            "annotations": [
                {"image_id": 9, "id": 1, "caption": "a cat"},
                {"image_id": 9, "id": 2, "caption": "a dog\n"},
                {"image_id": 4, "id": 3, "caption": "the sea"},
            ],
        }
    ),
    "a.csv": "URL,TEXT,WIDTH\nx,a cat,1\nx,a dog,2\nx,the sea,3\n",
    "quoted.csv": 'caption,url\n"a cat",x\n" a dog ",x\n"the\xa0sea",x\n'.replace("\xa0", " "),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_its_prompts_in_order(tmp_path, name):
    prompts = read_prompts(write(tmp_path / name, FORMATS[name]), negative="blurry")
    assert list(prompts) == [Prompt("a cat", "blurry"), Prompt("a dog", "blurry"), Prompt("the sea", "blurry")]
    assert (prompts.report.rows, prompts.report.kept) == (3, 3)
    assert str(prompts.report) == f"{tmp_path / name}: 3 prompts of 3 rows"


def test_a_quoted_prompt_may_hold_commas_quotes_and_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'text,n\n"a cat, ""grey""",1\n"two\nlines",2\nlast,3\n')
    assert texts(read_prompts(path)) == ['a cat, "grey"', "two\nlines", "last"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"title": "no", "prompt": "no", "long": "yes"}'),
        ("a.json", '{"annotations": [{"caption": "no", "long": "yes"}]}'),
        ("a.csv", "caption,long\nno,yes\n"),
    ],
)
def test_a_column_may_be_named(tmp_path, name, content):
    assert texts(read_prompts(write(tmp_path / name, content), column="long")) == ["yes"]


def test_prompt_comes_before_caption_and_caption_before_text(tmp_path):
    path = write(tmp_path / "a.csv", "Text,Caption,PROMPT\nthird,second,first\n")
    assert texts(read_prompts(path)) == ["first"]
    path = write(tmp_path / "b.csv", "Text,Caption\nthird,second\n")
    assert texts(read_prompts(path)) == ["second"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a", "negative_prompt": "b "}\n{"text": "c"}\n{"text": "d", "negative_prompt": ""}'),
        ("a.csv", "text,negative_prompt\na,b \n"),
        ("a.json", '{"annotations": [{"caption": "a", "negative_prompt": "b"}, {"caption": "c"}]}'),
    ],
)
def test_a_row_may_have_a_negative_prompt_of_its_own(tmp_path, name, content):
    prompts = list(read_prompts(write(tmp_path / name, content), negative="default"))
    expected = [Prompt("a", "b"), Prompt("c", "default"), Prompt("d", "")]
    assert prompts == expected[: len(prompts)]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(EngineError, match=r"a\.parquet: reading Parquet needs pyarrow; pip install redif-engine\[parq"):
        read_prompts(path)


def test_parquet_gives_its_column_and_counts_its_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = {"URL": ["x"] * 4, "TEXT": ["a cat", None, "the sea", "a cat"], "negative_prompt": ["b", "b", None, "b"]}
    parquet.write_table(pyarrow.table(table), path)
    prompts = read_prompts(path, negative="default")
    assert list(prompts) == [Prompt("a cat", "b"), Prompt("the sea", "default")]
    assert str(prompts.report).endswith("dropped 1 empty (row 2) and 1 repeated (row 4 repeats row 1)")
    with pytest.raises(EngineError, match=r"prompts\.column=caption is not one of its columns: URL, TEXT"):
        read_prompts(path, column="caption")
    cut = write(tmp_path / "cut.parquet", path.read_bytes()[:-20])
    with pytest.raises(EngineError, match=r"cut\.parquet is not Parquet"):
        read_prompts(cut)


# ---------------------------------------------------------------------- what is dropped


def test_texts_are_normalised_and_stripped(tmp_path):
    path = write(tmp_path / "a.txt", "  caf\u0065\u0301 \u2003\n")
    assert texts(read_prompts(path)) == ["caf\u00e9"]


def test_empty_and_repeated_rows_are_dropped_and_reported(tmp_path):
    lines = ["a cat", "", "  ", "a dog", "a cat ", "\t", "", "cafe\u0301", "caf\u00e9", "A cat"]
    prompts = read_prompts(write(tmp_path / "a.txt", "\n".join(lines)))
    assert texts(prompts) == ["a cat", "a dog", "caf\u00e9", "A cat"]
    report = prompts.report
    assert (report.rows, report.kept, report.empty.count, report.duplicates.count) == (10, 4, 4, 2)
    assert report.rows == report.kept + report.empty.count + report.duplicates.count
    assert str(report) == (
        f"{tmp_path / 'a.txt'}: 4 prompts of 10 rows; dropped 4 empty (line 2, line 3, line 6, ...) and "
        "2 repeated (line 5 repeats line 1, line 9 repeats line 8)"
    )


def test_null_prompts_are_empty_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n\n{"prompt": "b"}')
    prompts = read_prompts(path)
    assert texts(prompts) == ["a", "b"]
    assert prompts.report.empty.examples == ["line 2", "line 3"]


def test_the_same_prompt_with_another_negative_prompt_is_another_row(tmp_path):
    rows = [("a", "x"), ("a", "y"), ("a", "x")]
    content = "\n".join(json.dumps({"prompt": text, "negative_prompt": negative}) for text, negative in rows)
    prompts = read_prompts(write(tmp_path / "a.jsonl", content))
    assert list(prompts) == [("a", "x"), ("a", "y")]
    assert prompts.report.duplicates.examples == ["line 3 repeats line 1"]


# ---------------------------------------------------------------------- what is refused

REFUSED = {
    "invalid JSON": ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"a\.jsonl, line 3: not JSON: .*column 12"),
    "no object": ("a.jsonl", '{"prompt": "a"}\n["b"]', r"line 2: a list instead of an object with a prompt"),
    "no key": ("a.jsonl", '{"prompt": "a"}\n{"caption": "b"}', r"line 2: no 'prompt', only caption; each row needs it"),
    "no known key": ("a.jsonl", '{"title": "a"}', r"line 1: no prompt, caption, text among its columns \(title\)"),
    "a number": ("a.jsonl", '{"prompt": 3}', r"line 1: prompt=3 is not text"),
    "half a surrogate pair": ("a.jsonl", '{"prompt": "\\ud800"}', r"line 1: prompt='\\ud800' is not text"),
    "a negative list": (
        "a.jsonl",
        '{"text": "a", "negative_prompt": ["b"]}',
        r"line 1: negative_prompt=\['b'\] is",
    ),
    "bytes in text": ("a.txt", b"a cat\nna\xefve\n", r"a\.txt, line 2: byte 0xef is not UTF-8; save the file as UTF-8"),
    "UTF-16": ("a.txt", "a cat".encode("utf-16"), r"line 1: byte 0xff is not UTF-8"),
    "bytes in CSV": ("a.csv", b"text\na\n\xff\n", r"a\.csv, line 3: byte 0xff"),
    "COCO of another kind": ("a.json", '{"images": []}', r"a\.json has no list of annotations; COCO captions are"),
    "JSON lines as .json": ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"a\.json, line 2: not JSON: Extra data"),
    "COCO without a caption": (
        "a.json",
        '{"annotations": [{"caption": "a"}, {"image_id": 3}]}',
        r"annotation 2: no 'caption', only image_id",
    ),
    "too few values": ("a.csv", "text,n\na,1\nb\n", r"a\.csv, line 3: 1 values for the 2 columns of the header"),
    "a comma in a value": ("a.csv", 'text,n\n"a\nb",1\na, b,1\n', r"line 4: 3 values for the 2 columns.*double quotes"),
    "an open quote": ("a.csv", 'text,n\na,1\n"b,2\nc,3\n', r"a\.csv, line 3: not CSV: unexpected end of data"),
    "a column twice": ("a.csv", "text,text\na,b\n", r"line 1: column 'text' comes twice"),
    "no column": ("a.csv", "url,alt\nx,a\n", r"line 1: no prompt, caption, text among its columns \(url, alt\); name"),
    "nothing": ("a.txt", "", r"a\.txt has no prompt in its 0 rows"),
    "blanks": ("a.txt", "\n \n", r"a\.txt has no prompt in its 2 rows"),
    "a header alone": ("a.csv", "text\n", r"a\.csv has no prompt in its 0 rows"),
    "another ending": ("a.md", "a cat", r"a\.md does not end in one of \.txt, \.jsonl, \.json, \.csv, \.parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, case):
    name, content, expected = REFUSED[case]
    with pytest.raises(EngineError, match=expected) as error:
        read_prompts(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value)


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(EngineError, match=rf"prompts\.path={re.escape(str(path))} is not a file"):
            read_prompts(path)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(EngineError, match=r"line 1: prompts\.column=TITLE is not one of its columns: title, text"):
        read_prompts(write(tmp_path / "a.csv", "title,text\na,b\n"), column="TITLE")
    with pytest.raises(EngineError, match=r"prompts\.column=text, but the text file .* has no columns"):
        read_prompts(write(tmp_path / "a.txt", "a"), column="text")


# ---------------------------------------------------------------------- who is never trained on


def prompts_of(*names: str) -> Prompts:
    return Prompts(tuple(Prompt(name, "") for name in names), Report(Path("file.txt")))


def parts_of(prompts: Prompts, share: float) -> dict[str, str]:
    return {prompt.text: name for name, part in split(prompts, share).items() for prompt in part}


NAMES = [f"prompt {i}" for i in range(2000)]


def test_every_prompt_is_in_one_part_and_the_shares_are_those_asked_for():
    parts = split(prompts_of(*NAMES), 0.2)
    assert sorted(texts(parts["train"]) + texts(parts["held_out"]) + texts(parts["evaluation"])) == sorted(NAMES)
    sizes = {name: len(part) for name, part in parts.items()}
    assert 1550 < sizes["train"] < 1650  # 1600 expected, a deviation of 18
    assert 170 < sizes["held_out"] < 230
    assert 170 < sizes["evaluation"] < 230
    assert all(texts(part) == [n for n in NAMES if n in set(texts(part))] for part in parts.values())


def test_the_split_is_the_hash_that_is_documented():
    parts = parts_of(prompts_of(*NAMES), 0.1)
    for name in NAMES:
        digest = hashlib.sha256(name.encode()).hexdigest()
        if int(digest[:16], 16) / 2**64 >= 0.1:
            assert parts[name] == "train"
        else:
            assert parts[name] == ("evaluation" if int(digest[16:18], 16) & 1 else "held_out")


def test_the_split_survives_reordering_and_additions():
    before = parts_of(prompts_of(*NAMES), 0.1)
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert parts_of(prompts_of(*shuffled), 0.1) == before
    after = parts_of(prompts_of(*(f"other {i}" for i in range(500)), *NAMES), 0.1)
    assert {name: after[name] for name in NAMES} == before
    assert parts_of(prompts_of(*NAMES[:400]), 0.1) == {name: before[name] for name in NAMES[:400]}


def test_negative_prompts_do_not_move_a_prompt():
    rows = tuple(Prompt(name, negative) for name in NAMES[:200] for negative in ("", "blurry"))
    parts = split(Prompts(rows, Report(Path("file.txt"))), 0.3)
    owners = [{prompt.text for prompt in part} for part in parts.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 200


def test_a_larger_share_takes_prompts_from_training_only():
    small, large = parts_of(prompts_of(*NAMES), 0.1), parts_of(prompts_of(*NAMES), 0.4)
    assert all(large[name] == part for name, part in small.items() if part != "train")


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (
            1,
            0.1,
            r"prompts\.held_out=0\.1 leaves held_out and evaluation without a prompt \(train 1, held_out 0",
        ),
        (3, 0.1, r"file\.txt: .*give more prompts \(at least 200 make this unlikely\), or a larger share"),
        (3, 0.999, r"leaves train( and \w+)? without a prompt"),
    ],
)
def test_too_few_prompts_for_a_part_are_refused(count, share, expected):
    with pytest.raises(EngineError, match=expected):
        split(prompts_of(*NAMES[:count]), share)
