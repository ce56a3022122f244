"""Intervals and tests: Student's t over seeds, a paired bootstrap over rows and seeds, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution function for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    cos2 = math.cos(angle) ** 2
    term = total = 1.0
    if df % 2:
        for k in range(3, df - 1, 2):
            term *= cos2 * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * total if df > 1 else 0.0))
    else:
        for k in range(2, df - 1, 2):
            term *= cos2 * (k - 1) / k
            total += term
        inside = math.sin(angle) * total
    return 0.5 * (1 + inside)


def t_quantile(p: float, df: int) -> float:
    """The t with ``t_cdf(t, df) == p``, for p in (0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean and half width of its t-interval; the width is None for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, t_quantile((1 + level) / 2, n - 1) * deviation / math.sqrt(n)


def row_weights(n: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each of ``n`` rows is drawn, as shares that sum to 1, ``[resamples + 1, n]``.

    The first resample is the rows as they are, so that one computation gives the observed value too.
    """
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.vstack([np.ones((1, n)), drawn]) / n


def difference(
    ours: Array, theirs: Array, paired: bool, rng: np.random.Generator, level: float = 0.95
) -> tuple[float, float, float, float]:
    """The difference between two groups of runs, by bootstrap over rows (drawn already) and seeds (drawn here).

    Args:
        ours: A metric of each run under each resample of rows, ``[resamples + 1, runs]``, the observed one first; the
            same resamples for both groups, which is what makes the rows paired.
        theirs: The same of the reference.
        paired: The runs of both groups have the same seeds in the same order, and are drawn together.
        rng: Draws the seeds.
        level: What the interval covers.

    Returns:
        Observed difference of means, lower and upper end of its percentile interval, and the two-sided p-value: twice
        the smaller share of resampled differences on either side of zero, never below 2 / (resamples + 1).
    """
    observed = float(ours[0].mean() - theirs[0].mean())
    n = len(ours) - 1
    mine = rng.integers(0, ours.shape[1], size=(n, ours.shape[1]))
    other = mine if paired else rng.integers(0, theirs.shape[1], size=(n, theirs.shape[1]))
    drawn = np.take_along_axis(ours[1:], mine, 1).mean(1) - np.take_along_axis(theirs[1:], other, 1).mean(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    return observed, float(low), float(high), min(1.0, 2 * (min(below, above) + 1) / (n + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): the family-wise error stays below the level they are read at."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats: none is at least as large in both and larger in one."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(u >= x and v >= y and (u > x or v > y) for j, (u, v) in enumerate(points) if j != i)
    ]
