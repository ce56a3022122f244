"""Scores of predicted text against a reference, each in 0..1.

Two levels, because the field reports both:

* a *row* score for every prediction (:data:`METRICS`), saved beside it so that any score can be recomputed;
* the *task* score (:func:`score`): the mean of the rows, except where the field reports a corpus-level value (BLEU,
  chrF), which is computed from summed n-gram counts.

ROUGE goes through torchmetrics. BLEU and chrF follow sacrebleu instead: torchmetrics' chrF takes 60 ms for a sentence
of 30 words (here 1 ms) and gives a perfect sentence of fewer than six characters less than 1; its BLEU gives a perfect
sentence of fewer than four words 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from secura_lightning.errors import ConfigError

Array = NDArray[np.float64]

# A sign counts only where it does not join two numbers; commas only as thousands separators.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+")
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"
_CHRF_ORDER, _CHRF_BETA = 6, 2.0


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


def _chrf_counts(prediction: str, reference: str) -> Array:
    """Character n-gram counts ``[3, 6]``: of the prediction, of the reference, in common; white space removed."""
    counts = np.zeros((3, _CHRF_ORDER))
    texts = ["".join(text.split()) for text in (prediction, reference)]
    for n in range(1, _CHRF_ORDER + 1):
        ours, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        # As in sacrebleu, an order that the reference does not reach says nothing about the prediction.
        counts[:, n - 1] = ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()
    return counts


def _chrf_from(counts: Array) -> float:
    """ChrF2 of summed counts ``[3, 6]``: F_2 of precision and recall averaged over the orders that both texts reach."""
    ours, theirs, common = counts.reshape(3, _CHRF_ORDER)
    reached = (ours > 0) & (theirs > 0)
    if not reached.any() or not common.any():
        return 0.0
    precision = float((common[reached] / ours[reached]).mean())
    recall = float((common[reached] / theirs[reached]).mean())
    return (1 + _CHRF_BETA**2) * precision * recall / (_CHRF_BETA**2 * precision + recall)


def chrf(prediction: str, reference: str) -> float:
    """Sentence-level chrF2 (six character orders, no word orders), as sacrebleu computes it, in 0..1."""
    return _chrf_from(_chrf_counts(prediction, reference))


def _bleu_counts(prediction: str, reference: str) -> Array:
    """BLEU's counts ``[10]``: matches and totals of the four orders, length of prediction and of reference."""
    from sacrebleu.metrics import BLEU

    found = BLEU(effective_order=True).sentence_score(prediction, [reference])
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=np.float64)


def _bleu_from(counts: Array, effective_order: bool = False) -> float:
    """BLEU of summed counts ``[10]``, exponential smoothing."""
    from sacrebleu.metrics import BLEU

    whole = [int(count) for count in counts]
    found = BLEU.compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], "exp", effective_order=effective_order)
    return found.score / 100


def bleu(prediction: str, reference: str) -> float:
    """Sentence-level BLEU as sacrebleu computes it (13a tokens, effective order, exponential smoothing), in 0..1."""
    return _bleu_from(_bleu_counts(prediction, reference), effective_order=True)


METRICS: dict[str, Callable[[str, str], float]] = {
    "numeric": numeric,
    "exact": exact,
    "accuracy": accuracy,
    "rouge1": rouge1,
    "rougeL": rouge_l,
    "chrf": chrf,
    "bleu": bleu,
}
"""Row scores by the name that a task's ``metric`` takes."""

_CORPUS: dict[str, tuple[Callable[[str, str], Array], Callable[[Array], float]]] = {
    "chrf": (_chrf_counts, _chrf_from),
    "bleu": (_bleu_counts, _bleu_from),
}


def check_metric(metric: str) -> None:
    """Refuse an unknown metric before anything is trained.

    Raises:
        ConfigError: ``metric`` is none of :data:`METRICS`.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric: {metric!r} is unknown; choose one of {', '.join(METRICS)}")


def score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> tuple[float, list[float]]:
    """Score a task's predictions.

    Args:
        metric: Key of :data:`METRICS`.
        predictions: One text a row.
        references: One text a row, in the same order.

    Returns:
        The task's value (corpus-level for BLEU and chrF, else the mean) and the row scores, all in 0..1. NaN and an
        empty list without rows.

    Raises:
        ConfigError: The metric is unknown.
        ValueError: The two sequences differ in length.
    """
    check_metric(metric)
    rows = [METRICS[metric](ours, wanted) for ours, wanted in zip(predictions, references, strict=True)]
    if not rows:
        return float("nan"), rows
    if metric not in _CORPUS:
        return float(np.mean(rows)), rows
    count, compute = _CORPUS[metric]
    total = np.sum([count(ours, wanted) for ours, wanted in zip(predictions, references, strict=True)], axis=0)
    return compute(total), rows


def bootstrap(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[str],
    rows: Sequence[float],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a task's value: rows are drawn with replacement, ``resamples`` times.

    Args:
        metric: Key of :data:`METRICS`.
        predictions: One text a row.
        references: One text a row.
        rows: Their row scores, from :func:`score`.
        level: Share of the resampled values that the interval covers.
        resamples: How many resamples; 1000 settle the third decimal's neighbourhood.
        seed: Seed of the draws; global random state is neither read nor moved.

    Returns:
        Lower and upper end; both NaN without rows.
    """
    if not rows:
        return float("nan"), float("nan")
    n = len(rows)
    # Drawing rows with replacement is drawing how often each row counts.
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, n]
    if metric in _CORPUS:
        count, compute = _CORPUS[metric]
        counts = np.stack([count(p, r).ravel() for p, r in zip(predictions, references, strict=True)])  # [n, k]
        values = np.array([compute(total) for total in weights @ counts])
    else:
        values = weights @ np.asarray(rows, dtype=np.float64) / n
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
