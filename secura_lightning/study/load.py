"""Records from whatever a user names: a run's folder, a sweep's folder, a results.jsonl, or a folder of those."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.study.axes import show
from secura_lightning.study.records import REPORT, RESULTS, Record, is_complete, record_of, versions
from secura_lightning.study.settings import read_yaml

SEEDS = ("seed", "seed_everything")
"""Axes that repeat a run instead of changing it."""
# Keys of a run's saved configuration that do not tell settings apart
_IGNORED = ("seed_everything", "model.seed", "data.seed", "name", "save_dir", "ckpt_path", "config",
            "trainer.enable_progress_bar")  # fmt: skip


def load(paths: Sequence[Path], stage: str = "main") -> list[Record]:
    """The complete runs below ``paths``, each with its ``axes``.

    Runs without a sweep get the axis ``run``, their name, and an axis for every setting in which runs of one name
    differ. Where two sweeps hold the same cell, the axis ``source`` tells them apart.

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
    _tell_settings_apart([record for record in records if "settings" in record])
    return _tell_sources_apart(records)


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
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield {**record, "axes": dict(record["axes"]), "source": path.resolve().parent.name}
    except (ValueError, TypeError, KeyError) as error:
        raise SecuraError(f"{path} is damaged, or no {RESULTS} of a sweep ({error})") from error


def _run(folder: Path) -> Iterator[Record]:
    """The record of one ``version_N``; none while it is not complete."""
    record = record_of(folder)
    if not is_complete(record):
        print(f"left out, not complete: {folder} ({_measured(record)} of {len(record['steps'])} rows)", file=sys.stderr)
        return
    cell = _cell(folder.parent)
    name = folder.resolve().parent.name
    if cell:
        own = {key: cell.get(key) for key in ("cell", "stage", "axes", "seconds", "memory_mb")}
        yield {**record, **own, "source": folder.resolve().parent.parent.name}
        return
    try:
        settings = dict(_flat(read_yaml(folder / "config.yaml")))
    except ConfigError:  # written without the command line
        settings = {}
    kept = {key: value for key, value in settings.items() if not key.startswith(_IGNORED)}
    yield {**record, "cell": f"{name}/{folder.name}", "axes": {"run": name}, "settings": kept, "source": ""}


def _measured(record: Record) -> int:
    return sum(step is not None for step in record["steps"])


def _cell(folder: Path) -> Record | None:
    try:
        found = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        return found if isinstance(found.get("axes"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _tell_settings_apart(records: list[Record]) -> None:
    """Give runs of one name an axis for every setting that differs among them."""
    for name in {record["axes"]["run"] for record in records}:
        same = [record for record in records if record["axes"]["run"] == name]
        keys = dict.fromkeys(key for record in same for key in record["settings"])
        differing = [key for key in keys if len({show(record["settings"].get(key)) for record in same}) > 1]
        short = [key.rsplit(".", 1)[-1] for key in differing]
        for record in same:
            for key, label in zip(differing, short, strict=True):
                axis = key if short.count(label) > 1 else label
                record["axes"][axis] = show(record["settings"].get(key))[:40]


def _tell_sources_apart(records: list[Record]) -> list[Record]:
    """Drop repeats of one run, and name the sources where different runs look alike."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        found[_identity(record), record["source"]] = record  # of a run made twice, the newest: it is listed last
    kept = list(found.values())
    sources: dict[str, set[str]] = {}
    for record in kept:
        sources.setdefault(_identity(record), set()).add(record["source"])
    if any(len(names) > 1 for names in sources.values()):
        for record in kept:
            record["axes"]["source"] = record["source"]
    return kept


def _identity(record: Record) -> str:
    return json.dumps([record["axes"], record["meta"].get("seed")], sort_keys=True, ensure_ascii=False)
