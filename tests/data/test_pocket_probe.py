"""The base-knowledge probe: right answers, fair choices, seeded, and cheap to evaluate."""

import re
from collections import Counter

import pytest

from secura_lightning.data.pocket import tables
from secura_lightning.data.pocket.facts import KINDS, TABLE_KINDS, facts
from secura_lightning.data.pocket.probe import probe_rows, probe_text

# looked up by hand, apart from the tables
KNOWN = {
    "capital": {
        "France": "Paris",
        "Kenya": "Nairobi",
        "Peru": "Lima",
        "Mongolia": "Ulaanbaatar",
        "Australia": "Canberra",
    },
    "continent": {
        "Japan": "Asia",
        "Chad": "Africa",
        "Chile": "South America",
        "Cuba": "North America",
        "Fiji": "Oceania",
    },
    "opposite": {"hot": "cold", "cold": "hot", "victory": "defeat", "wild": "tame"},
    "category": {"sparrow": "bird", "apple": "fruit", "oak": "tree", "shark": "fish", "elephant": "mammal"},
    "symbol": {"iron": "Fe", "gold": "Au", "sodium": "Na", "potassium": "K", "tungsten": "W"},
    "past": {"go": "went", "teach": "taught", "swim": "swam", "fall": "fell"},
    "plural": {"mouse": "mice", "ox": "oxen", "child": "children", "knife": "knives"},
    "sequence": {
        "Monday": "Tuesday",
        "2, 4, 6, 8": "10",
        "A, B, C": "D",
        "April, May, June": "July",
        "9, 8, 7, 6": "5",
    },
    "arithmetic": {"17 + 8": "25", "30 - 12": "18", "7 * 8": "56", "0 * 12": "0"},
}


@pytest.mark.parametrize("kind", list(KNOWN))
def test_the_tables_hold_what_is_known(kind):
    table = {fact.subject: fact.object for fact in facts(kind)}
    assert {subject: table[subject] for subject in KNOWN[kind]} == KNOWN[kind]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_subject_has_one_answer(kind):
    counts = Counter(fact.subject for fact in facts(kind))
    assert max(counts.values()) == 1


def test_there_are_several_hundred_real_world_facts_and_opposites_go_both_ways():
    assert sum(len(facts(kind)) for kind in TABLE_KINDS) >= 600
    table = {fact.subject: fact.object for fact in facts("opposite")}
    assert all(table[table[word]] == word for word in table)
    things = [thing for group in tables.CATEGORIES.values() for thing in group.split()]
    assert len(things) == len(set(things))


def test_calculations_are_right():
    for fact in facts("arithmetic"):
        a, sign, b = fact.subject.split()
        assert int(fact.object) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]


def test_the_probe_is_seeded_balanced_and_small():
    rows = probe_rows()
    assert rows == probe_rows(seed=0)
    assert rows != probe_rows(seed=1)
    assert Counter(row.kind for row in rows) == dict.fromkeys(KINDS, 32)
    styles = Counter(row.id.split("/")[1] for row in rows)
    assert styles == {"choice": 144, "exact": 144}
    assert len({row.id for row in rows}) == len({row.prompt for row in rows}) == len(rows)


def test_choices_are_the_answer_and_three_others_of_its_type_in_a_fair_order():
    positions: Counter[int] = Counter()
    for row in probe_rows(per_kind=39):
        if "/choice/" not in row.id:
            assert row.choices == ()
            continue
        assert len(set(row.choices)) == 4
        positions[row.choices.index(row.answer)] += 1
        objects = {fact.object for fact in facts(row.kind)}
        if row.kind not in ("arithmetic", "sequence"):
            assert set(row.choices) <= objects
        assert len({bool(re.fullmatch(r"\d+", choice)) for choice in row.choices}) == 1
    assert min(positions.values()) > 0.7 * sum(positions.values()) / 4


def test_no_fact_is_asked_twice_and_all_operators_and_series_are_asked():
    rows = probe_rows()
    assert len({(row.kind, row.prompt.split("\n")[0], row.answer) for row in rows}) == len(rows)
    arithmetic = " ".join(row.prompt for row in rows if row.kind == "arithmetic")
    assert all(re.search(sign, arithmetic) for sign in (r"\+|plus", r" - |minus", r"\*|times"))
    answers = [row.answer for row in rows if row.kind == "sequence"]
    assert sum(answer.isdigit() for answer in answers) == len(answers) // 2


@pytest.mark.parametrize("per_kind", [1, 40])
def test_a_number_of_rows_that_some_kind_cannot_give_is_an_error(per_kind):
    with pytest.raises(ValueError, match="per_kind"):
        probe_rows(per_kind=per_kind)


def test_the_probe_text_is_seeded_and_different_from_the_validation_text():
    from secura_lightning.data.tasks.pocket_corpus import PocketCorpus

    texts = probe_text()
    assert texts == probe_text()
    assert len(texts) == len(set(texts)) == 110
    validation = {row.answer for row in PocketCorpus(n_test=0).rows("validation")}
    assert len(validation & set(texts)) < 10  # only the shortest documents can coincide
