"""What a score must be read against: the values of answers that need no model.

*Chance* is the expected score of guessing evenly among a row's choices, *majority* the score of always giving the most
frequent class. Both are computed in the task's own metric: macro-F1 of a constant answer is far below its accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from secura_lightning.data.rows import Row
from secura_lightning.metrics.corpus import macro_f1_from
from secura_lightning.metrics.text import row_score, score


def answers_of(row: Row) -> tuple[str, ...]:
    """Every right answer of a row."""
    return (row.answer, *row.aliases)


def guess(row: Row, metric: str = "accuracy") -> float:
    """Expected score of guessing evenly among a row's choices; 0 without choices."""
    if not row.choices:
        return 0.0
    return float(np.mean([row_score(metric, choice, answers_of(row), row.prompt) for choice in row.choices]))


def chance(rows: Sequence[Row], metric: str = "accuracy") -> float | None:
    """Expected score of guessing evenly among each row's choices; None where a row has none.

    For macro-F1, the value of the expected counts.
    """
    if not _is_classification(rows):
        return None
    if metric != "macro_f1":
        return float(np.mean([guess(row, metric) for row in rows]))
    classes = sorted({row.answer for row in rows})
    shares = np.array([[row.choices.count(name) / len(row.choices) for name in classes] for row in rows])
    right = np.array([[row.answer == name for name in classes] for row in rows])
    return macro_f1_from(np.concatenate([(shares * right).sum(0), shares.sum(0), right.sum(0)]))


def majority(rows: Sequence[Row], metric: str = "accuracy") -> float | None:
    """Score of always giving the most frequent class; None where a row has no choices.

    The class is the answer where all rows share their choices (labels), else the answer's place among them.
    """
    if not _is_classification(rows):
        return None
    if len({frozenset(row.choices) for row in rows}) == 1:
        label = Counter(row.answer for row in rows).most_common(1)[0][0]
        constant = [label] * len(rows)
    else:
        place = Counter(row.choices.index(row.answer) for row in rows).most_common(1)[0][0]
        constant = [row.choices[place] if place < len(row.choices) else "" for row in rows]
    return score(metric, constant, [answers_of(row) for row in rows], [row.prompt for row in rows])[0]


def _is_classification(rows: Sequence[Row]) -> bool:
    return bool(rows) and all(row.choices for row in rows)
