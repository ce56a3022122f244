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
    sources = ["12 is the long answer.", "Jawohl", "About 42"]
    found = text.score(metric, references, references, sources)
    assert found == (pytest.approx(1.0), pytest.approx([1.0, 1.0, 1.0]))
    if metric != "sari":  # deleting everything deletes what had to go, too
        assert text.score(metric, ["", "", ""], references)[0] == 0


@pytest.mark.parametrize("metric", [name for name in text.METRICS if name != "sari"])
def test_the_best_of_several_right_answers_counts(metric: str) -> None:
    answers = [["one two three four", "12 13 14 15 16"], ["Ja mein Herr gut", "Yes my good lord"]]
    value, rows = text.score(metric, ["12 13 14 15 16", "Yes my good lord"], answers)
    assert rows == pytest.approx([1.0, 1.0])
    assert value == pytest.approx(1.0)
    assert text.bootstrap(metric, ["12 13 14 15 16", "Yes my good lord"], answers, rows)[1] == pytest.approx(1.0)


def test_squad_exact_match_equals_torchmetrics() -> None:
    from torchmetrics.functional.text import squad

    draw = random.Random(1)
    words = ["The", "a", "an", "Theatre", "U.S.", "1,000", "co-op", "\u00c4pfel", "(x)", "anger", ""]
    equal = 0
    for _ in range(300):
        answers = [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(3)]
        guess = draw.choice([answers[0].upper(), answers[1].replace(".", ""), " ".join(draw.choices(words, k=2))])
        target = [{"id": "0", "answers": {"text": answers, "answer_start": [0] * 3}}]
        wanted = squad([{"id": "0", "prediction_text": guess}], target)["exact_match"]
        assert text.row_score("squad_exact", guess, answers) == float(wanted) / 100
        equal += int(wanted > 0)
    assert 30 < equal < 270


def test_macro_f1_equals_scikit_learn_and_torchmetrics() -> None:
    import torch
    from sklearn.metrics import f1_score
    from torchmetrics.functional.classification import multiclass_f1_score

    draw = random.Random(4)
    labels = ["dovish", "hawkish", "neutral", "rare"]
    references = draw.choices(labels, [5, 3, 2, 0], k=120)
    predictions = [label if draw.random() < 0.6 else draw.choice([*labels[:3], "rare", "junk"]) for label in references]
    value, rows = text.score("macro_f1", predictions, references)
    assert value == pytest.approx(f1_score(references, predictions, labels=sorted(set(references)), average="macro"))
    assert rows == [float(ours == wanted) for ours, wanted in zip(predictions, references, strict=True)]
    known = [guess if guess in labels[:3] else labels[0] for guess in predictions]
    ours, theirs = (torch.tensor([labels.index(label) for label in side]) for side in (known, references))
    assert text.score("macro_f1", known, references)[0] == pytest.approx(
        float(multiclass_f1_score(ours, theirs, num_classes=3, average="macro"))
    )


def test_bootstrap_of_macro_f1_resamples_rows() -> None:
    references = ["a", "a", "a", "b", "b", "c"] * 5
    predictions = ["a", "b", "a", "b", "a", "c"] * 5
    value, rows = text.score("macro_f1", predictions, references)
    low, high = text.bootstrap("macro_f1", predictions, references, rows, resamples=50, seed=2)
    values = []
    for weights in np.random.default_rng(2).multinomial(30, [1 / 30] * 30, size=50):
        drawn = np.repeat(np.arange(30), weights)
        values.append(text.score("macro_f1", [predictions[i] for i in drawn], [references[i] for i in drawn])[0])
    assert low < value < high
    np.testing.assert_allclose([low, high], np.quantile(values, [0.025, 0.975]), atol=1e-12)


def test_bootstrap_over_groups_weighs_kinds_not_rows() -> None:
    many, few = [1.0] * 400, [0.0, 1.0, 0.0, 0.0]
    low, high = text.bootstrap_mean([many, few])
    assert low == pytest.approx(0.5)
    assert 0.75 <= high <= 1.0
    assert np.isnan(text.bootstrap_mean([])[0])
    assert np.isnan(text.bootstrap_mean([[1.0], []])[0])


def test_sari_without_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="pass sources"):
        text.score("sari", ["a"], ["a"])


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
