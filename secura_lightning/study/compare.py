"""Groups of runs that differ in nothing but the seed, their metrics with intervals, and the tests between them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.metrics import continual
from secura_lightning.study.axes import show
from secura_lightning.study.load import SEEDS
from secura_lightning.study.records import Record, metric_names, unpack, value_of
from secura_lightning.study.stats import Array, difference, holm, mean_interval, row_weights
from secura_lightning.study.table import number

LOWER_IS_BETTER = ("forgetting", "perplexity", "perplexity_ratio", "parameters", "seconds", "memory_mb")
Kinds = Mapping[str, Sequence[str]]  # name -> kinds of base knowledge that `retention/name` averages


@dataclass(frozen=True)
class Group:
    """Runs that are repeats of each other.

    Attributes:
        axes: Axis -> shown value, seeds left out.
        records: The runs.
    """

    axes: dict[str, str]
    records: list[Record]

    @property
    def label(self) -> str:
        """The shown values; numbers and other bare values with their axis before them."""
        return ",".join(value if _telling(value) else f"{name}={value}" for name, value in self.axes.items())

    @property
    def seeds(self) -> list[Any]:
        """The seed of each run."""
        return [record["meta"].get("seed") for record in self.records]


@dataclass(frozen=True)
class Difference:
    """One difference from the reference.

    Attributes:
        difference: Mean of the group minus mean of the reference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided p-value, adjusted for all tests of the table.
    """

    difference: float
    low: float
    high: float
    p: float


def _telling(value: str) -> bool:
    """Whether a value is a name, which says what it is without its axis."""
    return value[:1].isalpha() and value not in ("true", "false", "null")


def group(records: Sequence[Record], over: Sequence[str] = ()) -> list[Group]:
    """Runs by everything but the seed.

    Args:
        records: The runs.
        over: Further axes to average over, such as the order of tasks.

    Raises:
        ConfigError: ``over`` names no axis.
    """
    names = list(dict.fromkeys(name for record in records for name in record["axes"]))
    for name in over:
        if name not in names:
            raise ConfigError(f"--over {name}: no such axis; the runs have {', '.join(names)}")
    kept = [name for name in names if name not in (*SEEDS, *over)]
    groups: dict[tuple[str, ...], Group] = {}
    for record in records:
        axes = {name: show(record["axes"][name]) if name in record["axes"] else "-" for name in kept}
        groups.setdefault(tuple(axes.values()), Group(axes, [])).records.append(record)
    found = list(groups.values())
    varying = [name for name in kept if len({one.axes[name] for one in found}) > 1] or kept[:1]
    return [Group({name: one.axes[name] for name in varying} or {"run": "all"}, one.records) for one in found]


def value(record: Record, metric: str, kinds: Kinds | None = None) -> float | None:
    """One figure of a run: :func:`value_of`, or ``retention/NAME`` over a named set of kinds.

    Raises:
        ConfigError: The set names a kind that the probe lacks.
    """
    name = metric.removeprefix("retention/")
    if name == metric:
        return value_of(record, metric)
    base = record.get("base_knowledge")
    return continual.base_retention(_columns(base["kinds"], (kinds or {})[name], name)) if base else None


def _columns(table: Mapping[str, Sequence[float | None]], kinds: Sequence[str], name: str) -> Array:
    for kind in kinds:
        if kind not in table:
            raise ConfigError(f"--kinds {name}: the probe has no kind '{kind}'; it has {', '.join(table)}")
    return np.array([table[kind] for kind in kinds], dtype=np.float64).T


def check_metrics(records: Sequence[Record], metrics: Sequence[str], kinds: Kinds) -> None:
    """Refuse metrics that none of the runs has.

    Raises:
        ConfigError: The name is unknown.
    """
    known = dict.fromkeys(name for record in records for name in metric_names(record))
    names = [*known, *(f"retention/{name}" for name in kinds)]
    for metric in metrics:
        if metric not in names:
            raise ConfigError(f"metric '{metric}' is unknown; choose among {', '.join(names)}")


def summarise(one: Group, metric: str, kinds: Kinds | None = None) -> tuple[float, float | None] | None:
    """Mean over runs and half width of its 95 % t-interval; None where a run lacks the metric."""
    values = [value(record, metric, kinds) for record in one.records]
    known = [x for x in values if x is not None]
    return mean_interval(known) if known and len(known) == len(values) else None


def ordered(groups: Sequence[Group], metric: str, kinds: Kinds | None = None) -> list[Group]:
    """Groups by a metric, the best first, those without it last."""
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def place(one: Group) -> tuple[bool, float]:
        found = summarise(one, metric, kinds)
        return found is None, sign * found[0] if found else 0.0

    return sorted(groups, key=place)


def find(groups: Sequence[Group], wanted: str) -> Group:
    """The one group that ``wanted`` names: its label, a value of an axis, or ``axis=value`` pairs.

    Raises:
        ConfigError: None or several fit.
    """
    pairs = dict(pair.split("=", 1) for pair in wanted.split(",") if "=" in pair)
    fits = [one for one in groups if one.label == wanted]
    fits = fits or [one for one in groups if pairs and all(one.axes.get(k) == v for k, v in pairs.items())]
    fits = fits or [one for one in groups if wanted in one.axes.values()]
    if len(fits) != 1:
        which = "fits no group" if not fits else f"fits {len(fits)} groups"
        raise ConfigError(f"--against {wanted}: {which}; name one of {'; '.join(one.label for one in groups)}")
    return fits[0]


# ---------------------------------------------------------------------------------------------------- bootstrap


def _learned(cells: Array) -> Array:
    """Scores right after each task was learned, ``[n, T]``."""
    return np.stack([cells[:, i + 1, i] for i in range(cells.shape[2])], axis=1)


def _backward(cells: Array) -> Array:
    return _mean_of([cells[:, -1, i] - cells[:, i + 1, i] for i in range(cells.shape[2] - 1)], len(cells))


def _forgetting(cells: Array) -> Array:
    t = cells.shape[2]
    return _mean_of([cells[:, i + 1 : t, i].max(1) - cells[:, -1, i] for i in range(t - 1)], len(cells))


def _incremental(cells: Array) -> Array:
    return _mean_of([cells[:, t, :t].mean(1) for t in range(1, cells.shape[1])], len(cells))


def _forward(cells: Array) -> Array:
    return _mean_of([cells[:, i, i] - cells[:, 0, i] for i in range(1, cells.shape[2])], len(cells))


def _mean_of(columns: Sequence[Array], n: int) -> Array:
    """Mean of columns ``[n]``; NaN where there are none."""
    return np.mean(columns, axis=0) if len(columns) else np.full(n, np.nan)


def base_retention(table: Array) -> Array:
    """:func:`continual.base_retention` of many tables ``[n, T+1, K]``."""
    known = table[:, 0] > 0
    kept = np.minimum(1.0, np.divide(table[:, -1], table[:, 0], out=np.zeros_like(table[:, 0]), where=known))
    n = known.sum(1)
    return np.divide(kept.sum(1), n, out=np.full(len(n), np.nan), where=n > 0)


# The metrics of metrics.continual over many matrices [n, T+1, T] at once, all rows measured
OF_MATRIX: dict[str, Callable[[Array], Array]] = {
    "AP": lambda cells: cells[:, -1].mean(1),
    "AIA": _incremental,
    "BWT": _backward,
    "BWT_trace": lambda cells: _backward(cells) * (1 - 1 / cells.shape[2]),
    "forgetting": _forgetting,
    "FWT": _forward,
    "learning_accuracy": lambda cells: _learned(cells).mean(1),
}
OF_KINDS: dict[str, Callable[[Array], Array]] = {
    "base_retention": base_retention,
    "base_delta": lambda table: (table[:, -1] - table[:, 0]).mean(1),
}


class Bootstrap:
    """Metrics of runs under the same resamples of the evaluation rows.

    Rows are drawn within each task and within each kind of base knowledge, the same ones for every run. A task's value
    is the mean of its rows' scores (BLEU and chrF, elsewhere computed over the whole task, too).

    Args:
        resamples: How many.
        seed: Seed of all draws.
        kinds: Sets of kinds for ``retention/NAME``.
    """

    def __init__(self, resamples: int = 10000, seed: int = 0, kinds: Kinds | None = None) -> None:
        self.resamples = resamples
        self.seed = seed
        self.kinds = kinds or {}
        self._weights: dict[tuple[str, int], Array] = {}
        self._ids: dict[str, str] = {}

    def metric(self, record: Record, metric: str) -> Array:
        """A metric of one run under every resample, the observed value first, ``[resamples + 1]``.

        Raises:
            SecuraError: The run has no row scores, other rows than the runs before, or the metric needs more.
        """
        rows = record.get("rows")
        if not rows:
            raise SecuraError(f"{record['cell']}: no predictions were saved, so no difference can be tested")
        scope, _, name = metric.partition("/")
        if metric in OF_MATRIX or (scope == "task" and name in record["tasks"]):
            cells = self._matrix(record)
            values = OF_MATRIX[metric](cells) if metric in OF_MATRIX else cells[:, -1, record["tasks"].index(name)]
        else:
            values = self._of_knowledge(record, metric, scope, name)
        if np.isnan(values).any():
            raise SecuraError(f"{record['cell']}: {metric} is undefined, so its differences cannot be tested")
        return values

    def _of_knowledge(self, record: Record, metric: str, scope: str, name: str) -> Array:
        kinds = list((record["rows"]["base"] or {}).get("kinds", {}))
        if metric not in (*OF_KINDS, "base_accuracy") and name not in kinds and scope != "retention":
            raise SecuraError(f"'{metric}' is not computed from rows, so its differences cannot be tested")
        if not kinds:
            raise SecuraError(f"{record['cell']}: no rows were saved from which '{metric}' could be tested")
        table = self._knowledge(record)
        if metric in OF_KINDS:
            return OF_KINDS[metric](table)
        if scope == "retention":
            return base_retention(table[:, :, [kinds.index(kind) for kind in self.kinds[name]]])
        return table[:, -1, kinds.index(name)] if name else table[:, -1].mean(1)

    def _matrix(self, record: Record) -> Array:
        """The matrix under every resample, ``[resamples + 1, T+1, T]``."""
        found = record["rows"]["tasks"]
        columns = []
        for task in record["tasks"]:
            if task not in found:
                raise SecuraError(f"{record['cell']}: no predictions of task '{task}' were saved")
            self._check(f"task {task}", found[task]["ids"], record)
            columns.append(self._resampled(f"task {task}", found[task]["scores"]))
        return np.stack(columns, axis=2)

    def _knowledge(self, record: Record) -> Array:
        """Scores by kind under every resample, ``[resamples + 1, T+1, K]``."""
        base = record["rows"]["base"]
        self._check("base", base["ids"], record)
        return np.stack([self._resampled(f"base {kind}", scores) for kind, scores in base["kinds"].items()], axis=2)

    def _check(self, what: str, ids: str, record: Record) -> None:
        if self._ids.setdefault(what, ids) != ids:
            raise SecuraError(f"{record['cell']}: its rows of {what} are not those of the other runs")

    def _resampled(self, what: str, rows: Sequence[str | None]) -> Array:
        scores = [unpack(text) for text in rows]
        n = next(len(row) for row in scores if row is not None)
        if (what, n) not in self._weights:
            rng = np.random.default_rng([self.seed, zlib.crc32(what.encode())])
            self._weights[what, n] = row_weights(n, self.resamples, rng)
        weights = self._weights[what, n]
        return np.stack([np.full(len(weights), np.nan) if row is None else weights @ row for row in scores], axis=1)


def significance(
    groups: Sequence[Group],
    reference: Group,
    metrics: Sequence[str],
    bootstrap: Bootstrap,
    progress: Callable[[], object] = lambda: None,
) -> dict[tuple[str, str], Difference]:
    """Every other group against the reference, p-values adjusted by Holm's method for all of them together.

    Args:
        groups: The groups.
        reference: One of them.
        metrics: What is tested.
        bootstrap: The resamples.
        progress: Called after every group and metric.

    Returns:
        ``(group label, metric)`` -> the difference.
    """
    raw: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    for metric in metrics:
        theirs = _by_seed(reference, metric, bootstrap)
        for one in groups:
            if one is not reference:
                ours = _by_seed(one, metric, bootstrap)
                paired = len(set(ours)) == len(one.records) == len(reference.records) and list(ours) == list(theirs)
                rng = np.random.default_rng([bootstrap.seed, zlib.crc32(f"{one.label} {metric}".encode())])
                raw[one.label, metric] = difference(_stack(ours), _stack(theirs), paired, rng)
            progress()
    adjusted = holm([p for *_, p in raw.values()])
    return {key: Difference(*found[:3], p) for (key, found), p in zip(raw.items(), adjusted, strict=True)}


def _by_seed(one: Group, metric: str, bootstrap: Bootstrap) -> dict[Any, list[Array]]:
    """Resampled metrics of a group's runs by seed, in the seeds' order."""
    found: dict[Any, list[Array]] = {}
    for record in sorted(one.records, key=lambda record: str(record["meta"].get("seed"))):
        found.setdefault(record["meta"].get("seed"), []).append(bootstrap.metric(record, metric))
    return found


def _stack(runs: dict[Any, list[Array]]) -> Array:
    return np.stack([run for same in runs.values() for run in same], axis=1)


def cell_text(found: tuple[float, float | None] | None) -> str:
    """Mean and interval as text."""
    if found is None:
        return "-"
    mean, half = found
    digits = 0 if abs(mean) >= 100 else 3
    return number(mean, digits) if half is None else f"{number(mean, digits)} ± {number(half, digits)}"
