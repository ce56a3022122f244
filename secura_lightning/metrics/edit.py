"""Edit similarity of code, as CodeXGLUE and TRACE score line completion (Lu et al., arXiv 2102.04664).

    similarity = 2 LCS(prediction, reference) / (|prediction| + |reference|)          over characters

which is 1 - (insertions + deletions) / (|prediction| + |reference|), the ratio of the fuzzywuzzy library that both call
with python-Levenshtein installed. They round it to whole per cents of a row; here it is exact.
"""

from __future__ import annotations

import re

# Py150 replaces literals by placeholders that may hold the literal: <STR_LIT:utf-8>, <NUM_LIT>.
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_EMPTY_LITERALS = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}


def fill_literals(code: str) -> str:
    """Code with Py150's placeholders replaced by the literals that they stand for, as its evaluators do first."""
    for placeholder, literal in _EMPTY_LITERALS.items():
        code = code.replace(placeholder, literal)
    return _LITERAL.sub(r"\1", code)


def common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence of two texts.

    Bit-parallel (Hyyro 2004): a row of the dynamic-programming table is one integer whose zero bits mark the columns
    where the length grows, so a row costs a few operations on |a| bits. Lines of code take microseconds; torchmetrics'
    ``edit_distance`` fills the same table cell by cell.
    """
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for letter in b:
        matches = row & places.get(letter, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def edit_similarity(prediction: str, reference: str) -> float:
    """Edit similarity in 0..1, placeholders of literals filled in first; 1 for two empty texts."""
    ours, theirs = fill_literals(prediction), fill_literals(reference)
    total = len(ours) + len(theirs)
    return 2 * common_subsequence(ours, theirs) / total if total else 1.0
