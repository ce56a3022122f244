"""An adapter's settings as plain values, and back: what a checkpoint and a report keep of it."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

from secura_lightning.adapters.base import AdapterConfig
from secura_lightning.discover import subclasses
from secura_lightning.errors import SecuraError


def describe_adapter(config: AdapterConfig) -> dict[str, Any]:
    """``{"class": name, setting: value, ...}`` with plain values only."""
    return {"class": type(config).__name__, **asdict(config)}  # type: ignore[call-overload]


def method_name(config: AdapterConfig) -> str:
    """The method, for people: ``LoRA``."""
    return type(config).__name__.removesuffix("Config")


def changed_settings(config: AdapterConfig) -> str:
    """Every setting that is not its default, for people: ``rank 16, norm element``.

    A setting that a configuration inherits unseen, from another file or from the class that stood there before, shows.
    """
    changed = []
    for setting in fields(config):  # type: ignore[arg-type]
        value = getattr(config, setting.name)
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        if value != default:
            long = isinstance(value, dict) and len(value) > 2
            changed.append(f"{setting.name} of {len(value)} names" if long else f"{setting.name} {value}")
    return ", ".join(changed)


def summarize_adapter(config: AdapterConfig) -> str:
    """The method and its changed settings: ``LoRA (rank 16, norm element)``."""
    changed = changed_settings(config)
    return f"{method_name(config)} ({changed})" if changed else method_name(config)


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
