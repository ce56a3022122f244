"""Scores that the field reports over a whole corpus: computed from counts that are summed over rows.

    counts of every row [n, k] --sum--> [k] --> value

Summing weighted rows instead gives a bootstrap resample's value without touching a text again.

BLEU and chrF follow sacrebleu: torchmetrics' chrF takes 60 ms for a sentence of 30 words (here 1 ms) and gives a
perfect sentence of fewer than six characters less than 1; its BLEU gives a perfect sentence of fewer than four words 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_CHRF_ORDER, _CHRF_BETA = 6, 2.0


@dataclass(frozen=True, slots=True)
class CorpusMetric:
    """A corpus-level metric.

    Attributes:
        counts: From predictions and references to counts ``[n, k]``, one line per row.
        value: From the counts' sum ``[k]`` to the score in 0..1.
    """

    counts: Callable[[Sequence[str], Sequence[str]], Array]
    value: Callable[[Array], float]


# ---------------------------------------------------------------------------------------------------------- chrF


def _chrf_counts(prediction: str, reference: str) -> Array:
    """Character n-gram counts ``[18]``: six of the prediction, of the reference, in common; white space removed."""
    counts = np.zeros((3, _CHRF_ORDER))
    texts = ["".join(text.split()) for text in (prediction, reference)]
    for n in range(1, _CHRF_ORDER + 1):
        ours, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        # As in sacrebleu, an order that the reference does not reach says nothing about the prediction.
        counts[:, n - 1] = ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()
    return counts.ravel()


def _chrf_from(counts: Array) -> float:
    """ChrF2 of summed counts: F_2 of precision and recall averaged over the orders that both texts reach."""
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


# ---------------------------------------------------------------------------------------------------------- BLEU


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


# ------------------------------------------------------------------------------------------------------ macro-F1


def _class_counts(predictions: Sequence[str], references: Sequence[str]) -> Array:
    """Counts ``[n, 3 * classes]``: hits, predictions and references of every class that occurs as a reference."""
    classes = sorted({reference.strip() for reference in references})
    ours = np.array([[text.strip() == name for name in classes] for text in predictions], dtype=np.float64)
    theirs = np.array([[text.strip() == name for name in classes] for text in references], dtype=np.float64)
    return np.concatenate([ours * theirs, ours, theirs], axis=1)


def macro_f1_from(counts: Array) -> float:
    """Mean of the classes' F1 from ``[3 * classes]`` hits, predictions and references.

    Only classes that occur as a reference are averaged, so that an answer which is no class at all counts as a miss
    and not as a class of its own.
    """
    hits, ours, theirs = counts.reshape(3, -1)
    occurs = theirs > 0
    return float((2 * hits[occurs] / (ours[occurs] + theirs[occurs])).mean())


def _by_row(count: Callable[[str, str], Array]) -> Callable[[Sequence[str], Sequence[str]], Array]:
    def counts(predictions: Sequence[str], references: Sequence[str]) -> Array:
        return np.stack([count(ours, wanted) for ours, wanted in zip(predictions, references, strict=True)])

    return counts


CORPUS: dict[str, CorpusMetric] = {
    "chrf": CorpusMetric(_by_row(_chrf_counts), _chrf_from),
    "bleu": CorpusMetric(_by_row(_bleu_counts), _bleu_from),
    "macro_f1": CorpusMetric(_class_counts, macro_f1_from),
}
"""Corpus-level metrics by name; every other metric is the mean of its rows."""
