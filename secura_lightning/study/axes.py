"""The axes of a sweep: what varies between its cells, and the product of it.

An axis is a list of values of one configuration key, or a mapping of named variants, each of which sets any number of
keys, starts from overlay files (``base``), and may narrow or widen later axes for itself (``axes``)::

    axes:
      method:
        lora:   {model.adapter: {class_path: LoRAConfig, init_args: {rank: 8}}}
        secura: {base: ../secura.yaml, axes: {lr: [1e-2, 3e-2]}}
      lr: [1e-3, 3e-3]
      seed: [1, 2, 3]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from secura_lightning.errors import ConfigError
from secura_lightning.study.settings import Settings, overlay, read_yaml, scalar

SHIPPED = Path(__file__).parent.parent / "configs"
"""The shipped configurations: in a checkout a link to the top-level folder, in an installed package the files."""
ALIASES = {"lr": "model.optimizer.lr", "seed": "seed_everything", "steps": "data.steps_per_task"}
"""Short names of axes for the keys that sweeps vary most."""
_SECTIONS = ("trainer", "model", "data", "forgetting", "checkpoint", "seed_everything")

Values = dict[str, Any]  # axis -> its value (or its variant's name) in one cell


@dataclass(frozen=True)
class Variant:
    """A named option of an axis."""

    settings: Settings
    base: Settings = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """What varies: ``values`` of the key ``key``, or ``variants`` by name."""

    name: str
    key: str | None = None
    values: tuple[Any, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def options(self) -> list[Any]:
        """The values, or the names of the variants, in their order."""
        return list(self.variants) if self.variants else list(self.values)

    def settings(self, option: Any) -> Settings:
        """What one option sets."""
        if self.key is not None:
            return {self.key: option}
        return self.variants[option].settings

    def base(self, option: Any) -> Settings:
        """What one option puts over the base files."""
        return self.variants[option].base if self.variants else {}

    def label(self, option: Any) -> str:
        """How an option reads in a cell's name."""
        return (
            _clean(str(option)) if self.variants else f"{_clean(self.name.rsplit('.', 1)[-1])}={_clean(show(option))}"
        )


def show(value: Any) -> str:
    """A value as short text: 0.001, lora, null."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def means(text: str, value: Any) -> bool:
    """Whether a word of the command line means ``value``: 1e-3 and 0.001 are the same number."""
    shown = show(value)
    return text == shown or show(scalar(text)) == shown


def _clean(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-") or "-"


def read_axes(content: Any, where: str, folder: Path) -> dict[str, Axis]:
    """The axes of a sweep file.

    Args:
        content: The mapping under ``axes``.
        where: The file, for errors.
        folder: What the overlay files of variants are relative to.

    Raises:
        ConfigError: An axis is empty, names no key, or a variant is none.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where}: axes: name at least one axis, such as `seed_everything: [1, 2, 3]`")
    axes = {str(name): _axis(str(name), options, where, folder) for name, options in content.items()}
    for axis in axes.values():
        for name, variant in axis.variants.items():
            for other in variant.axes:
                if other not in axes or axes[other].variants:
                    raise ConfigError(f"{where}: axes.{axis.name}.{name}.axes: '{other}' is no axis of values")
    return axes


def _axis(name: str, options: Any, where: str, folder: Path) -> Axis:
    if not options or not isinstance(options, dict | list):
        raise ConfigError(f"{where}: axes.{name}: give a list of values, or a mapping of named variants")
    if isinstance(options, dict):
        variants = {str(key): _variant(value, f"{where}: axes.{name}.{key}", folder) for key, value in options.items()}
        return Axis(name, variants=variants)
    key = ALIASES.get(name, name)
    if key.split(".")[0] not in _SECTIONS:
        near = get_close_matches(name, [*ALIASES, *_SECTIONS], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; dotted keys start with {', '.join(_SECTIONS)}"
        raise ConfigError(f"{where}: axes.{name}: no key of a configuration{hint}")
    if any(isinstance(value, dict) for value in options):
        raise ConfigError(f"{where}: axes.{name}: give variants that are mappings names (`small: {{...}}`)")
    if any(options.count(value) > 1 for value in options):
        raise ConfigError(f"{where}: axes.{name}: a value stands twice")
    return Axis(name, key, tuple(options))


def _variant(content: Any, where: str, folder: Path) -> Variant:
    if content is None:
        return Variant({})
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a variant maps keys to values; an axis of plain values is a list")
    content = dict(content)
    files, axes = content.pop("base", None), content.pop("axes", {})
    if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
        raise ConfigError(f"{where}.axes: map names of axes to lists of values")
    return Variant(content, read_base(files, folder), axes)


def read_base(files: str | Sequence[str] | None, folder: Path) -> Settings:
    """The overlay of configuration files, the last on top.

    Each is looked for beside the sweep file, then in the current folder, then among the shipped ones by its name.

    Raises:
        ConfigError: A file is missing.
    """
    settings: Settings = {}
    for name in [files] if isinstance(files, str) else files or []:
        places = folder / str(name), Path(name), SHIPPED / Path(name).name
        settings = overlay(settings, read_yaml(next((path for path in places if path.is_file()), places[0])))
    return settings


def options_of(axes: Mapping[str, Axis], name: str) -> list[Any]:
    """Every option that an axis can take, those that only variants of other axes give it among them."""
    own = (variant.axes.get(name, []) for axis in axes.values() for variant in axis.variants.values())
    return [*axes[name].options, *(value for values in own for value in values)]


def product(axes: Mapping[str, Axis], fixed: Mapping[str, Any] | None = None) -> Iterator[Values]:
    """Every combination of options, the last axis fastest.

    Args:
        axes: The axes.
        fixed: Axes that take one value instead, listed or not.
    """
    yield from _product(axes, list(axes), dict(fixed or {}), {}, {})


def _product(
    axes: Mapping[str, Axis], left: list[str], fixed: Values, chosen: Values, narrowed: dict[str, list[Any]]
) -> Iterator[Values]:
    if not left:
        yield {name: chosen[name] for name in axes}
        return
    # Variants first: they may change the values of the others.
    name = min(left, key=lambda name: not axes[name].variants)
    rest = [other for other in left if other != name]
    axis = axes[name]
    for option in [fixed[name]] if name in fixed else narrowed.get(name, axis.options):
        deeper = narrowed | (axis.variants[option].axes if axis.variants else {})
        yield from _product(axes, rest, fixed, {**chosen, name: option}, deeper)


def apply(axes: Mapping[str, Axis], values: Values, base: Settings, every: Settings) -> Settings:
    """The settings of one cell: files first, then the keys of every cell, of its variants, and of its values.

    Args:
        axes: The axes.
        values: The cell's option of each.
        base: The base files.
        every: Keys of every cell.
    """
    order = sorted(axes, key=lambda name: not axes[name].variants)
    layers = [axes[name].base(values[name]) for name in order]
    settings = base
    for layer in [*layers, every, *(axes[name].settings(values[name]) for name in order)]:
        settings = overlay(settings, layer)
    return settings


def cell_name(axes: Mapping[str, Axis], values: Values) -> str:
    """A readable, stable folder name, such as ``lora,lr=0.001,seed=2``."""
    return ",".join(axes[name].label(values[name]) for name in axes)


def matches(values: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    """Whether a cell has all the values of ``pattern``, in which a list means any of them."""
    return all(
        values[name] in wanted if isinstance(wanted, list) else values[name] == wanted
        for name, wanted in pattern.items()
    )
