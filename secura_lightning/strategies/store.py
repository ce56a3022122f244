"""Where a replay buffer's rows lie: in memory, or in a file beside the run's checkpoints.

A row is kept as int32 words::

    token ids [t] | top-k logits [n, k], the bits of their fp32 | their token ids [n, k]

A file is only ever written at its end, so every checkpoint's rows stay where that checkpoint found them. A run that is
resumed goes on at the end that its checkpoint knows. Rows that later checkpoints hold may lie beyond it: as long as the
resumed run comes to the same rows, they are left as they are, and where it first comes to another one, it goes on in a
new file and leaves the old one to them::

    replay-buffer-rank0.bin      a a a a | b b b b         checkpoint 1 | checkpoint 2
    replay-buffer-rank0.1.bin    a a a a   c c c           resumed from checkpoint 1 with another learning rate

A file goes once no checkpoint of the run's folder names it: this is looked into when a run resumes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secura_lightning.errors import SecuraError

_WORD = 4  # bytes
_CHUNK = 1 << 22  # words that are copied at a time


class MemoryStore:
    """Rows in memory; a row's handle is its tensor."""

    def put(self, words: Tensor) -> Tensor:
        """Keep ``words`` [n]; returns the handle to get them by."""
        return words

    def get(self, handle: Any, n: int) -> Tensor:
        """The ``n`` words of a handle."""
        return handle

    def save(self, handles: list[Any]) -> tuple[Tensor, list[int]]:
        """All rows one after another, and where each begins."""
        sizes = [len(words) for words in handles]
        starts = np.cumsum([0, *sizes])[:-1].tolist() if sizes else []
        return torch.cat(handles) if handles else torch.zeros(0, dtype=torch.int32), starts

    def load(self, words: Tensor, start: int, n: int) -> Tensor:
        """The handle of a row that :meth:`save` put at ``start``."""
        return words[start : start + n].clone()


class FileStore:
    """Rows in a file; a row's handle is where it begins, in words.

    Args:
        path: The first file; a new run starts it anew. Later ones have a number before the suffix.

    Attributes:
        number: The current file's number.
        end: Its end, in words, as this run knows it.
        shared: Words up to which checkpoints hold rows in it, which must stay.
    """

    def __init__(self, path: Path) -> None:
        self.first = path
        self.number = 0
        self.end = 0
        self.shared = 0
        self._file: Any = None

    @property
    def path(self) -> Path:
        """The current file."""
        return numbered(self.first, self.number)

    def put(self, words: Tensor) -> int:
        """Append ``words`` [n]; returns the handle to get them by."""
        start, data = self.end, words.numpy().tobytes()
        if start < self.shared:
            if os.pread(self._open(), len(data), start * _WORD) == data:
                self.end += len(words)
                return start
            self._fork()
        self._write(data, start)
        self.end += len(words)
        return start

    def get(self, handle: int, n: int) -> Tensor:
        """The ``n`` words of a handle."""
        data = os.pread(self._open(), n * _WORD, handle * _WORD)
        return torch.from_numpy(np.frombuffer(data, dtype=np.int32).copy())

    def save(self, handles: list[int]) -> tuple[Tensor, list[int]]:
        """The file's end and number, and where each row begins; the rows themselves are made safe on disk."""
        os.fsync(self._open())
        return torch.tensor([self.end, self.number]), handles

    def load(self, words: Tensor, start: int, n: int) -> int:
        """The handle of a row that :meth:`save` put at ``start``."""
        return start

    def resume(self, words: Tensor, source: Path, kept: dict[int, int]) -> None:
        """Go on where :meth:`save` stood, in the run's own folder.

        Args:
            words: What it returned.
            source: The first file of the run that is resumed.
            kept: Number and end of the files that checkpoints of this run's folder name.

        Raises:
            SecuraError: The file is missing or too short.
        """
        end, self.number = [*words.tolist(), 0][:2]  # checkpoints of 0.1.0 have no number
        file = numbered(source, self.number)
        if not file.is_file() or file.stat().st_size < end * _WORD:
            raise SecuraError(
                f"--ckpt_path: {file} is missing or too short, and the checkpoint's replay buffer lies in it; it "
                "belongs beside the checkpoints folder"
            )
        self.end = 0
        if file.resolve() != self.path.resolve():
            self._copy(file, end)
        else:
            self.shared = kept.get(self.number, end)
            for number, other in numbers(self.first).items():
                if number not in (*kept, self.number):
                    other.unlink()
        self.end = end

    def _fork(self) -> None:
        """Go on in a new file, which begins as this one up to the end."""
        old, end = self.path, self.end
        self.close()
        self.number = max(numbers(self.first)) + 1
        self._copy(old, end)

    def _copy(self, source: Path, end: int) -> None:
        """Begin the current file with the first ``end`` words of another."""
        self.shared = self.end = 0
        with source.open("rb") as file:
            for start in range(0, end, _CHUNK):
                self._write(file.read(_WORD * min(_CHUNK, end - start)), start)
        self.end = end

    def _write(self, data: bytes, start: int) -> None:
        try:
            written = os.pwrite(self._open(), data, start * _WORD)
        except OSError as error:
            raise SecuraError(
                f"trainer.callbacks.ReplayBuffer.on_disk: cannot write {self.path} ({error.strerror})"
            ) from error
        if written != len(data):
            raise SecuraError(f"trainer.callbacks.ReplayBuffer.on_disk: cannot write {self.path} (the disk is full)")

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.end or self.shared else "w+b", buffering=0)
        return self._file.fileno()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def numbered(first: Path, number: int) -> Path:
    """The file with this number: the first itself has 0."""
    return first.with_suffix(f".{number}{first.suffix}") if number else first


def numbers(first: Path) -> dict[int, Path]:
    """The files of a buffer that exist, by number."""
    pattern = re.compile(re.escape(first.stem) + r"(?:\.(\d+))?" + re.escape(first.suffix))
    found = {int(match[1] or 0): path for path in first.parent.glob("*") if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items()))
