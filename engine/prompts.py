"""Prompts from a file: every row is kept, counted as dropped, or an error that names its line.

Five formats, told by the file's ending: text (.txt, one prompt a line), JSON lines (.jsonl), COCO captions (.json), and
tables in LAION's style (.csv, .parquet). Which prompts are never trained on follows from a hash of their text alone.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import EngineError

COLUMNS = ("prompt", "caption", "text")
"""Names of the prompt in rows with names, the first of them that the first row has, in upper or lower case."""
NEGATIVE_COLUMN = "negative_prompt"
EXAMPLES = 3  # of dropped rows, in the report
PARTS = ("train", "held_out", "evaluation")


class Prompt(NamedTuple):
    """What is asked for, and what guidance leads away from."""

    text: str
    negative: str


@dataclass
class Dropped:
    """Rows that were left out: how many, and where the first of them are."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """What became of the rows of a file; printed as one paragraph.

    Attributes:
        path: the file.
        rows: that it holds.
        kept: prompts that are left.
        empty: rows without a prompt: nothing, blanks only, or null.
        duplicates: rows whose prompt and negative prompt an earlier row has.
    """

    path: Path
    rows: int = 0
    kept: int = 0
    empty: Dropped = field(default_factory=Dropped)
    duplicates: Dropped = field(default_factory=Dropped)

    def __str__(self) -> str:
        dropped = [
            f"{part.count} {name} ({', '.join(part.examples)}{', ...' if part.count > len(part.examples) else ''})"
            for name, part in (("empty", self.empty), ("repeated", self.duplicates))
            if part.count
        ]
        return f"{self.path}: {self.kept} prompts of {self.rows} rows" + (
            f"; dropped {' and '.join(dropped)}" if dropped else ""
        )


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """Distinct prompts in the order of their file.

    Attributes:
        rows: the prompts.
        report: what was dropped on the way.
    """

    rows: tuple[Prompt, ...]
    report: Report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        return self.rows[index]


def read_prompts(path: str | Path, *, column: str | None = None, negative: str = "") -> Prompts:
    """Read a file of prompts.

    Texts are brought to Unicode's normal form NFC and stripped of white space at both ends. A row may carry a negative
    prompt of its own, under `negative_prompt`.

    Args:
        path: UTF-8 text (.txt), JSON lines (.jsonl), COCO captions (.json: `{"annotations": [{"caption": ...}]}`), CSV
            with a header (.csv) or Parquet (.parquet, with pyarrow).
        column: key or column of the prompt; None: prompt, caption or text. Not for .txt.
        negative: for rows without a negative prompt.

    Returns:
        Prompts with the report of what was dropped.

    Raises:
        EngineError: names the file, the line and what is needed: a missing file, another format, bytes that are not
            UTF-8, a line that is not JSON, a row without the column, a value that is not text, no prompt at all.
    """
    path = Path(path)
    if not path.is_file():
        raise EngineError(f"prompts.path={path} is not a file; give one of prompts ({', '.join(_READERS)})")
    if path.suffix.lower() not in _READERS:
        raise EngineError(f"{path} does not end in one of {', '.join(_READERS)}, which tell the format; rename it")
    if column is not None and path.suffix.lower() == ".txt":
        raise EngineError(f"prompts.column={column}, but the text file {path} has no columns; leave it out")
    report, seen = Report(path), {}
    default = _normal(negative)
    for place, text, own in _READERS[path.suffix.lower()](path, column):
        report.rows += 1
        prompt = Prompt(_normal(text), default if own is None else _normal(own))
        if not prompt.text:
            report.empty.add(place)
        elif prompt in seen:
            report.duplicates.add(f"{place} repeats {seen[prompt]}")
        else:
            seen[prompt] = place
    report.kept = len(seen)
    if not seen:
        raise EngineError(f"{path} has no prompt in its {report.rows} rows; at least one is needed")
    return Prompts(tuple(seen), report)


def split(prompts: Prompts, share: float) -> dict[str, Prompts]:
    """Part prompts into those to train on and those never to train on, by a hash of their text alone.

    A prompt's part does not depend on the other prompts, their order or their negative prompts, and a larger share only
    takes prompts from "train".

    Args:
        prompts: all of them.
        share: of the prompts that are never trained on, within (0, 1); half of it is "held_out", half "evaluation".

    Returns:
        {"train", "held_out", "evaluation"} -> Prompts, none of them empty.

    Raises:
        EngineError: when a part comes out empty.
    """
    parts: dict[str, list[Prompt]] = {name: [] for name in PARTS}
    for prompt in prompts:
        parts[_part(prompt.text, share)].append(prompt)
    missing = [name for name in PARTS if not parts[name]]
    if missing:
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in parts.items())
        raise EngineError(
            f"{prompts.report.path}: prompts.held_out={share:g} leaves {' and '.join(missing)} without a prompt "
            f"({sizes}); "
            f"give more prompts (at least {round(10 / min(share / 2, 1 - share))} make this unlikely), "
            f"or a {'smaller' if missing == ['train'] else 'larger'} share"
        )
    return {name: replace(prompts, rows=tuple(rows)) for name, rows in parts.items()}


def _part(text: str, share: float) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    if int.from_bytes(digest[:8], "big") >= share * 2**64:
        return "train"
    return "held_out" if digest[8] % 2 == 0 else "evaluation"


def _normal(text: str | None) -> str:
    return unicodedata.normalize("NFC", text or "").strip()


# ---------------------------------------------------------------------- one reader a format

Row = tuple[str, str | None, str | None]
"""(place, prompt, negative prompt); None where the row has none."""


def _text(path: Path, column: str | None) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        yield f"line {number}", line, None


def _json_lines(path: Path, column: str | None) -> Iterator[Row]:
    def rows() -> Iterator[tuple[str, Mapping[str, Any] | None]]:
        for number, line in enumerate(_lines(path), 1):
            place = f"line {number}"
            yield place, _json(path, line, number) if line.strip() else None

    return _named(path, rows(), column)


def _coco(path: Path, column: str | None) -> Iterator[Row]:
    tree = _json(path, _decode(path), 1)
    annotations = tree.get("annotations") if isinstance(tree, dict) else None
    if not isinstance(annotations, list):
        raise EngineError(
            f"{path} has no list of annotations; COCO captions are "
            '{"annotations": [{"image_id": 1, "caption": "..."}]}; for one JSON object a line, name the file .jsonl'
        )
    return _named(path, ((f"annotation {i}", row) for i, row in enumerate(annotations, 1)), column)


def _csv(path: Path, column: str | None) -> Iterator[Row]:
    def rows() -> Iterator[tuple[str, Mapping[str, Any] | None]]:
        reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
        line = 1
        try:
            header = next(reader, [])
            repeated = {name for name in header if header.count(name) > 1}
            if repeated:
                raise EngineError(f"{path}, line 1: column {repeated.pop()!r} comes twice; columns need one name each")
            if header:
                _column(path, "line 1", header, column)
            line = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    raise EngineError(
                        f"{path}, line {line}: {len(values)} values for the {len(header)} columns of the header; "
                        "put values with commas in double quotes"
                    )
                yield f"line {line}", dict(zip(header, values, strict=True)) if values else None
                line = reader.line_num + 1
        except csv.Error as error:
            raise EngineError(f"{path}, line {line}: not CSV: {error}") from None

    return _named(path, rows(), column)


def _parquet(path: Path, column: str | None) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise EngineError(f"{path}: reading Parquet needs pyarrow; pip install redif-engine[parquet]")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [_column(path, "the schema", names, column), *({NEGATIVE_COLUMN} & set(names))]
            values = file.read(columns=wanted).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise EngineError(f"{path} is not Parquet: {' '.join(str(error).split())[:300]}") from None
    rows = (dict(zip(wanted, row, strict=True)) for row in zip(*(values[name] for name in wanted), strict=True))
    return _named(path, ((f"row {number}", row) for number, row in enumerate(rows, 1)), wanted[0])


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _coco,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _named(path: Path, rows: Iterator[tuple[str, Mapping[str, Any] | None]], column: str | None) -> Iterator[Row]:
    """Prompts of rows with named values; a row that is None is empty."""
    key = None
    for place, row in rows:
        if row is None:
            yield place, None, None
            continue
        if not isinstance(row, dict):
            raise EngineError(f"{path}, {place}: a {type(row).__name__} instead of an object with a prompt")
        key = key or _column(path, place, list(row), column)
        if key not in row:
            raise EngineError(f"{path}, {place}: no {key!r}, only {', '.join(row) or 'nothing'}; each row needs it")
        for name in (key, NEGATIVE_COLUMN):
            value = row.get(name)
            if value is not None and not (isinstance(value, str) and _encodable(value)):
                raise EngineError(f"{path}, {place}: {name}={value!r} is not text")
        yield place, row[key], row.get(NEGATIVE_COLUMN)


def _encodable(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _column(path: Path, place: str, names: Sequence[str], column: str | None) -> str:
    """The name of the prompt among the names of the first row."""
    if column is not None:
        if column in names:
            return column
        raise EngineError(
            f"{path}, {place}: prompts.column={column} is not one of its columns: {', '.join(names) or 'none'}"
        )
    for wanted in COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    raise EngineError(
        f"{path}, {place}: no {', '.join(COLUMNS)} among its columns ({', '.join(names) or 'none'}); "
        "name the one with the prompts by prompts.column"
    )


def _json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise EngineError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from None


def _lines(path: Path) -> list[str]:
    lines = _decode(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines  # what follows the last line's end is not a line


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EngineError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
