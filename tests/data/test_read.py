"""Whatever lies in a file: the right rows, or one line that says what is wrong and where."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from secura_lightning.data.read import SUFFIXES, documents, lookup, read_rows, text_of
from secura_lightning.data.template import Template
from secura_lightning.errors import ConfigError, SecuraError

ROWS = [
    {"question": 'Say "hi", twice', "answer": "hi\nhi"},
    {"question": "Grüße, 世界 \u2028 and \U0001f600", "answer": "42"},
]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(rows: list[dict[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"),
        ("escaped.jsonl", "\r\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("marked.JSON", "\ufeff" + json.dumps(ROWS)),
        ("a.csv", as_csv(ROWS)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert read_rows(put(tmp_path, name, content)) == ROWS


def test_parquet_keeps_types_and_nesting(tmp_path: Path) -> None:
    rows = [{"q": "why", "options": ["a", "b"], "label": 1}, {"q": "how", "options": ["c", "d"], "label": 0}]
    folder = tmp_path / "year=2020"  # not a partition: no column may come out of the path
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    assert read_rows(folder / "a.parquet") == rows


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    path = put(tmp_path, "a.tsv", 'en\tde\r\n"Yes, he said.\t"Ja", sagte er.\r\n')
    assert read_rows(path) == [{"en": '"Yes, he said.', "de": '"Ja", sagte er.'}]


def test_columns_name_a_table_without_header(tmp_path: Path) -> None:
    assert read_rows(put(tmp_path, "a.tsv", "Ja\tYes\n"), ["de", "en"]) == [{"de": "Ja", "en": "Yes"}]
    assert read_rows(put(tmp_path, "a.csv", "1,2\n3,4\n"), ["x", "y"]) == [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]
    with pytest.raises(SecuraError, match="columns names the columns of csv and tsv files only"):
        read_rows(put(tmp_path, "a.jsonl", "{}"), ["x"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one\nstill one\n\ntwo\n \t\n\nthree\n", ["one\nstill one", "two", "three"]),
        ("one\r\n\r\ntwo", ["one", "two"]),
        ("one\n\nstill one<|endoftext|>\ntwo<|endoftext|>\n", ["one\n\nstill one", "two"]),
    ],
)
def test_documents_of_a_text_file(tmp_path: Path, text: str, found: list[str]) -> None:
    assert read_rows(put(tmp_path, "a.txt", text)) == [{"text": document} for document in found]
    assert documents("a\n\nb", blank_lines=False) == ["a\n\nb"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"a\.jsonl, line 3: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"a\.jsonl, line 2: a list where an object with columns must be"),
        ("a.jsonl", '{"a": "\\ud83d"}', r"line 1: half of a surrogate pair"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"line 1: cannot be read as JSON"),
        ("a.jsonl", "[" * 100_000, r"line 1: cannot be read as JSON"),
        ("a.json", '[{"a": 1},\n {"a": }]', r"a\.json, line 2: broken JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"line 2: .*must be named \.jsonl"),
        ("a.json", '[{"a": 1}, 7]', r"a\.json, row 2: a int where an object"),
        ("a.json", '{"rows": []}', r'must hold a list of objects, or \{"data"'),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.jsonl", " \n\n", r"a\.jsonl holds no rows"),
        ("a.csv", "a,b\n", r"a\.csv holds no rows"),
        ("a.txt", "\n<|endoftext|>\n", r"a\.txt holds no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: 1 cells for 2 columns \(a, b\)"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', r"a\.csv, line 3: broken csv"),
        ("a.csv", "a,a\n1,2\n", r"two columns have the same name"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a\.tsv, line 2: 3 cells for 2 columns"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n', r"a\.jsonl, line 2: byte 18 \(0xe9\) is not UTF-8"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet: broken parquet"),
        ("a.xlsx", "", r"cannot read '\.xlsx' files; give one of \.jsonl"),
    ],
)
def test_bad_file_is_one_line_with_the_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(SecuraError, match=message) as caught:
        read_rows(put(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_rows_of_empty_cells_stay_and_empty_lines_go(tmp_path: Path) -> None:
    blank = {"a": "", "b": ""}
    for name, text in (("a.tsv", "a\tb\n\n1\t2\n\t\n\r\n"), ("a.csv", "a,b\n\n1,2\n,\n\r\n")):
        assert read_rows(put(tmp_path, name, text)) == [{"a": "1", "b": "2"}, blank]


def test_a_cell_may_hold_a_book(tmp_path: Path) -> None:
    book = "word " * 50_000
    assert read_rows(put(tmp_path, "a.csv", f'text,n\n"{book}",1\n')) == [{"text": book, "n": "1"}]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    put(tmp_path, "Train.jsonl", "{}")
    with pytest.raises(SecuraError, match=r"no file or folder .*train\.json; did you mean 'Train\.jsonl'\?"):
        read_rows(tmp_path / "train.json")
    with pytest.raises(SecuraError, match=r"no file or folder .*zzz\.csv; the folder holds Train\.jsonl"):
        read_rows(tmp_path / "zzz.csv")
    with pytest.raises(SecuraError, match=rf"no folder {tmp_path}/deep; the folder holds"):
        read_rows(tmp_path / "deep" / "er" / "train.jsonl")
    with pytest.raises(SecuraError, match="is a folder; give a file"):
        read_rows(tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    suffix=st.sampled_from(SUFFIXES),
    content=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='{}[]",:\\ud8\n\r\t ab0e-.<|>', max_size=120).map(str.encode),
        st.binary(max_size=60).map(lambda middle: b"PAR1" + middle + b"PAR1"),
    ),
)
@example(suffix=".jsonl", content=b'{"a": "\\udc00"}')
@example(suffix=".csv", content=b'a\n"\x00"x')
def test_any_bytes_are_rows_or_a_clear_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    try:
        rows = read_rows(put(tmp_path, f"fuzz{suffix}", content))
    except SecuraError:
        return
    assert rows
    for row in rows:
        assert isinstance(row, dict)
        json.dumps(row, default=str, ensure_ascii=False).encode()  # every text can be saved and tokenised


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(cells=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_whatever_was_written_is_read_back(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    rows = [{"question": q, "answer": a} for q, a in cells]
    for name, text in (
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("a.json", json.dumps({"data": rows})),
        ("a.csv", as_csv(rows)),
    ):
        assert read_rows(put(tmp_path, name, text)) == rows


RECORD = {
    "question": "why", "choices": {"text": ["a", "b"], "n": 2}, "a.b": "dotted", "none": None, "yes": True,
    "nan": float("nan"), "inf": float("-inf"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value"), [("question", "why"), ("choices.text.1", "b"), ("choices.n", 2), ("a.b", "dotted")]
)
def test_columns_are_found_by_path(column: str, value: Any) -> None:
    assert lookup(RECORD, column) == value


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("qestion", "no column 'qestion'; did you mean 'question'?"),
        ("choices.text.2", "no column 'choices.text.2'"),
        ("xyz", "no column 'xyz'; the columns are question, choices, a.b, none, yes, nan, inf"),
        ("none", "column 'none' is null"),
        ("nan", "column 'nan' is nan; fill it"),
        ("inf", "column 'inf' is -inf; fill it"),
        ("choices.text", "column 'choices.text' holds a list, not text; .* such as 'choices.text.0'"),
    ],
)
def test_absent_and_textless_columns_are_named(column: str, message: str) -> None:
    with pytest.raises(SecuraError, match=message):
        text_of(lookup(RECORD, column), column)


def test_template_fills_in_columns_and_nothing_else() -> None:
    template = Template("{{set}} {question}: {choices.text.0}|{yes}", "key")
    assert template.fields == ["question", "choices.text.0", "yes"]
    assert template.render({**RECORD, "question": " {yes} \n"}) == "{set} {yes}: a|True"


@pytest.mark.parametrize("text", ["{question", "question}", "{}", "{question!r}", "{question:>9}", "{quest}"])
def test_broken_template_names_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^init_args\.template: "):
        Template(text, "init_args.template", known=("question",))
