"""What a set of rows looks like, in numbers: lengths, classes, overlap. Nothing here prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from secura_lightning.data.encode import IGNORED, Encoded, collate
from secura_lightning.data.rows import Row


@dataclass(slots=True)
class RowCounts:
    """Counts over training rows against test rows.

    Attributes:
        rows: Training rows.
        test: Test rows.
        classes: Rows of each class; empty where rows have no choices. A class is the answer where all rows share
            their choices, else its place among them.
        repeated: Training rows whose prompt and answer occurred before.
        shared_prompts: Test rows whose prompt is a training prompt.
        shared_rows: Test rows whose prompt and answer are a training row's.
        shared_loosely: Test rows whose prompt is a training prompt but for case and white space.
    """

    rows: int = 0
    test: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    shared_prompts: int = 0
    shared_rows: int = 0
    shared_loosely: int = 0


def count_rows(train: Iterable[Row], test: Sequence[Row]) -> RowCounts:
    """One pass over the training rows, which need not fit into memory: 8 bytes of each are kept, twice."""
    answers: Counter[str] = Counter()
    places: Counter[str] = Counter()
    choices: set[frozenset[str]] = set()
    loose: set[bytes] = set()
    prompts: set[bytes] = set()
    whole: set[bytes] = set()
    counts = RowCounts(test=len(test))
    closed = True
    for row in train:
        counts.rows += 1
        prompts.add(_hash(row.prompt))
        loose.add(_hash(_folded(row.prompt)))
        key = _hash(f"{row.prompt}\0{row.answer}")
        counts.repeated += key in whole
        whole.add(key)
        closed = closed and bool(row.choices)
        if closed:
            if len(choices) < 2:
                choices.add(frozenset(row.choices))
            answers[row.answer] += 1
            places[f"choice {row.choices.index(row.answer) + 1}"] += 1
    if closed:
        counts.classes = dict(sorted((answers if len(choices) == 1 else places).items(), key=lambda kv: -kv[1]))
    # A text's rows have no prompt: the document itself is what must not be on both sides.
    counts.shared_prompts = sum(bool(row.prompt) and _hash(row.prompt) in prompts for row in test)
    counts.shared_loosely = sum(bool(row.prompt) and _hash(_folded(row.prompt)) in loose for row in test)
    counts.shared_rows = sum(_hash(f"{row.prompt}\0{row.answer}") in whole for row in test)
    return counts


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of whole numbers in equal ranges.

    Attributes:
        edges: Lowest value of each range, then the lowest beyond the last, ``[bars + 1]``.
        counts: Values in each range, ``[bars]``.
    """

    edges: list[int]
    counts: list[int]


def histogram(values: NDArray[np.int32], bars: int = 10) -> Histogram:
    """At most ``bars`` ranges from the smallest to the largest value."""
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // bars))
    edges = list(range(low, high + 1 + width, width))
    return Histogram(edges, np.histogram(values, edges)[0].tolist())


def trained_span(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> tuple[str, str]:
    """A row's text as the model reads it, special tokens included: what is not trained, and what is.

    The border is taken from the labels of a batch, so that it shows what training sees.
    """
    batch = collate([row], 0)
    ids = batch["input_ids"][0].tolist()
    start = int((batch["labels"][0] == IGNORED).sum())
    text, before, trained = (str(tokenizer.decode(part)) for part in (ids, ids[:start], ids[start:]))
    # Together where that works: some tokenizers drop the space in front of what they decode.
    return before, text.removeprefix(before) if text.startswith(before) else trained
