"""The metrics of runs under resamples of their evaluation rows: what single runs are compared by."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from secura_lightning.errors import SecuraError
from secura_lightning.metrics.corpus import CORPUS
from secura_lightning.study.records import Record, unpack, unpack_counts
from secura_lightning.study.stats import Array, row_weights

Kinds = Mapping[str, Sequence[str]]  # name -> kinds of base knowledge that `retention/name` averages


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
    is the mean of the drawn rows' scores; that of macro-F1, BLEU and chrF is computed from the drawn rows' counts.

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
            metric = (record.get("scored", {}).get(task) or {}).get("metric")
            columns.append(
                self._recounted(f"task {task}", metric, found[task].get("counts"), record["cell"])
                if metric in CORPUS
                else self._resampled(f"task {task}", found[task]["scores"])
            )
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
        """Mean scores under every resample, a column for each evaluation ``[resamples + 1, T+1]``."""
        scores = [unpack(text) for text in rows]
        weights = self._draws(what, next(len(row) for row in scores if row is not None))
        return np.stack([np.full(len(weights), np.nan) if row is None else weights @ row for row in scores], axis=1)

    def _recounted(self, what: str, metric: str, rows: Sequence[str | None] | None, cell: str) -> Array:
        """The same of a metric that is no mean of rows, from the rows' counts."""
        if rows is None:
            raise SecuraError(
                f"{cell}: {what} is scored by {metric}, which is no mean of its rows' scores, and its rows' counts "
                "were not saved: name the run's folder instead of results.jsonl, or compare groups of several seeds"
            )
        columns = []
        for counts in map(unpack_counts, rows):
            if counts is None:
                columns.append(np.full(self.resamples + 1, np.nan))
                continue
            n = len(counts)
            totals = np.rint(self._draws(what, n) @ counts * n)  # whole numbers, as the metric expects
            columns.append(np.array([CORPUS[metric].value(total) for total in totals]))
        return np.stack(columns, axis=1)

    def _draws(self, what: str, n: int) -> Array:
        if (what, n) not in self._weights:
            rng = np.random.default_rng([self.seed, zlib.crc32(what.encode())])
            self._weights[what, n] = row_weights(n, self.resamples, rng)
        return self._weights[what, n]
