"""jsonargparse errors as one line that names the key and the nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from secura_lightning.errors import ConfigError


class OneLineParser(LightningArgumentParser):
    """LightningCLI's parser, raising :class:`ConfigError` instead of printing its usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise the last, telling line of ``message``, with the nearest valid key."""
        raise ConfigError(shorten(message, known_keys(self))) from ex


def known_keys(parser: LightningArgumentParser) -> set[str]:
    """Every dotted key that the parser accepts."""
    return {action.dest for action in parser._actions if action.dest not in ("help", "config")}


def shorten(message: str, keys: Iterable[str]) -> str:
    """The one line of a jsonargparse message that says what is wrong.

    Args:
        message: The whole message, often a tree of attempts.
        keys: Valid keys, to suggest the nearest.
    """
    lines = [line.strip(" -|") for line in message.strip().splitlines() if line.strip(" -|")]
    telling = [line for line in lines if re.search(r"not accepted|Unrecognized|does not exist|not expected", line)]
    line = telling[-1] if telling else (lines[-1] if len(lines) > 1 and len(lines[0]) > 200 else " ".join(lines[:2]))
    where = re.search(r'Parser key "([^"]+)"', message)
    if where and where.group(1) not in line:
        line = f"{where.group(1)}: {line}"
    unknown = re.search(
        r"[Kk]ey '?\"?([\w.]+)'?\"? is not (?:expected|accepted)|[Uu]nrecognized arguments?: (?:--)?([\w.]+)", line
    )
    if unknown:
        bad = next(group for group in unknown.groups() if group)
        near = nearest(bad, keys)
        if near:
            line += f" (did you mean '{near}'?)"
    return line


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that looks most like ``key``, by its whole name or by its last part."""
    keys = list(keys)
    whole = get_close_matches(key, keys, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = {full.rsplit(".", 1)[-1]: full for full in keys}
    part = get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)
    return last[part[0]] if part else None
