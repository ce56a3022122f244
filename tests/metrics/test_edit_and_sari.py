"""TRACE's two metrics that no library here computes, against published values, other libraries and counting by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import edit_distance

from secura_lightning.metrics.edit import common_subsequence, edit_similarity, fill_literals
from secura_lightning.metrics.simplification import sari

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def table_lcs(a: str, b: str) -> int:
    """The textbook's dynamic programme."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
    return row[-1]


@given(st.text("ab\u00e9c ", max_size=40), st.text("ab\u00e9c ", max_size=40))
def test_common_subsequence_equals_the_table(a: str, b: str) -> None:
    assert common_subsequence(a, b) == table_lcs(a, b)


def test_edit_similarity_equals_torchmetrics_with_substitution_as_two_edits() -> None:
    draw = random.Random(2)
    for _ in range(60):
        ours, theirs = ("".join(draw.choices("xyz_ (", k=draw.randint(1, 30))) for _ in range(2))
        edits = float(edit_distance([ours], [theirs], substitution_cost=2, reduction="sum"))
        assert edit_similarity(ours, theirs) == pytest.approx(1 - edits / (len(ours) + len(theirs)), abs=1e-6)


def test_edit_similarity_by_hand() -> None:
    assert edit_similarity("abcd", "bcde") == 2 * 3 / 8
    assert edit_similarity("", "x") == 0
    assert edit_similarity("", "") == 1
    assert edit_similarity("x = 1", "x = <NUM_LIT:1>") == 1  # Py150's placeholders


def test_placeholders_of_literals_are_filled_in() -> None:
    code = "open ( <STR_LIT:a b> , <NUM_LIT> , <STR_LIT> , <CHAR_LIT:c> , <NUM_LIT:1.5> )"
    assert fill_literals(code) == "open ( a b , 0 ,  , c , 1.5 )"


def test_sari_equals_the_published_example() -> None:
    # printed in the documentation of Hugging Face's evaluate, metric "sari"
    assert sari("About 95 you now get in .", REFERENCES, SOURCE) == pytest.approx(0.26953601953601954, abs=1e-15)


def test_sari_by_hand() -> None:
    # S = a b c, O = a d, R = a d e. Words: keep a: P 1/1, R 1/1 -> 1; delete b, c, both right -> 1; add d of {d, e}:
    # P 1, R 1/2 -> 2/3. Pairs: keep none of S & O, none of S & R: 0/0 = 1; delete ab, bc, both right -> 1; add "a d" of
    # {ad, de}: 2/3. Triples: keep 1; delete abc -> 1; add none, of {ade}: P 0/0 = 1, R 0 -> 0. Fours: all 0/0 -> 1.
    keep, delete, add = 1.0, 1.0, (2 / 3 + 2 / 3 + 0 + 1) / 4
    assert sari("a d", "a d e", "a b c") == pytest.approx((keep + delete + add) / 3)


def test_sari_rewards_the_reference_over_the_source() -> None:
    assert sari(REFERENCES[1], REFERENCES[1], SOURCE) == 1
    assert sari(SOURCE, REFERENCES[1], SOURCE) < 0.7
    assert sari("ABOUT 95 species are NOW accepted.", REFERENCES[1], SOURCE) == 1  # case and tokens are normalised


@given(st.text("ab .", max_size=20), st.text("ab .", max_size=20), st.text("ab .", max_size=20))
def test_sari_stays_between_zero_and_one(prediction: str, reference: str, source: str) -> None:
    assert 0 <= sari(prediction, reference, source) <= 1
