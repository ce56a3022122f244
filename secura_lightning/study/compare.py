"""Groups of runs that differ in nothing but the seed, their metrics with intervals, and the tests between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.metrics import continual
from secura_lightning.study.alike import SEEDS
from secura_lightning.study.axes import means, show
from secura_lightning.study.records import LOWER_IS_BETTER, Record, metric_names, value_of
from secura_lightning.study.resample import Bootstrap, Kinds
from secura_lightning.study.stats import Array, difference_over_rows, difference_over_seeds, holm, mean_interval
from secura_lightning.study.table import number, shortened

Basis = Literal["seeds", "rows"]


@dataclass(frozen=True)
class Group:
    """Runs that are repeats of each other.

    Attributes:
        axes: Axis -> shown value, cut where it is long, seeds left out.
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
        basis: What the interval covers: the choice of ``seeds``, or that of evaluation ``rows`` alone.
    """

    difference: float
    low: float
    high: float
    p: float
    basis: Basis


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
    short = {name: shortened(one.axes[name] for one in found) for name in varying}
    return [Group({k: short[k][one.axes[k]] for k in varying} or {"run": "all"}, one.records) for one in found]


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
    named = [one for one in groups if pairs and set(pairs) <= set(one.axes)]
    fits = fits or [one for one in named if all(means(text, one.axes[name]) for name, text in pairs.items())]
    fits = fits or [one for one in groups if wanted in one.axes.values()]
    if len(fits) != 1:
        which = "fits no group" if not fits else f"fits {len(fits)} groups"
        raise ConfigError(f"--against {wanted}: {which}; name one of {'; '.join(one.label for one in groups)}")
    return fits[0]


def significance(
    groups: Sequence[Group],
    reference: Group,
    metrics: Sequence[str],
    bootstrap: Bootstrap,
    progress: Callable[[], object] = lambda: None,
) -> dict[tuple[str, str], Difference]:
    """Every other group against the reference, p-values adjusted by Holm's method for all of them together.

    Where both groups have several runs, that is Student's t over the runs' metrics: over the differences of equal seeds
    where both groups have the same, else Welch's. Where one has a single run, or no run differs from another, it is the
    paired bootstrap over evaluation rows.

    Args:
        groups: The groups.
        reference: One of them.
        metrics: What is tested.
        bootstrap: The resamples.
        progress: Called after every group and metric.

    Returns:
        ``(group label, metric)`` -> the difference.

    Raises:
        SecuraError: A metric is undefined, or needs rows that were not saved.
    """
    raw: dict[tuple[str, str], tuple[tuple[float, float, float, float], Basis]] = {}
    for metric in metrics:
        for one in groups:
            if one is not reference:
                found = _over_seeds(one, reference, metric, bootstrap.kinds)
                raw[one.label, metric] = (
                    (found, "seeds") if found else (_over_rows(one, reference, metric, bootstrap), "rows")
                )
            progress()
    adjusted = holm([found[3] for found, _ in raw.values()])
    return {
        key: Difference(*found[:3], p=p, basis=basis)
        for (key, (found, basis)), p in zip(raw.items(), adjusted, strict=True)
    }


def _over_seeds(one: Group, reference: Group, metric: str, kinds: Kinds) -> tuple[float, float, float, float] | None:
    """The t-test of two groups; None where it cannot be made."""
    if min(len(one.records), len(reference.records)) < 2:
        return None
    sides = []
    for members in (one.records, reference.records):
        figures = []
        for record in members:
            figure = value(record, metric, kinds)
            if figure is None:
                raise SecuraError(f"{record['cell']}: {metric} is undefined, so its differences cannot be tested")
            figures.append((str(record["meta"].get("seed")), figure))
        sides.append(sorted(figures))
    ours, theirs = ([figure for _, figure in side] for side in sides)
    seeds = [[seed for seed, _ in side] for side in sides]
    paired = seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0])
    return difference_over_seeds(ours, theirs, paired)


def _over_rows(one: Group, reference: Group, metric: str, bootstrap: Bootstrap) -> tuple[float, float, float, float]:
    """The bootstrap over rows of two groups' means over their runs."""
    ours, theirs = (
        np.mean([bootstrap.metric(record, metric) for record in side.records], axis=0) for side in (one, reference)
    )
    return difference_over_rows(ours, theirs)


def cell_text(found: tuple[float, float | None] | None) -> str:
    """Mean and interval as text; a count that all runs share has none."""
    if found is None:
        return "-"
    mean, half = found
    digits = 0 if abs(mean) >= 100 else 3
    alone = half is None or (half == 0 and mean == int(mean) and mean > 1)
    return number(mean, digits) if alone else f"{number(mean, digits)} ± {number(half, digits)}"
