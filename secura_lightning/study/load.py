"""Records from whatever a user names: a run's folder, a sweep's folder, a results.jsonl, or a folder of those."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.study.alike import drop_repeats, tell_settings_apart, tell_sources_apart
from secura_lightning.study.records import REPORT, RESULTS, Record, is_complete, read_lines, record_of, versions
from secura_lightning.study.settings import read_yaml

# Keys of a run's saved configuration that do not tell settings apart
_IGNORED = ("seed_everything", "model.seed", "data.seed", "name", "save_dir", "ckpt_path", "config",
            "trainer.enable_progress_bar")  # fmt: skip


def load(paths: Sequence[Path], stage: str = "main") -> list[Record]:
    """The complete runs below ``paths``, each with its ``axes``.

    Runs without a sweep get the axis ``run``, their name, and an axis for every setting in which runs of one name
    differ. Where runs of several sources look alike, the axis ``source`` tells them apart: the end of the path of their
    sweep's folder, of their file of results, or of their own folder. A run that is named twice counts once.

    Args:
        paths: Files and folders.
        stage: ``main``, or ``select`` for the search runs of sweeps.

    Raises:
        SecuraError: A path holds no runs, or a damaged one.
    """
    records = []
    for path in paths:
        found = [record for record in _below(path) if record.get("stage", "main") == stage]
        if not found:
            raise SecuraError(
                f"{path} holds no complete run; name a run's folder (with {REPORT}), a sweep's folder or its {RESULTS}"
            )
        records += found
    records = drop_repeats(records)
    tell_settings_apart(records)
    tell_sources_apart(records)
    return records


def _below(path: Path, depth: int = 3) -> Iterator[Record]:
    if not path.exists():
        raise SecuraError(f"no file or folder {path}")
    if path.is_file():
        if path.name == REPORT:
            yield from _below(path.parent)
        else:
            yield from _lines(path)
    elif (path / RESULTS).is_file():
        yield from _lines(path / RESULTS)
    elif (path / REPORT).is_file():
        yield from _run(path)
    elif depth:
        cell = _cell(path)
        for child in versions(path, cell["first_version"])[-1:] if cell else sorted(path.iterdir()):
            if child.is_dir():
                yield from _below(child, depth - 1)


def _lines(path: Path) -> Iterator[Record]:
    whole = path.resolve()
    source = str(whole.parent if whole.name == RESULTS else whole)
    try:
        for record in read_lines(path):
            yield {**record, "axes": dict(record["axes"]), "source": source}
    except (ValueError, TypeError, KeyError) as error:
        raise SecuraError(f"{path} is damaged, or no {RESULTS} of a sweep ({error})") from error


def _run(folder: Path) -> Iterator[Record]:
    """The record of one ``version_N``; none while it is not complete."""
    record = record_of(folder)
    if not is_complete(record):
        print(f"left out, not complete: {folder} ({_measured(record)} of {len(record['steps'])} rows)", file=sys.stderr)
        return
    cell, place = _cell(folder.parent), folder.resolve().parent
    if cell:
        own = {key: cell.get(key) for key in ("cell", "stage", "axes", "seconds", "memory_mb")}
        sweep = place.parents[len(Path(cell["cell"]).parts) - 1]  # search cells lie one folder deeper
        yield {**record, **own, "source": str(sweep)}
        return
    try:
        settings = dict(_flat(read_yaml(folder / "config.yaml")))
    except ConfigError:  # written without the command line
        settings = {}
    kept = {key: value for key, value in settings.items() if not key.startswith(_IGNORED)}
    run = {"cell": f"{place.name}/{folder.name}", "axes": {"run": place.name}, "settings": kept, "source": str(place)}
    yield {**record, **run}


def _measured(record: Record) -> int:
    return sum(step is not None for step in record["steps"])


def _cell(folder: Path) -> Record | None:
    try:
        found = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        return found if isinstance(found["axes"], dict) and {"cell", "stage", "first_version"} <= set(found) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
