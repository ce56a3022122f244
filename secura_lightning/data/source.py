"""Where a benchmark's records come from: a folder in its original layout, one file, or the hub.

Nothing is opened before :meth:`Source.records` is called, so that a configuration can be checked without its data.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secura_lightning.data.read import SUFFIXES, Record, existing
from secura_lightning.data.task import Split
from secura_lightning.errors import ConfigError, SecuraError

Records = Sequence[Record]

STEMS: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
"""Names of a split's file, whatever their case; ``-00000-of-00002`` may follow, as in the hub's own files."""
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class Hub:
    """A dataset on the Hugging Face hub.

    Attributes:
        id: Owner and name.
        config: Which of the dataset's configurations; None for its default.
        revision: Commit hash; a branch or tag may change what a run trains on.
        splits: The hub's name of each split that the dataset has.
    """

    id: str
    config: str | None
    revision: str
    splits: Mapping[Split, str]


class Source(ABC):
    """Records by split."""

    @abstractmethod
    def has(self, split: Split) -> bool:
        """Whether the source holds this split; what it lacks may be held out of the training rows."""

    @abstractmethod
    def where(self, split: Split) -> str:
        """The split's file or hub id, for messages."""

    def place(self, split: Split, index: int) -> str:
        """Where the record at ``index`` of the split's records stands, for messages."""
        return f"{self.where(split)}, row {index + 1}"

    @abstractmethod
    def records(self, split: Split) -> Records:
        """The split's records in a fixed order.

        Raises:
            SecuraError: They cannot be found or read.
        """


@dataclass(frozen=True, slots=True)
class FolderSource(Source):
    """A folder with one file (or several shards) per split; only the validation file may be missing.

    Attributes:
        folder: The folder.
        read: Reads one file.
        names: The file's name per split, where it is not one of :data:`STEMS`.
    """

    folder: Path
    read: Callable[[Path], Records]
    names: Mapping[Split, str]

    def has(self, split: Split) -> bool:
        """Training and test files must be there; see :meth:`records`."""
        return split != "validation" or self.holds(split)

    def holds(self, split: Split) -> bool:
        """Whether there is a file for the split."""
        return bool(self.files(split))

    def where(self, split: Split) -> str:
        """The split's first file."""
        files = self.files(split)
        return str(files[0] if files else self.folder)

    def place(self, split: Split, index: int) -> str:
        """The shard and its row; shards before it are read again, as their lengths are asked for by errors alone."""
        *earlier, last = self.files(split)
        for file in earlier:
            rows = len(self.read(file))
            if index < rows:
                return f"{file}, row {index + 1}"
            index -= rows
        return f"{last}, row {index + 1}"

    def records(self, split: Split) -> Records:
        """The rows of the split's file, or of its shards one after another."""
        files = self.files(split)
        if not files:
            held = ", ".join(sorted(entry.name for entry in self.folder.iterdir())[:8]) or "nothing"
            raise SecuraError(
                f"{self.folder} holds no {split} file ({' or '.join(STEMS[split])} with {', '.join(SUFFIXES)}), but "
                f"{held}; name the file in init_args.splits: {{{split}: FILE}}, or give a single file as init_args.path"
            )
        return self.read(files[0]) if len(files) == 1 else [row for file in files for row in self.read(file)]

    def files(self, split: Split) -> list[Path]:
        """The files of a split, in order; empty where there is none."""
        if split in self.names:
            return [existing(self.folder / self.names[split])]
        data = [file for file in sorted(self.folder.iterdir()) if file.suffix.lower() in SUFFIXES]
        # Several names may stand for validation; the first that occurs is the one meant.
        for stem in STEMS[split]:
            whole = [file for file in data if file.stem.lower() == stem]
            if len(whole) > 1:
                raise SecuraError(
                    f"{self.folder} holds {' and '.join(file.name for file in whole)}; "
                    f"name the one to read in init_args.splits: {{{split}: FILE}}"
                )
            found = whole or [file for file in data if _SHARD.sub("", file.stem.lower()) == stem]
            if found:
                return found
        return []


@dataclass(frozen=True, slots=True)
class FileSource(Source):
    """One file with all rows; the other splits are held out of it."""

    file: Path
    read: Callable[[Path], Records]

    def has(self, split: Split) -> bool:
        """A single file is training rows."""
        return split == "train"

    def where(self, split: Split) -> str:
        """The file."""
        return str(self.file)

    def records(self, split: Split) -> Records:
        """The file's rows."""
        return self.read(self.file)


@dataclass(frozen=True, slots=True)
class HubSource(Source):
    """A dataset of the hub, downloaded on first use."""

    hub: Hub

    def has(self, split: Split) -> bool:
        """Whether the dataset names this split."""
        return split in self.hub.splits

    def where(self, split: Split) -> str:
        """The dataset's id with the hub's name of the split."""
        return f"{self.hub.id}[{self.hub.splits[split]}]"

    def records(self, split: Split) -> Records:
        """The split's rows, memory-mapped."""
        return load_hub(self.hub.id, self.hub.config, self.hub.splits[split], self.hub.revision)


def load_hub(hub_id: str, config: str | None, split: str, revision: str) -> Records:
    """One split of a hub dataset, from the local cache where it holds that revision.

    Args:
        hub_id: Owner and name.
        config: The dataset's configuration; None for its default.
        split: The hub's name of the split.
        revision: Commit hash, branch or tag.

    Raises:
        SecuraError: The hub cannot be reached, or has no such dataset, configuration, revision or split.
    """
    from datasets import load_dataset  # it takes seconds

    found: Any
    try:
        found = load_dataset(hub_id, config, split=split, revision=revision)
    except ConnectionError as error:
        raise SecuraError(
            f"cannot reach the hub for {hub_id} at revision {revision}, and no copy is cached; "
            "set init_args.path to local files"
        ) from error
    except Exception as error:  # its types differ by version: missing ids, splits, gated repositories, broken files
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise SecuraError(f"the hub's {hub_id} (split {split}, revision {revision}): {first[0]}") from error
    return found


def open_source(
    path: str | None,
    hub: Hub | None,
    read: Callable[[Path], Records],
    names: Mapping[Split, str],
    subfolder: str | None = None,
) -> Source:
    """The source that a task's settings mean: ``path`` where it is given, else the hub.

    Args:
        path: A folder or a file.
        hub: The hub's dataset.
        read: Reads one file.
        names: File names by split, inside a folder.
        subfolder: Where ``path`` holds a whole collection, the folder of the one dataset in it.

    Raises:
        SecuraError: The path does not exist, or neither is given.
        ConfigError: There are names of files, but the path is one file itself.
    """
    if path is not None:
        place = existing(Path(path))
        if not place.is_dir():
            if names:
                raise ConfigError(
                    f"init_args.splits names files of a folder, but init_args.path is the file {place}; give "
                    "its folder as init_args.path, or remove init_args.splits"
                )
            return FileSource(place, read)
        folder = FolderSource(place, read, names)
        if subfolder is not None and not folder.holds("train"):
            folder = FolderSource(existing(place / subfolder), read, names)
        return folder
    if hub is None:
        raise SecuraError("init_args.path is missing: give the folder or file that holds the rows")
    return HubSource(hub)
