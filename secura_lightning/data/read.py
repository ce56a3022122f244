"""Files to records: the one place that opens local data.

    .jsonl  one object a line                 .csv      comma-separated, RFC 4180 quotes, a header line
    .json   a list of objects, bare or        .tsv      tab-separated, no quotes, a header line
            under the key "data"              .parquet
    .txt    documents, one record {"text": ...} each

A record maps columns to values. Whatever is wrong with a file is one :class:`SecuraError` that names the file, the
line and the fix; no row is ever skipped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from secura_lightning.errors import SecuraError

Record = Mapping[str, Any]

END_OF_TEXT = "<|endoftext|>"
_SHOWN = 8  # names listed in a message
_LONGEST_CELL = 2**31 - 1  # what a C long holds everywhere; by default csv stops at 131072 characters, less than a book
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # where a JSON text may hold half a character


def read_rows(
    path: str | Path, columns: Sequence[str] | None = None, suffix: str | None = None, encoding: str = "utf-8"
) -> list[dict[str, Any]]:
    """All records of a data file.

    Args:
        path: The file; its suffix says how it is read.
        columns: Names of the columns of a csv or tsv file without a header line.
        suffix: How it is read, where its name says something else (a table named ``.txt``).
        encoding: How its text is encoded.

    Raises:
        SecuraError: The file is missing, of an unknown kind, broken (with the line), wrongly encoded, or holds no row.
    """
    path = existing(Path(path))
    suffix = suffix or path.suffix.lower()
    if path.is_dir():
        raise SecuraError(f"{path} is a folder; give a file ({', '.join(SUFFIXES)})")
    if suffix not in SUFFIXES:
        raise SecuraError(f"{path}: cannot read '{suffix}' files; give one of {', '.join(SUFFIXES)}")
    if columns is not None and suffix not in (".csv", ".tsv"):
        raise SecuraError(f"{path}: init_args.columns names the columns of csv and tsv files only; remove it")
    rows = _parquet(path) if suffix == ".parquet" else _PARSERS[suffix](path, read_text(path, encoding), columns)
    if not rows:
        raise SecuraError(f"{path} holds no rows")
    return rows


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The content of a text file, a byte-order mark at its start left out.

    Raises:
        SecuraError: The file is missing, unreadable or wrongly encoded (with line and byte).
    """
    path = existing(Path(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SecuraError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, name = data.count(b"\n", 0, error.start) + 1, encoding.upper()
        raise SecuraError(
            f"{path}, line {line}: byte {error.start} (0x{data[error.start]:02x}) is not {name}; "
            f"save the file as {name}"
        ) from error


def existing(path: Path) -> Path:
    """``path``, with ``~`` expanded.

    Raises:
        SecuraError: It does not exist; the message names the first missing part and what lies beside it.
    """
    path = path.expanduser()
    if path.exists():
        return path
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    folder = missing.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    kind = "file or folder" if missing == path else "folder"
    raise SecuraError(f"no {kind} {missing}{suggest(missing.name, names, 'the folder holds')}")


def suggest(name: str, names: Iterable[str], otherwise: str) -> str:
    """The end of a message: the known name nearest to ``name``, else some of the known names."""
    names = list(names)
    folded = {known.casefold(): known for known in names}  # "Train.json" is near "train.json"
    near = get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{folded[near[0]]}'?"
    more = ", ..." if len(names) > _SHOWN else ""
    return f"; {otherwise} {', '.join(names[:_SHOWN])}{more}" if names else ""


def lookup(record: Record, column: str) -> Any:
    """The value of a column; dots reach into nested values (``choices.text``, ``answers.0``).

    Raises:
        SecuraError: There is no such column; the message names the nearest one.
    """
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise SecuraError(f"no column '{column}'{suggest(column, map(str, record), 'the columns are')}")
    return value


def text_of(value: Any, column: str) -> str:
    """A column's value as text: strings as they are, numbers and truth values as Python writes them.

    Raises:
        SecuraError: The value is missing (null or nan), infinite, or a list or object.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):  # nan is what pandas writes for an empty cell
        raise SecuraError(f"column '{column}' is {value}; fill it, or take the row out of the file")
    if isinstance(value, bool | int | float):
        return str(value)
    if value is None:
        raise SecuraError(f"column '{column}' is null; fill it, or take the row out of the file")
    hint = f"name one of its entries, such as '{column}.0'" if isinstance(value, list) else "name one of its fields"
    raise SecuraError(f"column '{column}' holds a {type(value).__name__}, not text; {hint}")


def documents(text: str, blank_lines: bool = True) -> list[str]:
    """The documents of a text: what lies between ``<|endoftext|>`` markers, or else between blank lines.

    Args:
        text: The content of a file.
        blank_lines: Whether blank lines separate documents where there is no marker; otherwise the text is one.
    """
    if END_OF_TEXT in text:
        parts = text.split(END_OF_TEXT)
    else:
        parts = re.split(r"\n[ \t\r]*(?:\n[ \t\r]*)+", text) if blank_lines else [text]
    return [part.strip() for part in parts if part.strip()]


# ------------------------------------------------------------------------------------------------------- formats


def parse_json(text: str, where: str, first_line: int = 1) -> Any:
    """A JSON text's value.

    Args:
        text: The text.
        where: The file, for messages.
        first_line: The text's line in the file.

    Raises:
        SecuraError: It is broken, nested too deeply, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if _LONE_SURROGATE.search(text):  # Python takes half a character, but nothing can tokenise or save it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise SecuraError(f"{where}, line {line}: broken JSON ({error.msg} at column {error.colno})") from error
    except UnicodeEncodeError as error:
        raise SecuraError(f"{where}, line {first_line}: half of a surrogate pair is no character") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise SecuraError(f"{where}, line {first_line}: cannot be read as JSON ({error})") from error


def _jsonl(path: Path, text: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: it cuts at U+2028 inside a string
        if line.strip():
            rows.append(_object(parse_json(line, str(path), number), f"{path}, line {number}"))
    return rows


def _json(path: Path, text: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    if not text.strip():
        return []
    try:
        value = parse_json(text, str(path))
    except SecuraError as error:
        if "Extra data" in str(error):
            raise SecuraError(f"{error}; a file of one object a line must be named .jsonl") from error
        raise
    if isinstance(value, dict):
        value = value.get("data", value.get("Data"))  # TriviaQA's files have a capital
    if not isinstance(value, list):
        raise SecuraError(f'{path}: must hold a list of objects, or {{"data": [...]}}')
    return [_object(item, f"{path}, row {number}") for number, item in enumerate(value, start=1)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SecuraError(f"{where}: a {type(value).__name__} where an object with columns must be")
    return value


def _csv(path: Path, text: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                yield reader.line_num, cells
        except csv.Error as error:
            raise SecuraError(f"{path}, line {reader.line_num}: broken csv ({error})") from error

    return _table(path, ((number, cells) for number, cells in lines() if cells), columns)


def _tsv(path: Path, text: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    # Without quoting: in GLUE's and WMT's files a quote is a character of the sentence. A line of empty cells is a row.
    lines = ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1))
    return _table(path, ((number, line.split("\t")) for number, line in lines if line), columns)


def _table(path: Path, lines: Iterable[tuple[int, list[str]]], columns: Sequence[str] | None) -> list[dict[str, Any]]:
    lines = iter(lines)
    names = list(columns or [name.strip() for name in next(lines, (0, []))[1]])
    if len(set(names)) < len(names):
        raise SecuraError(f"{path}: two columns have the same name ({', '.join(names)})")
    rows = []
    for number, cells in lines:
        if len(cells) != len(names):
            raise SecuraError(
                f"{path}, line {number}: {len(cells)} cells for {len(names)} columns ({', '.join(names[:_SHOWN])})"
            )
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


def _txt(path: Path, text: str, columns: Sequence[str] | None) -> list[dict[str, Any]]:
    return [{"text": document} for document in documents(text)]


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa  # it takes a second
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise SecuraError(f"{path}: broken parquet ({first[0]})") from error


_PARSERS: dict[str, Callable[[Path, str, Sequence[str] | None], list[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _txt,
}
SUFFIXES = (*_PARSERS, ".parquet")
"""Suffixes of the files that :func:`read_rows` reads."""
