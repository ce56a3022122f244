"""A task's training rows as token ids: in chunks, on several processes, kept on disk under a fingerprint.

    rows --chunks--> encode_rows (num_proc processes) --> memory, or DIR/<fingerprint>/ mapped from disk

The fingerprint covers the tokenizer, every rendered row, the separator or what the chat template writes, and the
length: whatever changes the token ids changes it. Small sets are encoded anew each time, which is quicker than looking
after files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secura_lightning.data.encode import Encoded, encode_rows, encode_texts, pack
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.data.rows import Row
from secura_lightning.data.store import EncodedRows, StoreWriter
from secura_lightning.data.stream import stream_rows
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError, SecuraError

CACHE = "~/.cache/secura_lightning/encoded"
CACHE_FROM = 10_000  # rows; fewer are encoded in a few seconds
CHUNK = 1_000  # rows tokenised by one call
_FORMAT = 2  # of the cache: raise it when the same rows come to mean other token ids


@dataclass(frozen=True, slots=True)
class Tokeniser:
    """How training rows become token ids.

    Attributes:
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a row; a text task's rows are packed into blocks of this length.
        cache: Folder that keeps encoded rows; None keeps nothing.
        num_proc: Processes that tokenise.
        streaming: Read the rows one after another, never all at once, and map the encoded ones from ``cache``.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    cache: str | None = CACHE
    num_proc: int = 1
    streaming: bool = False

    def encode(self, task: Task) -> EncodedRows:
        """The training rows of a task, in their order.

        Raises:
            SecuraError: There are none, or one cannot be encoded.
            ConfigError: They cannot be streamed.
        """
        folder = self.folder(task)
        if folder is not None and (folder / "done.json").exists():
            return EncodedRows.open(folder)
        parts = self._encode(task)
        if folder is None:
            found = EncodedRows.of([row for part in parts for row in part])
        else:
            with StoreWriter(folder) as writer:
                for part in parts:
                    writer.add(part)
            found = EncodedRows.open(folder) if writer.tokens else EncodedRows.of([])
        if not len(found):
            if task.is_text and (self.streaming or task.rows("train")):
                raise SecuraError(f"data.tasks: the text of '{task.name}' fills no block of data.max_length tokens")
            raise SecuraError(f"data.tasks: task '{task.name}' has no training rows")
        return found

    def folder(self, task: Task) -> Path | None:
        """Where the task's encoded rows are kept; None where they are not."""
        if self.cache is None or not (self.streaming or len(task.rows("train")) >= CACHE_FROM):
            return None
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            if self.streaming:
                raise ConfigError(
                    "data.streaming: this tokenizer has no fast form, whose settings can be fingerprinted"
                )
            return None
        return Path(self.cache).expanduser() / self.fingerprint(task)

    def fingerprint(self, task: Task) -> str:
        """What the task's token ids depend on, in 24 hexadecimal digits; the tokenizer must be a fast one."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        frame = None if task.is_text else astuple(task.prompt_format.frame(self.tokenizer))
        settings = [_FORMAT, special, self.max_length, frame, task.is_text]
        digest.update(json.dumps(settings).encode())
        for row in tqdm(self._rows(task), desc=f"fingerprint of '{task.name}'", leave=False, disable=None):
            digest.update(f"\n{len(row.prompt)} {len(row.answer)} {row.prompt}{row.answer}".encode())
        return digest.hexdigest()[:24]

    def _rows(self, task: Task) -> Iterable[Row]:
        return stream_rows(task) if self.streaming else task.rows("train")

    def _encode(self, task: Task) -> Iterator[list[Encoded]]:
        """The encoded rows, chunk by chunk; the tail of a text that fills no block is dropped once, at the end."""
        total = None if self.streaming else len(task.rows("train"))
        left: list[int] = []
        with tqdm(total=total, desc=f"encoding '{task.name}'", unit="row", leave=False, disable=None) as bar:
            for n, part in self._chunks(task):
                bar.update(n)
                if not task.is_text:
                    yield part  # type: ignore[misc]
                    continue
                left += [token for ids in part for token in ids]  # type: ignore[union-attr]
                blocks = pack([left], self.max_length)
                del left[: len(blocks) * self.max_length]
                yield blocks

    def _chunks(self, task: Task) -> Iterator[tuple[int, list[Encoded] | list[list[int]]]]:
        """Chunks in order, with their numbers of rows; at most a few wait in memory."""
        rows = iter(self._rows(task))
        chunks = iter(lambda: list(islice(rows, CHUNK)), [])
        job = _Job(self.tokenizer, self.max_length, task.prompt_format, task.is_text)
        few = not self.streaming and len(task.rows("train")) <= CHUNK
        if self.num_proc == 1 or few:
            for chunk in chunks:
                yield len(chunk), job.run(chunk)
            return
        with ProcessPoolExecutor(self.num_proc, initializer=_start, initargs=(job,)) as pool:
            waiting: list[tuple[int, Future[list[Encoded] | list[list[int]]]]] = []
            for chunk in chunks:
                waiting.append((len(chunk), pool.submit(_run, chunk)))
                if len(waiting) > 2 * self.num_proc:
                    n, first = waiting.pop(0)
                    yield n, first.result()
            for n, first in waiting:
                yield n, first.result()


@dataclass(frozen=True, slots=True)
class _Job:
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    form: PromptFormat
    is_text: bool

    def run(self, rows: Sequence[Row]) -> list[Encoded] | list[list[int]]:
        if self.is_text:
            return encode_texts(self.tokenizer, [row.answer for row in rows])
        return encode_rows(self.tokenizer, rows, self.max_length, self.form)


_job: list[_Job] = []  # of a worker process: the tokenizer is sent once, not with every chunk


def _start(job: _Job) -> None:
    _job[:] = [job]


def _run(rows: Sequence[Row]) -> list[Encoded] | list[list[int]]:
    return _job[0].run(rows)
