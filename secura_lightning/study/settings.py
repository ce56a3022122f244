"""Configurations as plain nested values: read, overlay, set by dotted key, compare.

    base file  <-  overlay files  <-  dotted keys         resolved settings of one run, written as one YAML file

Dotted keys follow the conventions of ``secura fit``: ``model.adapter.rank`` means ``model.adapter.init_args.rank``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from secura_lightning.errors import ConfigError

Settings = dict[str, Any]

# What changes where or how a run is written, but not its result
_PASSING = (("name",), ("save_dir",), ("ckpt_path",), ("trainer", "enable_progress_bar"))


class _Loader(yaml.SafeLoader):
    """YAML as ``secura fit`` reads it: 1e-3 is a number (PyYAML alone takes it for text), and keys do not repeat."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode | None:
        """A mapping as it is written, before merge keys fill it up; refused where a key stands twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return node


_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)  # a date is text


def read_yaml(path: Path) -> Settings:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: The file is missing, no YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return content


def scalar(text: str) -> Any:
    """What one word of a command line means in a configuration: 1e-3 a number, true a truth value, other words text."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


def overlay(below: Settings, above: Mapping[str, Any]) -> Settings:
    """``below`` with the values of ``above`` on top; neither argument is changed.

    Mappings are merged, everything else (lists too) is replaced. A ``class_path`` that names another class drops the
    settings of the old one. Keys of ``above`` may be dotted.
    """
    result = copy.deepcopy(below)
    for key, value in above.items():
        set_key(result, str(key), value)
    return result


def set_key(settings: Settings, dotted: str, value: Any) -> None:
    """Set one dotted key in place; a mapping is merged into what stands there.

    Raises:
        ConfigError: A part of the key leads into something that has no keys.
    """
    place: Any = settings
    *parents, last = dotted.split(".")
    for i, part in enumerate(parents):
        place = _enter(place, part, ".".join(parents[: i + 1]))
    if isinstance(place, list):
        place[_index(place, last, dotted)] = copy.deepcopy(value)
        return
    place = _holder(place, last)
    if last == "class_path" and place.get("class_path") not in (None, value):
        place.pop("init_args", None)
    before = place.get(last)
    if isinstance(before, str) and isinstance(value, Mapping) and "init_args" in value:
        before = {"class_path": before}
    if isinstance(value, Mapping) and isinstance(before, dict):
        # class_path first: it may drop the settings that the other keys are about to set
        for key in sorted(value, key=lambda key: key != "class_path"):
            set_key(before, str(key), value[key])
        place[last] = before
    elif isinstance(value, Mapping):
        place[last] = overlay({}, value)
    else:
        place[last] = copy.deepcopy(value)


def _enter(place: Any, part: str, where: str) -> Any:
    """The mapping or list below ``part``, made where it is missing."""
    if isinstance(place, list):
        return place[_index(place, part, where)]
    place = _holder(place, part)
    below = place.get(part)
    if below is None:
        below = place[part] = {}
    elif isinstance(below, str) and part in ("adapter", "optimizer", "probe", "calibration"):
        below = place[part] = {"class_path": below}
    if not isinstance(below, dict | list):
        raise ConfigError(f"{where} is {below!r} in the configuration below, which has no keys to set")
    return below


def _holder(place: Settings, key: str) -> Settings:
    """Where ``key`` of a class with ``class_path`` stands: among its ``init_args``."""
    if "class_path" in place and key not in ("class_path", "init_args", "dict_kwargs"):
        return place.setdefault("init_args", {})
    return place


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(f"{where}: '{part}' is no place in a list of {len(items)} (the first is 0)")
    return int(part)


def get_key(settings: Settings, dotted: str) -> Any:
    """The value of a dotted key, None where there is none."""
    place: Any = settings
    for part in dotted.split("."):
        if not isinstance(place, dict):
            return None
        place = _holder(dict(place), part).get(part)
    return place


def signature(settings: Settings) -> str:
    """A short digest of everything in ``settings`` that a result can depend on."""
    kept = copy.deepcopy(settings)
    for *parents, last in _PASSING:
        place: Any = kept
        for key in parents:
            place = place.get(key) or {}
        place.pop(last, None)
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def dump(settings: Settings) -> str:
    """``settings`` as YAML, in their own order."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
