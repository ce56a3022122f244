"""What every real benchmark shares: local files or the hub, splits, limits, and checks of every row.

    source --records--> to_row --checks--> rows of a split

A split that the benchmark lacks is held out of its training rows: always the same rows, chosen by their text alone, and
never one whose prompt occurs twice, so that no prompt stands on both sides.
"""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from secura_lightning.data.read import Record, read_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Hub, Records, Source, open_source
from secura_lightning.data.task import Split, Task
from secura_lightning.data.template import Template, prompt_template
from secura_lightning.errors import ConfigError, SecuraError

# Rows held out where the benchmark lacks a split and no number is given: one in so many, and at most so many.
HELD_OUT: Mapping[Split, tuple[int, int]] = {"test": (10, 1000), "validation": (20, 500)}


class BenchmarkTask(Task):
    """A task over rows that exist: files in the benchmark's original layout, or its dataset on the hub.

    Args:
        name: Name of the task: its column of the matrix.
        metric: Metric of generated answers; multiple choice is scored by likelihood.
        template: The prompt, with columns in braces.
        path: Folder with a file per split, or one file, of which validation and test rows are held out.
        hub_id: Dataset on the hub, instead of the benchmark's own.
        hub_config: Configuration of that dataset.
        revision: Commit hash of that dataset.
        splits: Name of each split on the hub, or of its file in the folder, where it is another than usual.
        columns: Names of the columns of csv and tsv files that have no header line.
        n_train: Most training rows, drawn by ``seed``; null for all.
        n_validation: Most validation rows. Where the benchmark has none, so many are held out (0: none).
        n_test: Most test rows, drawn by ``seed``; null for all.
        max_answer_words: Leave out training rows with longer answers; how many is reported.
        max_new_tokens: Longest generated answer, in tokens.
        separator: Text between prompt and answer.
        seed: Seed of what the limits draw. Which rows are held out does not depend on it.
        stop: Texts that end a generated answer and are no part of it, such as a line break.
    """

    hub: ClassVar[Hub | None] = None
    """The benchmark's dataset on the hub."""
    fields: ClassVar[tuple[str, ...] | None] = None
    """Fields of the template; None where they are the columns of the data."""
    subfolder: str | None = None
    """The dataset's folder inside a collection that ``path`` may name."""
    unfit: str = "the benchmark does not use such rows"
    """Why :meth:`to_row` leaves a record out, for messages."""

    def __init__(
        self,
        name: str,
        metric: str,
        template: str,
        path: str | None = None,
        hub_id: str | None = None,
        hub_config: str | None = None,
        revision: str | None = None,
        splits: dict[Split, str] | None = None,
        columns: list[str] | None = None,
        n_train: int | None = None,
        n_validation: int | None = None,
        n_test: int | None = None,
        max_answer_words: int | None = None,
        max_new_tokens: int = 32,
        separator: str = " ",
        seed: int = 0,
        stop: list[str] | None = None,
    ) -> None:
        super().__init__(name, metric, max_new_tokens, separator, seed, stop)
        if "" in self.stop:
            raise ConfigError(f"task '{name}': init_args.stop holds an empty text, which would end every answer")
        if path is not None and (hub_id or hub_config or revision):
            raise ConfigError(f"task '{name}': init_args.path and init_args.hub_id (or its revision) are both set; "
                              "keep one")  # fmt: skip
        for key, value, least in (
            ("n_train", n_train, 1),
            ("n_validation", n_validation, 0),
            ("n_test", n_test, 1),
            ("max_answer_words", max_answer_words, 1),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"task '{name}': init_args.{key} is {value}; it must be at least {least}")
        self.template: Template = prompt_template(template, name, self.fields)
        self.path = path
        self.dataset = _choose_hub(self.hub, hub_id, hub_config, revision, splits)
        self.files = dict(splits or {})
        self.columns = columns
        self.limits: dict[Split, int | None] = {"train": n_train, "validation": n_validation, "test": n_test}
        self.max_answer_words = max_answer_words

    # ---------------------------------------------------------------- what a benchmark says

    @abstractmethod
    def to_row(self, id: str, record: Record, split: Split) -> Row | None:
        """One record as a row; None where the benchmark leaves such records out (how many is reported).

        Args:
            id: The row's id.
            record: Its columns.
            split: What it will serve for.

        Raises:
            SecuraError: Something is wrong with the record; file and row number are added to the message.
        """

    def read_file(self, path: Path) -> Records:
        """The records of one file."""
        return read_rows(path, self.columns)

    # ---------------------------------------------------------------- loading

    def load(self, split: Split) -> list[Row]:
        """The rows of a split, in the order of the file.

        Raises:
            SecuraError: Files, columns or rows are missing or broken.
        """
        try:
            rows = self._load(split)
        except SecuraError as error:
            raise type(error)(f"data.tasks: task '{self.name}': {error}") from error
        self._warn_of_overlap(split, rows)
        return rows

    def _load(self, split: Split) -> list[Row]:
        if split in self._missing or (split == "train" and self._missing):
            parts = self._parts
            return parts[split] if split != "train" else self._draw(split, len(parts[split]), parts[split].__getitem__)
        if split == "validation" and not self.source.has(split):
            return []  # n_validation: 0
        records = self.source.records(split)
        return self._draw(split, len(records), lambda i: self._row(records[i], i, split, split))

    def require_source(self) -> None:
        """Refuse a task that has no benchmark of its own and was given no data.

        Raises:
            ConfigError: Neither a path nor a dataset of the hub is set.
        """
        if self.path is None and self.dataset is None:
            raise ConfigError(f"task '{self.name}': give init_args.path (a folder or file) or init_args.hub_id")

    @cached_property
    def source(self) -> Source:
        """Where the records come from."""
        return open_source(self.path, self.dataset, self.read_file, self.files, self.subfolder)

    @property
    def _missing(self) -> list[Split]:
        """Splits to hold out of the training rows."""
        return [split for split in HELD_OUT if not self.source.has(split) and self.limits[split] != 0]

    @cached_property
    def _parts(self) -> dict[Split, list[Row]]:
        """The training file's rows, divided; a part's limit is applied where it is held out, the training one later."""
        records = self.source.records("train")
        found = ((i, self._row(record, i, "train", "train")) for i, record in enumerate(records))
        rows = {i: row for i, row in found if row is not None}
        self.report_left_out("train", len(records) - len(rows))
        counts = Counter(_own_text(row) for row in rows.values())
        once = [i for i, row in rows.items() if counts[_own_text(row)] == 1]
        once.sort(key=lambda i: hashlib.sha256(_own_text(rows[i]).encode()).digest())
        part_of: dict[int, Split] = {}
        for split in self._missing:
            share, most = HELD_OUT[split]
            wanted = self.limits[split]
            n = min(most, max(1, len(rows) // share)) if wanted is None else wanted
            free = [i for i in once if i not in part_of]
            if len(rows) - len(part_of) <= n or len(free) < n:
                what = "text" if self.is_text else "prompt"
                raise SecuraError(
                    f"{self.source.where('train')}: {n} {split} rows cannot be held out of {len(rows)} rows, "
                    f"{len(free)} of them with a {what} of their own; lower init_args.n_{split}"
                )
            part_of |= dict.fromkeys(free[:n], split)
            rank_zero_info(f"task '{self.name}': training rows held out for {split}: {n}")
        parts: dict[Split, list[Row]] = {"train": [], **{split: [] for split in self._missing}}
        for i, row in rows.items():
            part = part_of.get(i, "train")
            parts[part].append(row if part == "train" else self._row(records[i], i, "train", part) or row)
        return parts

    def _draw(self, split: Split, n: int, row: Callable[[int], Row | None]) -> list[Row]:
        """At most the split's limit of ``n`` rows, drawn by the seed and in their order."""
        wanted = self.limits[split]
        order: Sequence[int] = range(n)
        if wanted is not None and wanted < n:
            order = random.Random(f"{self.name}/{split}/{self.seed}").sample(order, n)
        kept: dict[int, Row] = {}
        long = unfit = 0
        for i in order:
            if wanted is not None and len(kept) == wanted:
                break
            found = row(i)
            if found is None:
                unfit += 1
            elif split == "train" and self.max_answer_words and len(found.answer.split()) > self.max_answer_words:
                long += 1
            else:
                kept[i] = found
        self.report_left_out(split, unfit)
        if long:
            rank_zero_warn(f"task '{self.name}': left out {long} rows with more than {self.max_answer_words} words")
        if not kept:
            reason = f"all {long} have more than max_answer_words={self.max_answer_words} words" if long else self.unfit
            raise SecuraError(f"{self.source.where(split)}: none of {n} {split} rows is left: {reason}")
        if wanted is not None and len(kept) < wanted:
            rank_zero_warn(f"task '{self.name}': n_{split}={wanted}, but there are only {len(kept)} rows")
        return [kept[i] for i in sorted(kept)]

    def report_left_out(self, split: Split, count: int) -> None:
        """Say how many records the benchmark left out of a split."""
        if count:
            rank_zero_warn(f"task '{self.name}': left out {count} {split} rows: {self.unfit}")

    def _row(self, record: Record, index: int, file: Split, split: Split) -> Row | None:
        """The row of one record, checked; ``file`` is the split that it was read from."""
        try:
            row = self.to_row(f"{file}/{index + 1}", record, split)
            if row is not None:
                check(row, self.is_text)
        except SecuraError as error:
            raise type(error)(f"{self.source.place(file, index)}: {error}") from error
        return row

    def _warn_of_overlap(self, split: Split, rows: Sequence[Row]) -> None:
        other: Split = "test" if split == "train" else "train"
        if split == "validation" or other not in self._rows:
            return
        train, test = (rows, self._rows[other]) if split == "train" else (self._rows[other], rows)
        known = {_own_text(row) for row in train}
        shared = sum(_own_text(row) in known for row in test)
        what = "documents" if self.is_text else "prompts"
        if shared:
            rank_zero_warn(f"task '{self.name}': {shared} of {len(test)} test {what} are training {what} too")


def _own_text(row: Row) -> str:
    """What may not stand in two splits: the prompt, or the document where there is none."""
    return row.prompt or row.answer


def check(row: Row, is_text: bool = False) -> None:
    """Refuse a row that cannot be trained on or scored.

    Args:
        row: The row.
        is_text: Whether it is a document of a text task, which has no prompt.

    Raises:
        SecuraError: Its prompt or answer is empty, or its choices are too few, equal, or lack the answer.
    """
    if is_text:
        if not row.answer.strip():
            raise SecuraError("the document is empty; fill the columns that init_args.template names, or remove it")
        return
    if not row.prompt.strip():
        raise SecuraError("the prompt is empty; fill the columns that init_args.template names, or remove the row")
    if not row.answer.strip():
        raise SecuraError("the answer is empty; fill it, or remove the row")
    if not row.choices:
        return
    if len(set(row.choices)) < max(2, len(row.choices)) or not all(choice.strip() for choice in row.choices):
        raise SecuraError(f"choices must be two or more, all different and none empty: {list(row.choices)}")
    if row.answer not in row.choices:
        raise SecuraError(f"the answer {row.answer!r} is not among the choices {list(row.choices)}")


def lettered(options: Sequence[str]) -> str:
    """Options as lines ``A. ...``, ``B. ...``."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters(len(options)), options, strict=True))


def number(text: str) -> int:
    """A short decimal number, such as the index of a choice; -1 for any other text."""
    return int(text) if text.isdecimal() and len(text) < 4 else -1


def letters(n: int) -> tuple[str, ...]:
    """The first ``n`` capital letters.

    Raises:
        SecuraError: There are more options than letters.
    """
    if n > 26:
        raise SecuraError(f"{n} options, but only 26 letters to name them by")
    return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:n])


def _choose_hub(
    own: Hub | None, hub_id: str | None, config: str | None, revision: str | None, splits: dict[Split, str] | None
) -> Hub | None:
    """The benchmark's own dataset with the user's changes, or the user's."""
    if hub_id is not None:
        names = splits or (own.splits if own else {"train": "train", "test": "test"})
        return Hub(hub_id, config, revision or "main", names)
    if own is None:
        return None
    return Hub(own.id, config or own.config, revision or own.revision, splits or own.splits)
