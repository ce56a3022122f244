"""jsonargparse errors as one line that names the key and the nearest valid one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from secura_lightning.adapters import AdapterConfig
from secura_lightning.data.probe import Probe
from secura_lightning.data.task import Task
from secura_lightning.discover import subclasses
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.strategies.base import Strategy

_CHOOSABLE = (AdapterConfig, Task, Probe, Strategy)  # what `class_path` may name
_CLASS_KEYS = ("adapter", "optimizer", "tasks", "probe", "callbacks", "logger", "plugins", "strategy", "profiler")


class OneLineParser(LightningArgumentParser):
    """LightningCLI's parser, raising :class:`ConfigError` instead of printing its usage and exiting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # a key means one thing, also in later versions

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the telling line of ``message``, with the nearest valid key."""
        raise ConfigError(shorten(message, known_keys(self))) from ex

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Build what the configuration names.

        Raises:
            SecuraError: One of its constructors raised it: jsonargparse wraps what happens within optional values and
                lists into an account of all types that it tried.
        """
        try:
            return super().instantiate(*args, **kwargs)
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SecuraError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from error


def known_keys(parser: LightningArgumentParser) -> set[str]:
    """Every dotted key that the parser accepts."""
    return {action.dest for action in parser._actions if not action.dest.endswith("help")}


def shorten(message: str, keys: Iterable[str]) -> str:
    """The one line of a jsonargparse message that says what is wrong, and what was probably meant.

    Args:
        message: The whole message, often a tree of attempts.
        keys: Valid dotted keys, to suggest the nearest.
    """
    failed = re.search(r"compute_fn of link .* failed: (.*)", message)
    if failed:
        return failed.group(1)
    found = re.search(r'Parser key "([^"]+)":', message)
    where = found.group(1) if found else ""
    prefix = f"{where}: " if where else ""

    unknown = re.search(
        r"[Uu]nrecognized arguments?: (?:--)?([\w.]+)|[Kk]ey '?\"?([\w.]+)'?\"? is not expected", message
    )
    if unknown:
        bad = next(group for group in unknown.groups() if group)
        return f"{prefix}no key '{bad}'{_suggest(nearest(bad, keys))}"
    option = re.search(r"Option '([\w.]+)' is not accepted|No action for key [\"']([\w.]+)", message)
    if option:
        bad = next(group for group in option.groups() if group)
        return f"{prefix}no setting '{bad}'{_suggest(nearest(bad, _settings()))}"
    nested = re.search(r"no setting '\w+'; [^\n]*", message)
    if nested:
        return f"{prefix}{nested.group(0)}"
    attribute = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if attribute:
        return f"{prefix}no class '{attribute.group(2)}' in {attribute.group(1)}"
    name = re.search(r"Expected a dot import path string: (\w+)", message) or re.search(
        r"Expected a path but (\w+) either not accessible or invalid", message
    )
    if name:
        if where.rsplit(".", 1)[-1] not in _CLASS_KEYS:  # jsonargparse tries a class path wherever text does not fit
            return f"{prefix}cannot be '{name.group(1)}'"
        near = get_close_matches(name.group(1), _class_names(), n=1, cutoff=0.6)
        return f"{prefix}no class '{name.group(1)}'{_suggest(near[0] if near else None)}"
    expected = re.search(r"Expected an? (?:<class '([\w.]+)'>|typing\.(Literal\[.*?\]))\. Got value: (.*)", message)
    if expected and "Does not validate" not in message:
        wanted = expected.group(1) or f"one of {expected.group(2).removeprefix('Literal')}"
        return f"{prefix}expected {wanted}, got {expected.group(3)}"
    lines = [line.strip(" -|") for line in message.strip().splitlines() if line.strip(" -|")]
    own = next((line for line in lines if re.match(r"(model|data|trainer|forgetting|checkpoint)\.\w", line)), None)
    return own or _compact(lines, where)


def _compact(lines: list[str], where: str) -> str:
    text = " ".join(lines)
    text = text.replace(f'Parser key "{where}": ', f"{where}: ") if where else text
    return text if len(text) <= 300 else f"{text[:300]} ..."


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that looks most like ``key``, by its whole name or by its last part."""
    keys = sorted(keys)
    whole = get_close_matches(key, keys, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    parts = key.split(".")
    for depth in range(len(parts), 0, -1):  # of model.adaptr.rank, the wrong part may be the middle one
        near = get_close_matches(".".join(parts[:depth]), keys, n=1, cutoff=0.8)
        if near:
            return ".".join([near[0], *parts[depth:]])
    last = {full.rsplit(".", 1)[-1]: full for full in keys}
    near = get_close_matches(parts[-1], last, n=1, cutoff=0.6)
    return last[near[0]] if near else None


def _suggest(near: str | None) -> str:
    return f"; did you mean '{near}'?" if near else "; `--help` lists the keys"


def _class_names() -> set[str]:
    return {child.__name__ for base in _CHOOSABLE for child in subclasses(base)}


def _settings() -> set[str]:
    return {name for base in _CHOOSABLE for child in subclasses(base) for name in inspect.signature(child).parameters}
