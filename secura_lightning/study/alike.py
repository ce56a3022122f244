"""Which runs are the same, which repeat each other, and what tells apart those that only look alike.

A *source* is what records were read from: a sweep's folder, a file of results, or the folder of the runs of one name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secura_lightning.study.axes import show
from secura_lightning.study.records import Record

SEEDS = ("seed", "seed_everything")
"""Axes that repeat a run instead of changing it."""

_Items = list[tuple[str, dict[str, str]]]  # of a list of classes: the name of each, and its settings as text


def drop_repeats(records: Sequence[Record]) -> list[Record]:
    """Every run once.

    Of a run made twice in one source the newest is kept, which is listed last. A source whose every record another
    source holds too, such as a copied file of results, is left out.
    """
    found = {_text([record["source"], *_identity(record)]): record for record in records}
    contents: dict[str, set[str]] = {}
    for record in found.values():
        content = _text({key: value for key, value in record.items() if key != "source"})
        contents.setdefault(record["source"], set()).add(content)
    kept: list[str] = []
    for source in sorted(contents, key=lambda source: -len(contents[source])):  # of equal ones the first
        if not any(contents[source] <= contents[other] for other in kept):
            kept.append(source)
    return [record for record in found.values() if record["source"] in kept]


def _identity(record: Record) -> list[Any]:
    return [record["axes"], record["meta"].get("seed"), record.get("settings")]


def tell_settings_apart(records: Sequence[Record]) -> None:
    """Give runs of one name (those with ``settings``) an axis for every setting that differs among them."""
    named: dict[str, list[Record]] = {}
    for record in records:
        if "settings" in record:
            named.setdefault(record["axes"]["run"], []).append(record)
    for same in named.values():
        keys = dict.fromkeys(key for record in same for key in record["settings"])
        columns = {key: _texts([record["settings"].get(key) for record in same]) for key in keys}
        differing = {key: texts for key, texts in columns.items() if len(set(texts)) > 1}
        short = [key.rsplit(".", 1)[-1] for key in differing]
        for (key, texts), label in zip(differing.items(), short, strict=True):
            for record, text in zip(same, texts, strict=True):
                record["axes"][key if short.count(label) > 1 else label] = text


def _texts(values: Sequence[Any]) -> list[str]:
    """Each value as text that is another one for another value; of lists of classes, what differs among them."""
    whole = [_text(value) for value in values]
    lists = [_items(value) for value in values]
    known = [items for items in lists if items is not None]
    if len(known) < len(lists):
        return whole
    short = [_differing(items, known) or text for items, text in zip(known, whole, strict=True)]
    return short if len(set(short)) == len(set(whole)) else whole


def _text(value: Any) -> str:
    """A value as text without loss: :func:`show` cuts the digits of a number."""
    if isinstance(value, float) and float(show(value)) != value:
        return repr(value)
    if isinstance(value, float | str):
        return show(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def _items(value: Any) -> _Items | None:
    """The classes of a list such as ``trainer.callbacks``; None where it is none."""
    items: _Items = []
    for item in value if isinstance(value, list) else [] if value is None else [0]:
        if isinstance(item, str):
            item = {"class_path": item}
        if not isinstance(item, Mapping) or not isinstance(item.get("class_path"), str):
            return None
        settings = {key: _text(setting) for key, setting in (item.get("init_args") or {}).items()}
        items.append((item["class_path"].rsplit(".", 1)[-1], settings))
    return items


def _differing(items: _Items, lists: Sequence[_Items]) -> str:
    """The classes with what differs from the same classes of other lists: ``ReplayBuffer + EWC ewc_lambda 100``."""
    parts = []
    for place, (name, settings) in enumerate(items):
        nth = [other for other, _ in items[:place]].count(name)
        others = [_nth(other, name, nth) for other in lists]
        told = [f"{k} {v}" for k, v in settings.items() if any(o is not None and o.get(k) != v for o in others)]
        parts.append(" ".join([name, *told]))
    return " + ".join(parts)


def _nth(items: _Items, name: str, n: int) -> dict[str, str] | None:
    """The settings of the class that ``name`` stands for the n-th time; None where there is none."""
    same = [settings for other, settings in items if other == name]
    return same[n] if n < len(same) else None


def tell_sources_apart(records: Sequence[Record]) -> None:
    """Name the source of every run in its axes, where runs of several sources look alike."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        axes = {name: value for name, value in record["axes"].items() if name not in SEEDS}
        groups.setdefault(_text(axes), []).append(record)
    if any(_look_alike(group) for group in groups.values()):
        names = _endings({record["source"] for record in records})
        for record in records:
            record["axes"]["source"] = names[record["source"]]


def _look_alike(group: Sequence[Record]) -> bool:
    """Whether runs with the same axes may still differ in more than the seed, or are the same run made twice."""
    seeds = [record["meta"].get("seed") for record in group]
    known = all(record.get("settings") for record in group)  # and equal, or an axis would tell them apart
    return len({record["source"] for record in group}) > 1 and not (known and len(set(seeds)) == len(seeds))


def _endings(paths: Iterable[str]) -> dict[str, str]:
    """The shortest end of each path that no other one has."""
    parts = {path: Path(path).parts for path in paths}
    found = {}
    for path, own in parts.items():
        others = [other for other in parts.values() if other != own]
        n = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        found[path] = str(Path(*own[-n:]))
    return found
