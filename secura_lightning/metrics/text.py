"""Scores of predicted text against a reference, each in 0..1.

Two levels, because the field reports both:

* a *row* score for every prediction (:data:`METRICS`), saved beside it so that any score can be recomputed;
* the *task* score (:func:`score`): the mean of the rows, except for the metrics of
  :data:`~secura_lightning.metrics.corpus.CORPUS`, which are computed from summed counts.

A row with several right answers scores the best of them (SARI takes all at once).

ROUGE goes through torchmetrics; BLEU and chrF follow sacrebleu (see :mod:`secura_lightning.metrics.corpus`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

from secura_lightning.errors import ConfigError
from secura_lightning.metrics.corpus import CORPUS, bleu, chrf
from secura_lightning.metrics.edit import edit_similarity
from secura_lightning.metrics.simplification import sari

References = Sequence[str] | Sequence[Sequence[str]]
"""One right answer a row, or several."""

# A sign counts only where it does not join two numbers; commas only as thousands separators.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def extract_number(text: str) -> Decimal | None:
    """The number that a worked answer ends in: the first one after GSM8K's ``####``, else the last one of the text."""
    _, marker, tail = text.partition("####")
    if marker and (found := _NUMBER.search(tail)):
        return _decimal(found.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", "").replace("$", ""))


def normalise(text: str) -> str:
    """Text for lenient comparison: NFKC, case folded, white space squeezed, outer quotes and final punctuation off."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(".!?,;:").strip(_QUOTES).rstrip(".!?,;:").strip()


def numeric(prediction: str, reference: str) -> float:
    """1 when both end in the same number (18 = 18.0 = $18). A reference without a number is compared as text."""
    wanted = extract_number(reference)
    return exact(prediction, reference) if wanted is None else float(extract_number(prediction) == wanted)


def exact(prediction: str, reference: str) -> float:
    """1 when the texts are equal after :func:`normalise`."""
    return float(normalise(prediction) == normalise(reference))


def squad_exact(prediction: str, reference: str) -> float:
    """1 when the texts are equal as SQuAD compares them: no case, punctuation, articles or extra white space.

    The exact match that TriviaQA, NQ-open and WebQuestions report, and torchmetrics' ``squad`` computes.
    """
    ours, theirs = (
        " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()) for text in (prediction, reference)
    )
    return float(ours == theirs)


def accuracy(prediction: str, reference: str) -> float:
    """1 when the chosen label is the reference, white space around it aside."""
    return float(prediction.strip() == reference.strip())


def _rouge(key: str, prediction: str, reference: str) -> float:
    """F-measure of one ROUGE, through torchmetrics (imported here: it takes seconds, and torch with it)."""
    from torchmetrics.functional.text import rouge_score

    # Only the wanted key: the default ones include rougeLsum, which downloads a sentence splitter.
    return float(rouge_score(prediction, reference, rouge_keys=(key,))[f"{key}_fmeasure"])


def rouge1(prediction: str, reference: str) -> float:
    """ROUGE-1 F-measure, without stemming."""
    return _rouge("rouge1", prediction, reference)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure (longest common subsequence of words), without stemming."""
    return _rouge("rougeL", prediction, reference)


METRICS: dict[str, Callable[..., float]] = {
    "numeric": numeric,
    "exact": exact,
    "squad_exact": squad_exact,
    "accuracy": accuracy,
    "macro_f1": accuracy,  # of one row; the task's value is computed from all
    "rouge1": rouge1,
    "rougeL": rouge_l,
    "chrf": chrf,
    "bleu": bleu,
    "edit_similarity": edit_similarity,
    "sari": sari,
}
"""Row scores by the name that a task's ``metric`` takes: of a prediction and a reference (and, for SARI, a source)."""

_WITH_SOURCE = ("sari",)


def check_metric(metric: str) -> None:
    """Refuse an unknown metric before anything is trained.

    Raises:
        ConfigError: ``metric`` is none of :data:`METRICS`.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric: {metric!r} is unknown; choose one of {', '.join(METRICS)}")


def row_score(metric: str, prediction: str, references: str | Sequence[str], source: str = "") -> float:
    """Score of one prediction in 0..1.

    Args:
        metric: Key of :data:`METRICS`.
        prediction: The text.
        references: The right answer, or all of them.
        source: What the model was given; only SARI reads it.
    """
    if metric in _WITH_SOURCE:
        return METRICS[metric](prediction, references, source)
    return max(METRICS[metric](prediction, reference) for reference in _several(references))


def score(
    metric: str, predictions: Sequence[str], references: References, sources: Sequence[str] | None = None
) -> tuple[float, list[float]]:
    """Score a task's predictions.

    Args:
        metric: Key of :data:`METRICS`.
        predictions: One text a row.
        references: One or several right answers a row, in the same order.
        sources: What the model was given, one text a row; needed by SARI alone.

    Returns:
        The task's value (corpus-level for macro-F1, BLEU and chrF, else the mean) and the row scores, all in 0..1. NaN
        and an empty list without rows.

    Raises:
        ConfigError: The metric is unknown.
        ValueError: The sequences differ in length, or SARI is given no sources.
    """
    check_metric(metric)
    if sources is None:
        if metric in _WITH_SOURCE:
            raise ValueError(f"{metric} compares with what the model was given: pass sources")
        sources = [""] * len(predictions)
    rows = [row_score(metric, *row) for row in zip(predictions, references, sources, strict=True)]
    if not rows:
        return float("nan"), rows
    if metric not in CORPUS:
        return float(np.mean(rows)), rows
    counts = CORPUS[metric].counts(predictions, _closest(metric, predictions, references))
    return CORPUS[metric].value(counts.sum(axis=0)), rows


def bootstrap(
    metric: str,
    predictions: Sequence[str],
    references: References,
    rows: Sequence[float],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a task's value: rows are drawn with replacement, ``resamples`` times.

    Args:
        metric: Key of :data:`METRICS`.
        predictions: One text a row.
        references: One or several right answers a row.
        rows: Their row scores, from :func:`score`.
        level: Share of the resampled values that the interval covers.
        resamples: How many resamples; 1000 settle the third decimal's neighbourhood.
        seed: Seed of the draws; global random state is neither read nor moved.

    Returns:
        Lower and upper end; both NaN without rows.
    """
    if metric not in CORPUS or not rows:
        return bootstrap_mean([rows], level, resamples, seed)
    counts = CORPUS[metric].counts(predictions, _closest(metric, predictions, references))  # [n, k]
    drawn = _draws(len(rows), resamples, np.random.default_rng(seed)) @ counts
    return _ends(np.array([CORPUS[metric].value(total) for total in drawn]), level)


def bootstrap_mean(
    groups: Sequence[Sequence[float]], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over groups of each group's mean; rows are drawn within their group.

    Args:
        groups: Row scores, one sequence per group (kinds of knowledge); the mean of all rows is one group.
        level: Share of the resampled values that the interval covers.
        resamples: How many resamples.
        seed: Seed of the draws; global random state is neither read nor moved.

    Returns:
        Lower and upper end; both NaN without rows.
    """
    if not groups or not all(groups):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = [_draws(len(rows), resamples, rng) @ np.asarray(rows, dtype=np.float64) / len(rows) for rows in groups]
    return _ends(np.mean(means, axis=0), level)


def _draws(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of ``n`` rows is drawn in each resample ``[resamples, n]``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples)


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _several(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def _closest(metric: str, predictions: Sequence[str], references: References) -> list[str]:
    """The right answer that each prediction scores best with, for metrics that count one a row."""
    return [
        max(_several(answers), key=lambda answer: METRICS[metric](prediction, answer))
        for prediction, answers in zip(predictions, references, strict=True)
    ]
