"""Token ids are the same from memory, from the disk, from several processes and from a stream."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secura_lightning.data import tokenise
from secura_lightning.data.encode import Encoded, encode_rows, encode_texts
from secura_lightning.data.rows import Row
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.data.store import EncodedRows, StoreWriter
from secura_lightning.data.task import Task
from secura_lightning.data.tasks.table import TableTask
from secura_lightning.data.tokenise import Tokeniser
from secura_lightning.errors import ConfigError, SecuraError
from tests.evaluation.tiny import ListTask

ROWS = [Row(str(i), f"What is {i} + {i % 7}?", str(i + i % 7)) for i in range(50)]


class Document(ListTask):
    is_text = True


def same(left: EncodedRows, right: EncodedRows) -> bool:
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.table, right.table)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of a few rows are kept, and cut into several chunks."""
    monkeypatch.setattr(tokenise, "CACHE_FROM", 20)
    monkeypatch.setattr(tokenise, "CHUNK", 8)


def test_rows_are_those_of_one_at_a_time(tokenizer: Any) -> None:
    found = Tokeniser(tokenizer, 9, None).encode(ListTask("list", ROWS))
    for row, encoded in zip(ROWS, found, strict=True):
        alone = encode_rows(tokenizer, [row], 9)[0]
        assert (encoded.ids.tolist(), encoded.n_prompt, encoded.truncated) == (
            list(alone.ids), alone.n_prompt, alone.truncated,
        )  # fmt: skip
    assert found.truncated.any()
    assert found.trained.tolist() == [row.n_trained for row in found]


@pytest.mark.usefixtures("small")
def test_cache_gives_the_same_rows_and_is_read_instead_of_encoding(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ListTask("list", ROWS)
    fresh = Tokeniser(tokenizer, 32, None).encode(task)
    first = Tokeniser(tokenizer, 32, str(tmp_path)).encode(task)
    monkeypatch.setattr(tokenise, "encode_rows", None)  # whoever encodes now fails
    second = Tokeniser(tokenizer, 32, str(tmp_path)).encode(task)
    assert same(fresh, first)
    assert same(fresh, second)
    assert isinstance(second.ids, np.memmap)
    again = pickle.loads(pickle.dumps(second))
    assert isinstance(again.ids, np.memmap)  # a worker maps the file, too
    assert [path.name for path in tmp_path.iterdir()] == [second.folder.name]


@pytest.mark.usefixtures("small")
def test_whatever_changes_the_ids_changes_the_fingerprint(tokenizer: Any, tmp_path: Path) -> None:
    def folder(rows: list[Row] = ROWS, max_length: int = 32, separator: str = " ") -> Path | None:
        task = ListTask("list", rows)
        task.separator = separator
        return Tokeniser(tokenizer, max_length, str(tmp_path)).folder(task)

    other = [*ROWS[:-1], Row("49", ROWS[-1].prompt, "another")]
    shifted = [*ROWS[:-1], Row("49", ROWS[-1].prompt[:-1], ROWS[-1].prompt[-1] + ROWS[-1].answer)]
    folders = [folder(), folder(other), folder(shifted), folder(max_length=33), folder(separator="\n")]
    assert len(set(folders)) == 5
    assert folder() == folders[0]
    assert folder(ROWS[:19]) is None


@pytest.mark.usefixtures("small")
def test_several_processes_keep_the_order(tokenizer: Any) -> None:
    task = ListTask("list", ROWS)
    assert same(Tokeniser(tokenizer, 32, None, num_proc=2).encode(task), Tokeniser(tokenizer, 32, None).encode(task))


@pytest.mark.usefixtures("small")
def test_text_loses_one_tail_whatever_the_chunks(tokenizer: Any) -> None:
    texts = [f"The number {i} follows {i - 1}." for i in range(50)]
    found = Tokeniser(tokenizer, 16, None).encode(Document("text", [Row("", "", text) for text in texts]))
    stream = [token for text in texts for token in encode_texts(tokenizer, [text])[0]]
    assert found.ids.tolist() == stream[: len(stream) // 16 * 16]
    assert set(found.lengths) == {16}


def test_a_half_written_store_is_no_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"

    class Stopped(Exception):
        pass

    def write(stop: bool) -> None:
        with StoreWriter(folder) as writer:
            writer.add([Encoded([1, 2, 3], 1)])
            if stop:
                raise Stopped

    with pytest.raises(Stopped):
        write(stop=True)
    assert not list(tmp_path.iterdir())
    write(stop=False)
    assert EncodedRows.open(folder)[0].ids.tolist() == [1, 2, 3]
    (folder / "ids.bin").write_bytes(b"1234")
    with pytest.raises(SecuraError, match=r"data\.cache: .* is damaged; delete that folder"):
        EncodedRows.open(folder)


def table(folder: Path, **settings: Any) -> Task:
    return TableTask(name="table", path=str(folder), template="{question}", metric="exact", **settings)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("validation", ROWS[:3]), ("test", ROWS[:5])):
        lines = [json.dumps({"question": row.prompt, "answer": row.answer}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


@pytest.mark.usefixtures("small")
def test_a_stream_trains_on_the_same_batches_without_the_rows_in_memory(
    tokenizer: Any, tmp_path: Path, files: Path
) -> None:
    def batches(streaming: bool) -> tuple[Task, list[Any]]:
        task = table(files)
        data = SequenceDataModule(
            [task], batch_size=4, max_length=32, cache=str(tmp_path / "cache"), streaming=streaming
        )
        data.lay_out(tokenizer)
        return task, [batch["input_ids"].tolist() for batch in map(data.batches().__getitem__, range(12))]

    streamed, one = batches(True)
    _, other = batches(False)
    assert one == other
    assert "train" not in streamed._rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"question": "q"', "train.jsonl, line 1: broken JSON"),
        ("train.jsonl", '{"question": "q", "answer": " "}\n', "row 1: the answer is empty"),
        ("train.jsonl", "[1]\n", "line 1: a list where an object must be"),
        ("train.csv", "question,answer\na,b\n", "cannot be read row by row; save it as one of .jsonl, .parquet"),
        ("train.parquet", "PAR", "broken parquet"),
    ],
)
def test_what_a_stream_cannot_read_is_named(tmp_path: Path, files: Path, name: str, content: str, message: str) -> None:
    (files / "train.jsonl").unlink()
    (files / name).write_text(content)
    data = SequenceDataModule([table(files)], streaming=True)
    with pytest.raises(SecuraError, match=message):
        list(data.training_rows(data.tasks[0]))


def test_a_stream_refuses_what_takes_all_rows_at_once(files: Path) -> None:
    for settings, message in (({"n_train": 5}, "init_args.n_train"), ({"path": files / "train.jsonl"}, "test rows")):
        task = table(files, **settings) if "path" not in settings else table(files / "train.jsonl")
        with pytest.raises(ConfigError, match=message):
            list(SequenceDataModule([task], streaming=True).training_rows(task))
