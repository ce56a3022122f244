"""A sweep file: which runs it asks for, and how the best value of an axis is chosen before the rest runs.

    select stage    one short run per method and value, scored on validation rows  ->  the best value of each method
    main stage      every cell of the axes, with the chosen value

Keys of the file: ``base``, ``set``, ``axes``, ``include``, ``exclude``, ``select``, ``name``, ``save_dir``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from secura_lightning.errors import ConfigError
from secura_lightning.study.axes import (
    Axis,
    Values,
    apply,
    cell_name,
    matches,
    options_of,
    product,
    read_axes,
    read_base,
    show,
)
from secura_lightning.study.records import LOWER_IS_BETTER, METRICS_OF_RUNS, TWO_TASKS
from secura_lightning.study.settings import Settings, get_key, overlay, read_yaml, signature

_KEYS = ("base", "set", "axes", "include", "exclude", "select", "name", "save_dir")
_SELECT_KEYS = ("axis", "metric", "mode", "tasks", "rows", "per", "fixed", "set")
_KNOWLEDGE = ("base", "perplexity")  # metrics that need the probe


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: Folder name, unique within its stage.
        stage: ``select`` or ``main``.
        values: Axis -> value, or name of the variant.
        settings: The whole configuration.
    """

    name: str
    stage: str
    values: Values
    settings: Settings = field(repr=False)

    @property
    def id(self) -> str:
        """Its folder below the sweep's: search runs have a folder of their own."""
        return f"select/{self.name}" if self.stage == "select" else self.name

    @property
    def signature(self) -> str:
        """Digest of all settings that its result can depend on."""
        return signature(self.settings)


