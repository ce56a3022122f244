"""SARI: how well a simplification keeps, deletes and adds words (Xu et al., TACL 2016, section 4).

For each n-gram order 1..4, with source S, output O and r references R (counts of S and O times r, those of R summed):

    keep    precision  mean over n-grams of S & O  of  (S & O & R) / (S & O);  recall  |S & O & R| / |S & R|     -> F1
    delete  precision  mean over n-grams of S - O  of  (S - O - R) / (S - O)                                     -> P
    add     precision, recall of the n-grams of O not in S, against those of R not in S, each counted once       -> F1

and SARI is the mean of the three, each averaged over orders. This is the variant of Hugging Face's ``evaluate`` and of
tensor2tensor, which TRACE reports: texts are lower-cased and split by sacrebleu's 13a tokeniser, 0/0 is 1, and
keep-recall sums counts. The authors' script has 0/0 = 0 and averages keep-recall over n-grams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_ORDERS = range(1, 5)
Grams = Counter[tuple[str, ...]]


def sari(prediction: str, reference: str | Sequence[str], source: str) -> float:
    """SARI of one text in 0..1.

    Args:
        prediction: The simplification.
        reference: The reference, or several.
        source: The text that was to be simplified. TRACE gives the whole prompt.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    ours, theirs = _words(prediction), [_words(text) for text in references]
    before = _words(source)
    parts = [_of_order(_grams(before, n), _grams(ours, n), [_grams(text, n) for text in theirs]) for n in _ORDERS]
    return sum(map(sum, parts)) / (3 * len(parts))


def _words(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower()).split()


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _of_order(source: Grams, output: Grams, references: Sequence[Grams]) -> tuple[float, float, float]:
    """Keep, delete and add scores of one n-gram order."""
    wanted: Grams = sum(references, Counter())
    source_r, output_r = (
        Counter({gram: n * len(references) for gram, n in grams.items()}) for grams in (source, output)
    )
    kept = source_r & output_r
    good = kept & wanted
    keep = _f1(_mean_share(good, kept), _ratio(good.total(), (source_r & wanted).total()))
    deleted = source_r - output_r
    delete = _mean_share(deleted - wanted, deleted)
    added, to_add = output.keys() - source.keys(), wanted.keys() - source.keys()
    hits = len(added & to_add)
    return keep, delete, _f1(_ratio(hits, len(added)), _ratio(hits, len(to_add)))


def _mean_share(part: Grams, whole: Grams) -> float:
    """Mean over the n-grams of ``whole`` of the share of each that ``part`` holds; 1 where there is none."""
    return sum(n / whole[gram] for gram, n in part.items()) / len(whole) if whole else 1.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
