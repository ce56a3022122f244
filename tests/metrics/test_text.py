import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from secura_lightning.errors import ConfigError
from secura_lightning.metrics import text

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "and", "3.5", "dogs!", "ran", "über", "Äpfel"]


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """200 pairs, from empty and unrelated to equal."""
    draw = random.Random(3)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(200)]
    predictions = [
        " ".join(word if draw.random() < keep else draw.choice(WORDS) for word in reference.split())
        for reference, keep in zip(references, [0.0, 0.5, 0.9, 1.0] * 50, strict=True)
    ]
    predictions[7] = ""
    return predictions, references


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ("3 + 4 = 7, so the answer is 7.", "7"),
        ("so 48 + 24 = 72\n#### 72\nQ: 5", "72"),
        ("#### 1,234.50", "1234.5"),
        ("it costs $18", "18"),
        ("he owes -$18.", "-18"),
        ("5-3", "3"),
        ("it is -3", "-3"),
        ("1,2,3", "3"),
        ("about .5", "0.5"),
        ("the last one 12 #### ?", "12"),
        ("none", None),
    ],
)
def test_extract_number(given: str, number: str | None) -> None:
    found = text.extract_number(given)
    assert (found is None) if number is None else found == text.Decimal(number)


def test_numeric_compares_values_not_digits() -> None:
    assert text.numeric("the total is $1,018.00", "steps\n#### 1018") == 1
    assert text.numeric("1019", "#### 1018") == 0
    assert text.numeric("no idea", "#### 1018") == 0
    assert text.numeric("entailment.", "Entailment") == 1  # no number to look for


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        (" Paris.", "paris", 1),
        ('"Paris"', "Paris", 1),
        ("new\n york", "New York", 1),
        ("Straße", "STRASSE", 1),
        ("-5", "5", 0),
        ("Paris, France", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_exact_is_lenient_about_form_only(prediction: str, reference: str, equal: int) -> None:
    assert text.exact(prediction, reference) == equal


def test_accuracy_is_strict() -> None:
    assert text.accuracy("B ", "B") == 1
    assert text.accuracy("b", "B") == 0


@pytest.mark.parametrize(("metric", "key"), [("rouge1", "rouge1"), ("rougeL", "rougeL")])
def test_rouge_equals_rouge_score(metric: str, key: str, pairs: tuple[list[str], list[str]]) -> None:
    predictions, references = pairs
    scorer = RougeScorer([key], use_stemmer=False)
    wanted = [scorer.score(r, p)[key].fmeasure for p, r in zip(predictions, references, strict=True)]
    value, rows = text.score(metric, predictions, references)
    np.testing.assert_allclose(rows, wanted, atol=1e-6)
    assert value == pytest.approx(np.mean(wanted), abs=1e-6)


def test_chrf_equals_sacrebleu(pairs: tuple[list[str], list[str]]) -> None:
    predictions, references = pairs
    value, rows = text.score("chrf", predictions, references)
    wanted = [CHRF().sentence_score(p, [r]).score / 100 for p, r in zip(predictions, references, strict=True)]
    np.testing.assert_allclose(rows, wanted, atol=1e-12)
    assert value == pytest.approx(CHRF().corpus_score(predictions, [references]).score / 100, abs=1e-12)
    assert value != pytest.approx(np.mean(rows), abs=1e-3)  # corpus-level is something else than the mean


@given(st.text(max_size=20), st.text(max_size=20))
def test_chrf_equals_sacrebleu_on_any_text(prediction: str, reference: str) -> None:
    wanted = CHRF().sentence_score(prediction, [reference]).score / 100
    assert text.chrf(prediction, reference) == pytest.approx(wanted, abs=1e-12)


def test_bleu_equals_sacrebleu(pairs: tuple[list[str], list[str]]) -> None:
    predictions, references = pairs
    value, rows = text.score("bleu", predictions, references)
    reference_bleu = BLEU(effective_order=True)
    wanted = [reference_bleu.sentence_score(p, [r]).score / 100 for p, r in zip(predictions, references, strict=True)]
    np.testing.assert_allclose(rows, wanted, atol=1e-12)
    assert value == pytest.approx(BLEU().corpus_score(predictions, [references]).score / 100, abs=1e-12)


@pytest.mark.parametrize("metric", list(text.METRICS))
def test_every_metric_gives_one_to_the_reference_and_zero_to_nothing(metric: str) -> None:
    references = ["The answer is 12.", "Ja", "42"]
    assert text.score(metric, references, references) == (pytest.approx(1.0), pytest.approx([1.0, 1.0, 1.0]))
    assert text.score(metric, ["", "", ""], references)[0] == 0


def test_unknown_metric_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="metric: 'rouge7' is unknown; choose one of numeric, exact"):
        text.score("rouge7", ["a"], ["a"])
    with pytest.raises(ValueError, match="shorter"):
        text.score("exact", ["a", "b"], ["a"])


def test_no_rows_give_no_value() -> None:
    value, rows = text.score("chrf", [], [])
    assert np.isnan(value)
    assert rows == []
    assert all(np.isnan(text.bootstrap("chrf", [], [], [])))


def test_bootstrap_of_a_mean_matches_the_binomial() -> None:
    rows = [1.0] * 60 + [0.0] * 40
    low, high = text.bootstrap("exact", [""] * 100, [""] * 100, rows, resamples=4000)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert low == pytest.approx(0.6 - half, abs=0.02)
    assert high == pytest.approx(0.6 + half, abs=0.02)


def test_bootstrap_of_a_corpus_metric_resamples_rows(pairs: tuple[list[str], list[str]]) -> None:
    predictions, references = pairs[0][:30], pairs[1][:30]
    value, rows = text.score("bleu", predictions, references)
    low, high = text.bootstrap("bleu", predictions, references, rows, resamples=40, seed=5)
    values = []
    for weights in np.random.default_rng(5).multinomial(30, [1 / 30] * 30, size=40):
        drawn = np.repeat(np.arange(30), weights)  # the same rows, really repeated
        found = BLEU().corpus_score([predictions[i] for i in drawn], [[references[i] for i in drawn]])
        values.append(found.score / 100)
    assert low < value < high
    np.testing.assert_allclose([low, high], np.quantile(values, [0.025, 0.975]), atol=1e-12)


def test_bootstrap_is_repeatable_and_leaves_global_random_state_alone() -> None:
    rows = [0.0, 1.0, 1.0, 0.5]
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = text.bootstrap("exact", [""] * 4, [""] * 4, rows)
    np.random.seed(2)
    assert text.bootstrap("exact", [""] * 4, [""] * 4, rows) == first
    np.random.seed(1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