@dataclass(frozen=True)
class Select:
    """How the value of one axis is chosen.

    Attributes:
        axis: The axis.
        per: Axes for each combination of which a value is chosen; the others stand at ``fixed``, or their first option.
        metric: What is compared: a metric of ``continual.json``, or ``task/NAME`` or ``base/KIND`` at the run's end.
        mode: ``max`` or ``min``; by default whichever is better.
        tasks: How many tasks a search run learns; None for all.
        rows: Split that is scored.
        fixed: Options of the other axes in the search.
        settings: Further settings of search runs.
    """

    axis: str
    per: tuple[str, ...]
    metric: str = "learning_accuracy"
    mode: str = "max"
    tasks: int | None = 1
    rows: str = "validation"
    fixed: Values = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read."""

    name: str
    save_dir: Path
    base: Settings
    every: Settings
    axes: dict[str, Axis]
    include: list[Values] = field(default_factory=list)
    exclude: list[Values] = field(default_factory=list)
    select: Select | None = None

    def cells(self, chosen: Mapping[tuple[Any, ...], Any] | None = None) -> list[Cell]:
        """The runs of the main stage.

        Args:
            chosen: The selected value of each group (see :meth:`group`). Cells of groups that it lacks are left out.

        Raises:
            ConfigError: Two cells share a name but not their settings.
        """
        plain = self._axes_of_main()
        found = [(values, self.exclude) for values in product(plain)]
        for entry in self.include:  # what is asked for by name is not subject to exclude
            asked = plain if self.select is None or self.select.axis not in entry else self.axes
            found += [(values, []) for values in product(asked, entry)]
        cells: dict[str, Cell] = {}
        for values, exclude in found:
            group = self.group(values)
            if self.select and self.select.axis not in values and chosen is not None:
                if group not in chosen:
                    continue
                values = {name: {**values, self.select.axis: chosen[group]}[name] for name in self.axes}
            if not any(matches(values, pattern) for pattern in exclude if set(pattern) <= set(values)):
                self._add(cells, "main", values)
        return list(cells.values())

    def search(self) -> list[Cell]:
        """The runs of the select stage; none without one."""
        select = self.select
        if select is None:
            return []
        cells: dict[str, Cell] = {}
        groups = list(dict.fromkeys(self.group(cell.values) for cell in self.cells() if select.axis not in cell.values))
        for group in groups:
            fixed = dict(zip(select.per, group, strict=True))
            for name in self.axes:
                if name != select.axis and name not in fixed:
                    fixed[name] = select.fixed.get(name, self.axes[name].options[0])
            for values in product(self.axes, fixed):
                if not any(matches(values, pattern) for pattern in self.exclude if select.axis in pattern):
                    self._add(cells, "select", values)
        return list(cells.values())

    def group(self, values: Values) -> tuple[Any, ...]:
        """The combination of options that shares one selected value."""
        return tuple(values[name] for name in self.select.per) if self.select else ()

    def _axes_of_main(self) -> dict[str, Axis]:
        return {name: axis for name, axis in self.axes.items() if self.select is None or name != self.select.axis}

    def _add(self, cells: dict[str, Cell], stage: str, values: Values) -> None:
        axes = {name: axis for name, axis in self.axes.items() if name in values}
        settings = apply(axes, values, self.base, self.every)
        if stage == "select":
            assert self.select is not None
            settings = _search_settings(settings, self.select)
            # The name says what distinguishes search runs; what they share is in their settings.
            named = {name: axis for name, axis in axes.items() if name in (*self.select.per, self.select.axis)}
        else:
            named = axes
        cell = Cell(cell_name(named, values), stage, values, settings)
        before = cells.setdefault(cell.name, cell)
        if before.settings != cell.settings:
            raise ConfigError(f"sweep: two cells named '{cell.name}' differ in their settings; rename a variant")


def _search_settings(settings: Settings, select: Select) -> Settings:
    """A run cut to the first tasks, scored on validation rows, without the probe where the metric does not need it."""
    changes: Settings = {"forgetting.split": select.rows}
    tasks = get_key(settings, "data.tasks")
    if select.tasks is not None and isinstance(tasks, list):
        changes["data.tasks"] = tasks[: select.tasks]
        for key in ("data.steps_per_task", "data.epochs_per_task"):
            length = get_key(settings, key)
            if isinstance(length, list):
                changes[key] = length[: select.tasks]
    if not select.metric.startswith(_KNOWLEDGE):
        changes["data.probe"] = None
    return overlay(overlay(settings, changes), select.settings)


def read_sweep(path: Path, save_dir: Path | None = None) -> Sweep:
    """Read a sweep file.

    Args:
        path: The file.
        save_dir: Folder of the runs, instead of the file's own ``save_dir``.

    Raises:
        ConfigError: It cannot be read, or asks for something impossible.
    """
    content = read_yaml(path)
    where = str(path)
    _check_keys(content, _KEYS, where)
    if "base" not in content and "set" not in content:
        raise ConfigError(f"{where}: base: name the configuration file that the cells start from")
    axes = read_axes(content.get("axes"), where, path.parent)
    name = str(content.get("name") or path.stem)
    sweep = Sweep(
        name=name,
        save_dir=save_dir or Path(content.get("save_dir") or f"lightning_logs/{name}"),
        base=read_base(content.get("base"), path.parent),
        every=_mapping(content.get("set"), f"{where}: set"),
        axes=axes,
        include=_patterns(content.get("include"), axes, f"{where}: include"),
        exclude=_patterns(content.get("exclude"), axes, f"{where}: exclude"),
        select=_select(content.get("select"), axes, f"{where}: select"),
    )
    for entry in sweep.include:
        _check_options(entry, axes, f"{where}: include")
    for entry in sweep.exclude:
        for axis, wanted in entry.items():
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if value not in options_of(axes, axis):
                    raise _no_option(axes, axis, value, f"{where}: exclude")
    if not sweep.cells():
        raise ConfigError(f"{where}: exclude leaves no cell")
    return sweep


def _select(content: Any, axes: dict[str, Axis], where: str) -> Select | None:
    if content is None:
        return None
    content = _mapping(content, where)
    _check_keys(content, _SELECT_KEYS, where)
    axis = content.get("axis")
    if not isinstance(axis, str) or axis not in axes or axes[axis].variants:
        raise ConfigError(f"{where}.axis: name an axis of values, not {axis!r}")
    others = [name for name in axes if name != axis]
    per = content.get("per", [name for name in others if axes[name].variants])
    fixed = _mapping(content.get("fixed"), f"{where}.fixed")
    if not isinstance(per, list):
        raise ConfigError(f"{where}.per is {per!r}; give a list of axes")
    for name in (*per, *fixed):
        if name not in others:
            raise ConfigError(f"{where}: '{name}' is no other axis; choose among {', '.join(others) or '(none)'}")
    _check_options(fixed, axes, f"{where}.fixed")
    metric = _metric(content.get("metric", "learning_accuracy"), where)
    mode = content.get("mode", "min" if metric in LOWER_IS_BETTER else "max")
    rows, tasks = content.get("rows", "validation"), content.get("tasks", "first")
    if mode not in ("max", "min"):
        raise ConfigError(f"{where}.mode is {mode!r}; give max or min")
    if rows not in ("validation", "test"):
        raise ConfigError(f"{where}.rows is {rows!r}; give validation (or test, which biases the result)")
    if tasks not in ("first", "all") and not (isinstance(tasks, int) and not isinstance(tasks, bool) and tasks > 0):
        raise ConfigError(f"{where}.tasks is {tasks!r}; give first, all, or how many")
    count = {"first": 1, "all": None}.get(tasks, tasks)
    if count == 1 and metric in TWO_TASKS:
        raise ConfigError(f"{where}.tasks is {tasks}, but {metric} needs two tasks: give 2, more, or all")
    return Select(
        axis=axis,
        per=tuple(per),
        metric=metric,
        mode=mode,
        tasks=count,
        rows=rows,
        fixed=fixed,
        settings=_mapping(content.get("set"), f"{where}.set"),
    )


def _metric(metric: Any, where: str) -> str:
    """The metric of a search, if a run can have it: of tasks and kinds of knowledge the runs alone know the names."""
    scope, _, name = str(metric).partition("/")
    if metric in METRICS_OF_RUNS or (scope in ("task", "base") and name):
        return str(metric)
    plain = {known.lower(): known for known in METRICS_OF_RUNS}
    near = get_close_matches(str(metric).lower(), plain, n=1)
    known = ", ".join((*METRICS_OF_RUNS, "task/NAME", "base/KIND"))
    hint = f"did you mean '{plain[near[0]]}'?" if near else f"choose among {known}"
    raise ConfigError(f"{where}.metric: no '{metric}'; {hint}")


def _check_options(values: Values, axes: dict[str, Axis], where: str) -> None:
    """Refuse what no axis can take; an axis of plain values takes any other one too."""
    for name, value in values.items():
        if value not in axes[name].options and (axes[name].variants or isinstance(value, list | dict)):
            raise _no_option(axes, name, value, where)


def _no_option(axes: dict[str, Axis], name: str, value: Any, where: str) -> ConfigError:
    known = ", ".join(dict.fromkeys(map(show, options_of(axes, name))))
    return ConfigError(f"{where}: {name} has no option {show(value)}; it has {known}")


def _patterns(content: Any, axes: dict[str, Axis], where: str) -> list[Values]:
    if not isinstance(content or [], list):
        raise ConfigError(f"{where}: give a list of mappings from axis to value")
    for entry in content or []:
        _check_keys(_mapping(entry, where), tuple(axes), where)
    return list(content or [])


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a mapping, got {content!r}")
    return dict(content or {})


def _check_keys(content: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in allowed:
            near = get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; choose among {', '.join(allowed)}"
            raise ConfigError(f"{where}: no key '{key}'{hint}")
