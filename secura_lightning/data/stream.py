"""Rows of data larger than memory: one record after another from the file or the hub's memory-mapped table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from secura_lightning.data.benchmark import BenchmarkTask, check
from secura_lightning.data.read import Record, parse_json
from secura_lightning.data.rows import Row
from secura_lightning.data.source import FolderSource, HubSource, Source
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError, SecuraError

STREAMED = (".jsonl", ".parquet")
"""Suffixes of the files that can be read record by record."""


def stream_rows(task: Task) -> Iterator[Row]:
    """The training rows of a task, each read, rendered and checked when it is asked for.

    They are the rows that ``task.rows("train")`` would hold, in the same order.

    Raises:
        ConfigError: The task does not read records, or needs all of them at once: for a limit, for rows held out of
            the training ones, or for the layout of its file.
        SecuraError: A record is broken; the message names the file and the row.
    """
    if not isinstance(task, BenchmarkTask):
        raise ConfigError(f"data.streaming: task '{task.name}' is not read from files or the hub; set it to false")
    source = task.source
    for split in ("test", "validation"):
        if not source.has(split) and task.limits[split] != 0:
            raise ConfigError(
                f"data.streaming: task '{task.name}' holds its {split} rows out of the training rows, which takes all "
                f"of them at once; give them a file of their own, or set init_args.n_{split}: 0"
            )
    for key, value in (("n_train", task.limits["train"]), ("max_answer_words", task.max_answer_words)):
        if value is not None:
            raise ConfigError(f"data.streaming: task '{task.name}' draws its rows (init_args.{key}); set it to null")
    unfit = 0
    for number, (place, index, record) in enumerate(_placed(source, task.name), start=1):
        try:
            row = task.to_row(f"train/{number}", record, "train")
            if row is not None:
                check(row, task.is_text)
        except SecuraError as error:
            raise type(error)(f"data.tasks: task '{task.name}': {place}, row {index}: {error}") from error
        if row is None:
            unfit += 1
        else:
            yield row
    task.report_left_out("train", unfit)


def _placed(source: Source, task: str) -> Iterator[tuple[str, int, Record]]:
    """The training records, each after its file (or the hub's split) and its row there."""
    if isinstance(source, HubSource):
        parts: Iterable[tuple[str, Iterable[Record]]] = [(source.where("train"), source.records("train"))]
    elif isinstance(source, FolderSource):
        if not source.holds("train"):
            source.records("train")  # says what the folder holds instead
        parts = ((str(file), _records(file)) for file in source.files("train"))
    else:
        raise ConfigError(f"data.streaming: task '{task}' has no file of its own for training rows")
    for place, records in parts:
        for index, record in enumerate(records, start=1):
            yield place, index, record


def _records(file: Path) -> Iterator[Record]:
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl(file)
    if suffix == ".parquet":
        return _parquet(file)
    raise ConfigError(f"data.streaming: {file} cannot be read row by row; save it as one of {', '.join(STREAMED)}")


def _jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SecuraError(
                    f"{file}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            if text.strip():
                record = parse_json(text, str(file), number)
                if not isinstance(record, dict):
                    raise SecuraError(f"{file}, line {number}: a {type(record).__name__} where an object must be")
                yield record


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa  # it takes a second
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(1_000):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise SecuraError(f"{file}: broken parquet ({first[0]})") from error
