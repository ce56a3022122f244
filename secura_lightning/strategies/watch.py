"""The base-knowledge probe in two disjoint parts: what a strategy may watch, and what the report scores.

A promise that is only checked on the rows that it is kept by says little. So a strategy that acts on the probe watches
one part of it, and the run's report scores the other. The parts depend on the rows alone, not on the run or its seed:
half of each kind of knowledge, by a hash of the row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from secura_lightning.data.probe import Part, Probe
from secura_lightning.data.rows import Row
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.evaluate import ProbeScore
from secura_lightning.metrics.continual import base_retention

T = TypeVar("T")
Answers = dict[str, list[float]]


class ProbePart(Probe):
    """Some of the rows and texts of another probe, scored as it scores them, under a name that says so.

    Args:
        whole: The other probe.
        part: Which part: what a strategy may act on, or the rest.
        rows: Its rows that belong to the part.
        texts: Its texts that do.
    """

    def __init__(self, whole: Probe, part: Part, rows: list[Row], texts: list[str]) -> None:
        super().__init__(f"{whole.name} ({part} part)", whole.max_new_tokens, whole.separator)
        self.whole = whole
        self.part = part
        self.stop, self.window, self.stride = whole.stop, whole.window, whole.stride
        self.chat, self.system = whole.chat, whole.system
        self._rows = rows
        self._texts = texts

    def metric(self, row: Row) -> str:
        """The whole probe's metric for a row."""
        return self.whole.metric(row)

    def rows(self) -> list[Row]:
        """The part's questions."""
        return self._rows

    def texts(self) -> list[str]:
        """The part's documents."""
        return self._texts


def split_probe(probe: Probe, share: float) -> tuple[ProbePart, ProbePart]:
    """The part to watch, about ``share`` of every kind, and the rest.

    Texts are watched only where the probe has no questions: the rest keeps them otherwise.

    Raises:
        ConfigError: There is too little to split.
    """
    rows, texts = probe.rows(), probe.texts()
    watched: set[int] = set()
    for kind in sorted({row.kind for row in rows}):
        members = [i for i, row in enumerate(rows) if row.kind == kind]
        watched |= _some(members, share, lambda i: f"{rows[i].id}/{rows[i].prompt}")
    documents = set() if rows else _some(list(range(len(texts))), share, lambda i: texts[i])
    if not watched and not documents:
        raise ConfigError(
            f"trainer.callbacks.RetentionGuard: the probe '{probe.name}' is too small to be split in two; "
            "give the guard its own with watch"
        )
    return (
        ProbePart(probe, "watched", [rows[i] for i in sorted(watched)], [texts[i] for i in sorted(documents)]),
        ProbePart(probe, "held-out", _without(rows, watched), _without(texts, documents)),
    )


def _some(members: list[int], share: float, key: Callable[[int], str]) -> set[int]:
    """``share`` of the members, at least one of two and never all."""
    order = sorted(members, key=lambda i: hashlib.sha256(key(i).encode()).digest())
    return set(order[: min(max(1, round(share * len(order))), len(order) - 1)])


def _without(items: Sequence[T], taken: set[int]) -> list[T]:
    return [item for i, item in enumerate(items) if i not in taken]


def retention(now: ProbeScore, base: ProbeScore) -> float:
    """What is left of the base's score, in 0..1.

    The mean over kinds of min(1, score / base's score), as ``base_retention`` in the report; for a probe of text alone
    min(1, base's perplexity / perplexity).

    Raises:
        ConfigError: The base knows nothing of what is asked.
    """
    if now.kinds:
        value = base_retention([[base.kinds[kind] for kind in base.kinds], [now.kinds[kind] for kind in base.kinds]])
        if value is None:
            raise ConfigError(f"data.probe: the base answers no question of '{now.probe}', so it has nothing to retain")
        return value
    assert now.perplexity is not None
    assert base.perplexity is not None
    return min(1.0, base.perplexity / now.perplexity)


def answers_of(score: ProbeScore) -> Answers:
    """The score of every question, by kind."""
    found: Answers = {}
    for row in score.rows:
        found.setdefault(row.kind, []).append(float(row.score))
    return found


def retention_bound(now: Answers, base: Answers, confidence: float, resamples: int = 2000) -> float:
    """What :func:`retention` is above with some probability, on questions like these: a one-sided interval.

    Its width is that of a bootstrap of questions within their kind, the same ones for both models, taken on the logit
    scale: shares near 1 are skewed, and plain percentiles promise too much there. Where nothing is lost it is 1.

    Args:
        now: Scores by kind.
        base: The untouched base's, of the same questions in the same order.
        confidence: The probability.
        resamples: Draws.
    """
    generator = np.random.default_rng(0)
    kept, value = [], 0.0
    known = {kind: np.array(scores) for kind, scores in base.items() if sum(scores)}
    for kind, then in known.items():
        after = np.array(now[kind])
        value += min(1.0, after.mean() / then.mean()) / len(known)
        drawn = generator.integers(len(then), size=(resamples, len(then)))
        left, had = after[drawn].mean(1), then[drawn].mean(1)
        kept.append(np.minimum(1.0, np.divide(left, had, out=np.ones_like(left), where=had > 0)))
    if not 0 < value < 1 - 1e-9:
        return float(round(value))
    width = NormalDist().inv_cdf(confidence) * float(np.mean(kept, axis=0).std(ddof=1)) / (value * (1 - value))
    return 1 / (1 + math.exp(width - math.log(value / (1 - value))))
