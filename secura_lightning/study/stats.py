"""Intervals and tests: Student's t over seeds, a paired bootstrap over rows for single runs, Holm's correction.

A percentile bootstrap over a few seeds is too narrow: n values have a resampled variance of (n - 1) / n of what it
should be, and no tails beyond the values seen (n = 3: its 95 % intervals cover 73 % of normal draws). Student's t is
exact there for values that are normally distributed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = d
    for m in range(1, 10000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            d = 1 / ((1 + part * d) or tiny)
            c = (1 + part / c) or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast
        return math.exp(log) * _beta_fraction(a, b, x) / a
    return 1 - math.exp(log) * _beta_fraction(b, a, 1 - x) / b


def t_p_value(t: float, df: float) -> float:
    """Two-sided p-value of Student's t: the probability of a value at least as far from zero; ``df`` may be broken."""
    if t * t < df:  # whichever leaves no digits in 1 - x
        return 1 - _incomplete_beta(0.5, df / 2, t * t / (df + t * t))
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


@cache
def t_quantile(p: float, df: float) -> float:
    """The t that a share p of Student's distribution lies below, for p in (0.5, 1)."""
    low, high = 0.0, 1.0
    while t_p_value(high, df) > 2 * (1 - p):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, df) > 2 * (1 - p) else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean and half width of its t-interval; the width is None for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, t_quantile((1 + level) / 2, n - 1) * math.sqrt(_variance(values) / n)


def row_weights(n: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each of ``n`` rows is drawn, as shares that sum to 1, ``[resamples + 1, n]``.

    The first resample is the rows as they are, so that one computation gives the observed value too.
    """
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.vstack([np.ones((1, n)), drawn]) / n


def difference_over_seeds(
    ours: Sequence[float], theirs: Sequence[float], paired: bool, level: float = 0.95
) -> tuple[float, float, float, float] | None:
    """The difference between two groups of at least two runs each, by Student's t.

    Args:
        ours: A metric of each run.
        theirs: The same of the reference.
        paired: Run i of both groups has the same seed: the t-test of the differences, n - 1 degrees of freedom.
            Otherwise Welch's test, which lets the groups' variances differ (Biometrika 1947).
        level: What the interval covers.

    Returns:
        Difference of means, lower and upper end of its interval, two-sided p-value. None where the seeds do not vary
        at all, which says nothing about how far they could.
    """
    gap = math.fsum(ours) / len(ours) - math.fsum(theirs) / len(theirs)
    if paired:
        parts = [_variance([x - y for x, y in zip(ours, theirs, strict=True)]) / len(ours)]
        sizes = [len(ours)]
    else:
        parts = [_variance(values) / len(values) for values in (ours, theirs)]
        sizes = [len(ours), len(theirs)]
    total = sum(parts)
    error = math.sqrt(total)
    if error <= 1e-9 * max(map(abs, (*ours, *theirs))):  # rounding of the sums, or zero
        return None
    # of shares, since squares of small variances may be zero
    df = 1 / sum((part / total) ** 2 / (n - 1) for part, n in zip(parts, sizes, strict=True))
    half = t_quantile((1 + level) / 2, df) * error
    return gap, gap - half, gap + half, t_p_value(gap / error, df)


def _variance(values: Sequence[float]) -> float:
    """Of a sample: the sum of squares over n - 1."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def difference_over_rows(ours: Array, theirs: Array, level: float = 0.95) -> tuple[float, float, float, float]:
    """The difference between two groups of runs as they are, by a paired bootstrap over evaluation rows.

    Args:
        ours: The group's metric under each resample of rows ``[resamples + 1]``, the observed one first; the same
            resamples for both groups, which is what makes the rows paired.
        theirs: The same of the reference.
        level: What the interval covers.

    Returns:
        Observed difference, lower and upper end of its percentile interval, and the two-sided p-value: twice the
        smaller share of resampled differences on either side of zero, never below 2 / (resamples + 1).
    """
    drawn = ours[1:] - theirs[1:]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    return float(ours[0] - theirs[0]), float(low), float(high), min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))


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
