"""Where a replay buffer's rows lie: in memory, or in a file beside the run's checkpoints.

A row is kept as int32 words::

    token ids [t] | top-k logits [n, k], the bits of their fp32 | their token ids [n, k]

The file is only ever written at its end, so every checkpoint's rows stay where that checkpoint found them. A resumed
run goes on writing at the end that its checkpoint knows, over what a killed run wrote later.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secura_lightning.errors import SecuraError

_WORD = 4  # bytes


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
        path: The file; a new run starts it anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._file: Any = None

    def put(self, words: Tensor) -> int:
        """Append ``words`` [n]; returns the handle to get them by."""
        start, data = self.end, words.numpy().tobytes()
        try:
            written = os.pwrite(self._open(), data, start * _WORD)
        except OSError as error:
            raise SecuraError(
                f"trainer.callbacks.ReplayBuffer.on_disk: cannot write {self.path} ({error.strerror})"
            ) from error
        if written != len(data):
            raise SecuraError(f"trainer.callbacks.ReplayBuffer.on_disk: cannot write {self.path} (the disk is full)")
        self.end += len(words)
        return start

    def get(self, handle: int, n: int) -> Tensor:
        """The ``n`` words of a handle."""
        data = os.pread(self._open(), n * _WORD, handle * _WORD)
        return torch.from_numpy(np.frombuffer(data, dtype=np.int32).copy())

    def save(self, handles: list[int]) -> tuple[Tensor, list[int]]:
        """Where the file ends, and where each row begins; the rows themselves are made safe on disk."""
        os.fsync(self._open())
        return torch.tensor([self.end]), handles

    def load(self, words: Tensor, start: int, n: int) -> int:
        """The handle of a row that :meth:`save` put at ``start``."""
        return start

    def resume(self, end: int, source: Path) -> None:
        """Go on at ``end``, in the file that ``source`` names if that is another one.

        Raises:
            SecuraError: The file is missing or too short.
        """
        if not source.is_file() or source.stat().st_size < end * _WORD:
            raise SecuraError(
                f"--ckpt_path: {source} is missing or too short, and the checkpoint's replay buffer lies in it; it "
                "belongs beside the checkpoints folder"
            )
        if source.resolve() != self.path.resolve():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.path)
        self.end = end

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.end else "w+b", buffering=0)
        return self._file.fileno()
