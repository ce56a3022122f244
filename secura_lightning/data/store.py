"""Encoded rows in flat arrays: four bytes a token, in memory or mapped from a folder.

    ids.bin    int32 [tokens]      all rows' token ids, one after another
    rows.bin   int32 [rows, 3]     each row's tokens, prompt tokens, and prompt tokens dropped
    done.json                      counts, written last: a folder without it is half written

A mapped store takes memory only for the pages that batches touch, whatever the size of the data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from secura_lightning.data.encode import Encoded
from secura_lightning.errors import SecuraError

_DIGESTED = 256  # rows


class EncodedRows(Sequence[Encoded]):
    """Encoded rows by index.

    Args:
        ids: All token ids, ``[tokens]`` of int32.
        table: Tokens, prompt tokens and dropped tokens of each row, ``[rows, 3]`` of int32.
        folder: Where the arrays are mapped from; None in memory.
    """

    def __init__(self, ids: NDArray[np.int32], table: NDArray[np.int32], folder: Path | None = None) -> None:
        self.ids = ids
        self.table = table
        self.folder = folder
        self.ends = np.cumsum(table[:, 0], dtype=np.int64)

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> EncodedRows:
        """The same rows, in memory."""
        return cls(*_arrays(rows))

    @classmethod
    def open(cls, folder: Path) -> EncodedRows:
        """Map the rows that a :class:`StoreWriter` finished.

        Raises:
            SecuraError: The files do not have the sizes that were written.
        """
        counts = json.loads((folder / "done.json").read_text())
        ids, table = folder / "ids.bin", folder / "rows.bin"
        if ids.stat().st_size != 4 * counts["tokens"] or table.stat().st_size != 12 * counts["rows"]:
            raise SecuraError(f"data.cache: {folder} is damaged; delete that folder")
        mapped = np.memmap(ids, dtype=np.int32, mode="r")
        return cls(mapped, np.fromfile(table, dtype=np.int32).reshape(-1, 3), folder)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        """One row, its ids a view of the store."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        length, n_prompt, dropped = self.table[index].tolist()
        end = int(self.ends[index])
        return Encoded(self.ids[end - length : end], n_prompt, dropped)

    def __reduce__(self) -> Any:
        """A mapped store goes to another process as its folder's name."""
        return (EncodedRows, (self.ids, self.table)) if self.folder is None else (EncodedRows.open, (self.folder,))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return self.table[:, 0]

    @property
    def trained(self) -> NDArray[np.int32]:
        """Tokens of each row that are predicted; see :attr:`Encoded.n_trained`."""
        return self.table[:, 0] - np.maximum(1, self.table[:, 1])

    @property
    def truncated(self) -> NDArray[np.int32]:
        """Prompt tokens that each row lost."""
        return self.table[:, 2]

    @property
    def digest(self) -> str:
        """A hash of the first rows, which another template, tokenizer or file changes."""
        tokens = int(self.ends[:_DIGESTED][-1]) if len(self.ends) else 0
        return hashlib.sha256(np.ascontiguousarray(self.ids[:tokens]).tobytes()).hexdigest()[:16]


class StoreWriter:
    """Write a store chunk by chunk into ``folder``, which appears only once it is whole.

    >>> with StoreWriter(folder) as writer:
    ...     writer.add(rows)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        self.tokens = 0

    def __enter__(self) -> StoreWriter:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._part = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f"{self.folder.name}.", suffix=".part"))
        except OSError as error:
            raise SecuraError(f"data.cache: cannot write to {self.folder.parent} ({error.strerror})") from error
        self._ids = (self._part / "ids.bin").open("wb")
        self._table = (self._part / "rows.bin").open("wb")
        return self

    def add(self, rows: Sequence[Encoded]) -> None:
        """Append rows."""
        ids, table = _arrays(rows)
        self._ids.write(ids.tobytes())
        self._table.write(table.tobytes())
        self.rows += len(table)
        self.tokens += len(ids)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ids.close()
        self._table.close()
        try:
            # Nothing to map, or another process was quicker: what it wrote under this name is the same.
            if kind is None and self.tokens and not (self.folder / "done.json").exists():
                (self._part / "done.json").write_text(json.dumps({"rows": self.rows, "tokens": self.tokens}))
                shutil.rmtree(self.folder, ignore_errors=True)
                self._part.rename(self.folder)
        finally:
            shutil.rmtree(self._part, ignore_errors=True)


def lengths_of(rows: Sequence[Encoded]) -> NDArray[np.int32]:
    """Tokens of each row, ``[rows]``."""
    return rows.lengths if isinstance(rows, EncodedRows) else np.array([len(row.ids) for row in rows], dtype=np.int32)


def _arrays(rows: Iterable[Encoded]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    rows = list(rows)
    table = np.array([(len(row.ids), row.n_prompt, row.truncated) for row in rows], dtype=np.int32).reshape(-1, 3)
    parts = [np.asarray(row.ids, dtype=np.int32) for row in rows]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32), table
