"""An adapter's settings as plain values, and back: what a checkpoint and a report keep of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from secura_lightning.adapters.base import AdapterConfig
from secura_lightning.discover import subclasses
from secura_lightning.errors import SecuraError


def describe_adapter(config: AdapterConfig) -> dict[str, Any]:
    """``{"class": name, setting: value, ...}`` with plain values only."""
    return {"class": type(config).__name__, **asdict(config)}  # type: ignore[call-overload]


def rebuild_adapter(description: dict[str, Any]) -> AdapterConfig:
    """The settings that :func:`describe_adapter` described.

    Raises:
        SecuraError: No adapter of that name, or it has no such setting: another version wrote the description.
    """
    settings = dict(description)
    name = settings.pop("class")
    known = {cls.__name__: cls for cls in subclasses(AdapterConfig)}
    if name not in known:
        raise SecuraError(
            f"the checkpoint's adapter {name} is unknown to this version; known are {', '.join(sorted(known))}"
        )
    try:
        return known[name](**settings)
    except TypeError as error:
        raise SecuraError(f"the checkpoint's {name} has other settings than this version's: {error}") from error
