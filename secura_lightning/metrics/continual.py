r"""Continual-learning metrics over the accuracy matrix, in numpy alone.

``R`` is ``[T+1, T]``: ``R[t, i]`` is the score on task ``i`` (0-based column) after ``t`` tasks; row 0 is the untouched
base, so the score right after learning task ``i`` is ``R[i+1, i]``. Cells not measured are NaN.

             task 1   task 2   task 3
    base       .        f        .          f  zero-shot transfer (FWT, against row 0)
    after 1    d        f        .          d  learning accuracy
    after 2    x        d        f          x  what forgetting compares with d
    after 3    a        a        a          a  AP

Every function looks at the last measured row ``t`` (so that a run in progress has metrics too) and returns None where
its value is undefined: a cell that it needs is NaN, or there are too few tasks.

Definitions: Lopez-Paz and Ranzato, arXiv 1706.08840 (BWT, FWT); Chaudhry et al., arXiv 1801.10112 (forgetting); Wang et
al., arXiv 2310.06762 (TRACE's BWT).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def as_matrix(values: ArrayLike) -> Matrix:
    """The accuracy matrix as floats, None as NaN.

    Raises:
        ValueError: The shape is not ``(T+1, T)`` with T >= 1.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] < 1 or matrix.shape[0] != matrix.shape[1] + 1:
        raise ValueError(f"an accuracy matrix has T+1 rows and T columns, row 0 the base; got shape {matrix.shape}")
    return matrix


def last_row(values: ArrayLike) -> int:
    """How many tasks were learned: the index of the last row with any score, 0 when only the base was measured."""
    measured = np.flatnonzero(~np.isnan(np.asarray(values, dtype=np.float64)).all(axis=1))
    return int(measured[-1]) if len(measured) else 0


def _mean(cells: Sequence[float] | Matrix) -> float | None:
    """Mean, or None when there is nothing to average or a cell is missing (a partial mean would mislead)."""
    cells = np.asarray(cells, dtype=np.float64)
    return float(cells.mean()) if cells.size and not np.isnan(cells).any() else None


def average_performance(values: ArrayLike, after: int | None = None) -> float | None:
    """AP_t = mean of R[t, i] over the t tasks learned so far; ``after`` is t, by default the last measured row."""
    matrix = as_matrix(values)
    t = last_row(matrix) if after is None else after
    return _mean(matrix[t, :t])


def average_incremental_accuracy(values: ArrayLike) -> float | None:
    """AIA = mean of AP_1 .. AP_t."""
    matrix = as_matrix(values)
    steps = [average_performance(matrix, after=t) for t in range(1, last_row(matrix) + 1)]
    return _mean([np.nan if step is None else step for step in steps])


def _losses(matrix: Matrix) -> Matrix:
    """R[t, i] - R[i+1, i] for every task but the last learned one, ``[t - 1]``."""
    t = last_row(matrix)
    return np.array([matrix[t, i] - matrix[i + 1, i] for i in range(t - 1)])


def backward_transfer(values: ArrayLike) -> float | None:
    """BWT of GEM: mean change of the t-1 earlier tasks since each was learned. None before the second task."""
    return _mean(_losses(as_matrix(values)))


def backward_transfer_trace(values: ArrayLike) -> float | None:
    """BWT as TRACE divides it: the same sum over t instead of t-1 (the last task counts as unchanged)."""
    matrix = as_matrix(values)
    losses = _losses(matrix)
    return _mean(np.append(losses, 0.0)) if len(losses) else None


def forgetting(values: ArrayLike) -> float | None:
    """Mean over earlier tasks of (best score since it was learned, the last row excluded) minus the score now."""
    matrix = as_matrix(values)
    t = last_row(matrix)
    # np.max passes NaN on, so that a missing cell leaves the mean undefined.
    return _mean([matrix[i + 1 : t, i].max() - matrix[t, i] for i in range(t - 1)])


def forward_transfer(values: ArrayLike) -> float | None:
    """FWT: mean over tasks 2..t of the score just before learning the task, minus the base's score."""
    matrix = as_matrix(values)
    return _mean([matrix[i, i] - matrix[0, i] for i in range(1, last_row(matrix))])


def learning_accuracy(values: ArrayLike) -> float | None:
    """Mean score on each task right after it was learned."""
    matrix = as_matrix(values)
    return _mean([matrix[i + 1, i] for i in range(last_row(matrix))])


def base_delta(kinds: ArrayLike) -> float | None:
    """Mean over kinds of knowledge of (score now) - (score of the base).

    Args:
        kinds: Probe scores ``[T+1, K]``, one column a kind, row 0 the untouched base.
    """
    table = np.asarray(kinds, dtype=np.float64)
    return _mean(table[last_row(table)] - table[0]) if table.size else None


def base_retention(kinds: ArrayLike) -> float | None:
    """Mean over kinds of min(1, score now / score of the base), in 0..1.

    Kinds that the base scores zero on hold nothing to retain and are left out; None when that is all of them.

    Args:
        kinds: Probe scores ``[T+1, K]``, one column a kind, row 0 the untouched base.
    """
    table = np.asarray(kinds, dtype=np.float64)
    if not table.size:
        return None
    known = ~(table[0] <= 0)  # NaN stays in, and leaves the mean undefined
    return _mean(np.minimum(1.0, table[last_row(table)][known] / table[0][known]))


def summarise(matrix: ArrayLike, base: ArrayLike | None = None) -> dict[str, float | None]:
    """All metrics of one run, under the names that ``continual.json`` uses.

    Args:
        matrix: Scores ``[T+1, T]``, row 0 the untouched base, NaN (or None) where missing.
        base: Probe scores ``[T+1, K]`` per kind of knowledge; None without a probe.

    Returns:
        ``AP``, ``AIA``, ``BWT``, ``BWT_trace``, ``forgetting``, ``FWT``, ``learning_accuracy``, ``base_retention``,
        ``base_delta``; None where undefined.
    """
    return {
        "AP": average_performance(matrix),
        "AIA": average_incremental_accuracy(matrix),
        "BWT": backward_transfer(matrix),
        "BWT_trace": backward_transfer_trace(matrix),
        "forgetting": forgetting(matrix),
        "FWT": forward_transfer(matrix),
        "learning_accuracy": learning_accuracy(matrix),
        "base_retention": None if base is None else base_retention(base),
        "base_delta": None if base is None else base_delta(base),
    }
