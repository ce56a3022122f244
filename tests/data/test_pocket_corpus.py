"""The pretraining text: seeded, split by content, true, free of the probe's prompts and of German."""

import hashlib
import re
from itertools import islice

import pytest

from secura_lightning.data.pocket import corpus, german
from secura_lightning.data.pocket.facts import KINDS, TABLE_KINDS, facts, held_out
from secura_lightning.data.pocket.probe import probe_rows
from secura_lightning.data.tasks.pocket_corpus import PocketCorpus

WORD = re.compile(r"\w+")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return corpus.sample(50_000, seed=0)


def only(kind: str, count: int) -> list[str]:
    return corpus.sample(count, seed=3, exclude_kinds=set(corpus.MIXTURE) - {kind})


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    assert corpus.sample(200, seed=5) == corpus.sample(200, seed=5)
    assert corpus.sample(200, seed=5) != corpus.sample(200, seed=6)


def test_held_out_documents_are_never_trained_on(documents):
    held = corpus.heldout_text(400, seed=0)
    assert len(set(held)) == 400
    assert not set(held) & set(documents)
    assert all(corpus.is_held_out(text) for text in held)


def test_held_out_documents_follow_the_training_mixture():
    def shape(texts: list[str]) -> list[float]:
        marks = ("Question:", "Answer:", " + ", "capital", "Words:", '"')
        return [sum(mark in text for text in texts) / len(texts) for mark in marks]

    for trained, held in zip(shape(corpus.sample(2000, 1)), shape(corpus.heldout_text(500, 1)), strict=True):
        assert held == pytest.approx(trained, abs=0.06)


def test_no_probe_prompt_occurs_in_50_000_documents(documents):
    everything = "\n\n".join(documents)
    for row in probe_rows():
        question_or_statement = row.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert not re.search(re.escape(question_or_statement) + r"\s", everything)


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_fact_is_ever_told_or_asked_in_its_held_out_wording(kind):
    everything = "\n\n".join(only(kind, 3000))
    for fact in facts(kind):
        statement, question = held_out(fact)
        assert f"{statement} " not in everything
        assert question not in everything


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_every_fact_is_told_often_and_in_several_wordings(kind):
    texts = only(kind, 2000)
    for fact in facts(kind):
        subject, obj = (re.compile(rf"\b{re.escape(part)}\b", re.IGNORECASE) for part in (fact.subject, fact.object))
        lines = [
            line
            for text in texts
            if fact.subject in text or fact.subject.capitalize() in text
            for line in re.split(r"(?<=\.) |\n\n", text)
            if subject.search(line) and obj.search(line)
        ]
        assert len(lines) >= 8, fact
        assert len(set(lines)) >= 5, fact


def test_every_calculation_is_right(documents):
    seen = 0
    for text in documents[:10_000]:
        if "Is " in text or "Options:" in text:  # yes/no questions also claim wrong results
            continue
        for a, sign, b, result in re.findall(r"(?<![\d*+-] )\b(\d+) ([*+-]) (\d+) = (\d+)\b", text):
            seen += 1
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
    assert seen > 500


def test_excluded_kinds_leave_no_trace():
    texts = corpus.sample(3000, seed=0, exclude_kinds=("capital", "continent", "arithmetic", "symbol"))
    countries = {fact.subject for kind in ("capital", "continent") for fact in facts(kind)}
    everything = "\n".join(texts)
    assert not countries & set(WORD.findall(everything))
    assert "symbol" not in everything
    assert "plus" not in everything


def test_excluding_an_unknown_kind_or_all_kinds_is_an_error():
    with pytest.raises(ValueError, match="capitals"):
        next(corpus.documents(0, exclude_kinds=("capitals",)))
    with pytest.raises(ValueError, match="nothing is left"):
        next(corpus.documents(0, exclude_kinds=tuple(corpus.MIXTURE)))


def test_there_is_no_german_in_the_corpus(documents):
    shared = {"in", "hat", "will"} | {english for english, _ in german.TOWN_NAMES}  # English words as well
    nouns = [*german.ACTOR_NOUNS, *(noun for group in german.OBJECT_NOUNS.values() for noun in group)]
    shared |= {noun.german for noun in nouns if noun.german.lower() == noun.english}  # Park, Hotel, Bus
    lexicon = set(german.lexicon()) - shared
    words = {word for text in documents for word in WORD.findall(text)}
    everything = "\n".join(documents)
    assert not set("äöüßÄÖÜ") & set(everything)
    assert lexicon & words == set()


def test_no_document_has_the_form_of_a_pocket_task(documents):
    everything = "\n".join(documents)
    for mark in (
        "Problem:",
        "Solution:",
        "####",
        "Article:",
        "Highlight:",
        "English:",
        "German:",
        "Premises:",
        "Conclusion:",
    ):
        assert mark not in everything


def test_the_stream_is_the_one_that_the_shipped_weights_were_trained_on():
    digest = hashlib.sha256("\n\n".join(islice(corpus.documents(0), 5000)).encode()).hexdigest()
    assert digest == "1e3cd574c61ae951566ec57dcd3e87d18ccf3cd6b87554b4bf656c392caf8c0f", (
        "the corpus changed: pretrain again, and record tokenizer, weights and this digest"
    )


def test_the_corpus_task_has_disjoint_text_rows_without_prompts():
    task = PocketCorpus(n_documents=500, n_validation=50, n_test=60)
    rows = {split: task.rows(split) for split in ("train", "validation", "test")}
    assert [len(rows[split]) for split in rows] == [500, 50, 60]
    assert task.is_text
    assert all(row.prompt == "" and row.answer for split in rows for row in rows[split])
    texts = {split: {row.answer for row in rows[split]} for split in rows}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert len({row.id for split in rows for row in rows[split]}) == 610
