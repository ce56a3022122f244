"""What the pocket model knows: kinds of facts, and the wordings in which it reads them and is asked for them.

A fact is ``(kind, subject, object)``. Each kind has *statements*, which end in the object, and *questions*. Of both,
one wording per fact is held out, chosen by a hash of the subject:

    statements   "The capital of France is Paris."  "In France, the capital is Paris."     <- held out for France
    questions    "What is the capital of France?"   "Which city is France ruled from?"

The model meets every wording on other facts and every fact in other wordings, and the probe asks for the one
combination that no training document contains.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from secura_lightning.data.pocket import tables


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: ``object`` is the single right answer for ``subject`` in ``kind``."""

    kind: str
    subject: str
    object: str


@dataclass(frozen=True, slots=True)
class Kind:
    """The wordings of one kind of facts.

    Templates use the slots of :func:`slots`: ``{s}`` subject, ``{S}`` subject with a capital letter, ``{o}`` object,
    ``{x}`` any claimed object.

    Attributes:
        statements: Wordings that end right before the object; it follows after a space. One per fact is held out.
        questions: Questions answered by the object. One per fact is held out.
        extras: Whole sentences that say the fact in another order; never asked.
        check: A yes/no question about a claimed object, or empty.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    extras: tuple[str, ...] = ()
    check: str = ""


KINDS: dict[str, Kind] = {
    "capital": Kind(
        (
            "The capital of {s} is",
            "In {s}, the capital is",
            "{s} has the capital",
            "{s} is ruled from the city of",
            "The capital city of {s} is called",
        ),
        (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "What is the name of the capital of {s}?",
            "What is the capital city of {s}?",
            "{s} has which capital?",
        ),
        ("{o} is the capital of {s}.", "The city of {o} is the capital of {s}.", "{s}: capital {o}."),
        "Is {x} the capital of {s}?",
    ),
    "continent": Kind(
        (
            "{s} is a country in",
            "The country {s} lies in",
            "The continent of {s} is",
            "{s} is on the continent of",
            "You can find {s} in",
        ),
        (
            "Which continent is {s} in?",
            "On which continent is {s}?",
            "What is the continent of {s}?",
            "Where in the world is {s}?",
            "{s} lies on which continent?",
        ),
        ("{s}: continent {o}.", "In {o} there is a country called {s}."),
        "Is {s} in {x}?",
    ),
    "opposite": Kind(
        (
            "The opposite of {s} is",
            "The word {s} is the opposite of",
            "If it is not {s}, it is",
            "Not {s} but",
            "{S} and its opposite:",
        ),
        (
            "What is the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "What word means the opposite of {s}?",
            "What is the reverse of {s}?",
            "{S} has which opposite?",
        ),
        ("{S} is the opposite of {o}.", "{S} and {o} are opposites.", "{S}: opposite {o}."),
        "Is {s} the opposite of {x}?",
    ),
    "category": Kind(
        (
            "{A} is a kind of",
            "{A} is one kind of",
            "The word {s} names a kind of",
            "Everyone knows that {a} is a kind of",
            "We call {a} a kind of",
        ),
        (
            "What kind of thing is {a}?",
            "What is {a}?",
            "What do we call {a}?",
            "{A} is what kind of thing?",
            "Which group does {a} belong to?",
        ),
        ("{A} belongs to the group: {o}.", "{S}: group {o}."),
        "Is {a} a kind of {x}?",
    ),
    "symbol": Kind(
        (
            "The chemical symbol of {s} is",
            "The symbol for {s} is",
            "In chemistry, {s} is written as",
            "Chemists write {s} as",
            "The element {s} has the symbol",
        ),
        (
            "What is the chemical symbol of {s}?",
            "What is the symbol for {s}?",
            "Which symbol does {s} have?",
            "How do chemists write {s}?",
            "Which symbol stands for {s}?",
        ),
        ("{o} is the symbol of {s}.", "{o} stands for {s}.", "{S}: symbol {o}."),
    ),
    "past": Kind(
        (
            "The past of {s} is",
            "The past tense of {s} is",
            "Today I {s}, yesterday I",
            "Today we {s}, but last week we",
            "The verb {s} becomes in the past:",
        ),
        (
            "What is the past tense of {s}?",
            "What is the past of {s}?",
            "What is the past form of {s}?",
            "How do you say {s} in the past?",
            "Which form of {s} is used for yesterday?",
        ),
        ("{O} is the past tense of {s}.", "{S}: past {o}."),
    ),
    "plural": Kind(
        (
            "The plural of {s} is",
            "One {s}, two",
            "One {s}, many",
            "The plural form of {s} is",
            "For more than one {s} we say",
        ),
        (
            "What is the plural of {s}?",
            "What is the plural form of {s}?",
            "How do you say two of {s}?",
            "What do we call more than one {s}?",
            "What is the word for many of {s}?",
        ),
        ("{O} is the plural of {s}.", "{S}: plural {o}."),
    ),
    "arithmetic": Kind(
        (
            "The result of {s} is",
            "The answer to {s} is",
            "If you work out {s} you get",
            "We know that {w} is",
        ),
        (
            "What is {s}?",
            "How much is {s}?",
            "What is the result of {s}?",
            "What do you get for {s}?",
        ),
        ("{s} = {o}", "{w} is {o}.", "{s} = {o}.", "{w} makes {o}."),
        "Is {s} = {x}?",
    ),
    "sequence": Kind(
        (
            "The list {s} goes on with",
            "After {s} comes",
            "The sequence {s} continues with",
            "Next after {s} we write",
        ),
        (
            "What comes next: {s}?",
            "What comes after {s}?",
            "Which one is next: {s}?",
            "How does the list go on: {s}?",
        ),
        ("{s}, {o}", "{s}, {o}."),
    ),
}
TABLE_KINDS = ("capital", "continent", "opposite", "category", "symbol", "past", "plural")


@cache
def facts(kind: str) -> tuple[Fact, ...]:
    """All facts of a kind, in a fixed order.

    Raises:
        KeyError: No kind of that name.
    """
    return tuple(Fact(kind, subject, obj) for subject, obj in _SOURCES[kind]())


def slots(fact: Fact, claimed: str = "") -> dict[str, str]:
    """The values that the templates of :data:`KINDS` are filled with."""
    s, o = fact.subject, fact.object
    a = s
    if fact.kind == "category" and o not in tables.UNCOUNTED:
        a = ("an " if s[0] in "aeiou" else "a ") + s
    w = s.replace(" + ", " plus ").replace(" - ", " minus ").replace(" * ", " times ")
    return {"s": s, "S": _capital(s), "o": o, "O": _capital(o), "a": a, "A": _capital(a), "w": w, "x": claimed}


def held_out(fact: Fact) -> tuple[str, str]:
    """The statement (without its object) and the question that no training document holds for this fact."""
    spec, values = KINDS[fact.kind], slots(fact)
    code = zlib.crc32(f"{fact.kind}/{fact.subject}".encode())
    statement = spec.statements[code % len(spec.statements)]
    question = spec.questions[code // 64 % len(spec.questions)]
    return statement.format(**values), question.format(**values)


def say(rng: random.Random, fact: Fact) -> str:
    """A sentence that states the fact, never in its held-out wording."""
    spec, values = KINDS[fact.kind], slots(fact)
    if spec.extras and rng.random() < 0.35:
        return rng.choice(spec.extras).format(**values)
    banned = held_out(fact)[0]
    start = rng.choice([text for t in spec.statements if (text := t.format(**values)) != banned])
    return f"{start} {fact.object}."


def ask(rng: random.Random, fact: Fact) -> str:
    """A question for the fact's object, never the held-out one."""
    banned = held_out(fact)[1]
    values = slots(fact)
    return rng.choice([text for t in KINDS[fact.kind].questions if (text := t.format(**values)) != banned])


def distractors(rng: random.Random, fact: Fact, count: int) -> list[str]:
    """``count`` different wrong objects of the same type."""
    wrong: list[str] = []
    if fact.kind == "arithmetic" or (fact.kind == "sequence" and fact.object.isdigit()):
        right = int(fact.object)
        near = [str(right + step) for step in (-10, -3, -2, -1, 1, 2, 3, 10) if right + step >= 0]
        return rng.sample(near, count)
    if fact.kind == "sequence":
        names = next(names for names in (tables.DAYS, tables.MONTHS, tables.LETTERS) if fact.object in names)
        pool = [name for name in names if name != fact.object]
    else:
        pool = sorted({other.object for other in facts(fact.kind)} - {fact.object, fact.subject})
    while len(wrong) < count:
        candidate = rng.choice(pool)
        if candidate not in wrong:
            wrong.append(candidate)
    return wrong


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _opposites() -> list[tuple[str, str]]:
    couples = tables.pairs(tables.OPPOSITES)
    return couples + [(right, left) for left, right in couples]


def _arithmetic() -> list[tuple[str, str]]:
    sums = [(f"{a} + {b}", str(a + b)) for a in range(31) for b in range(31)]
    differences = [(f"{a} - {b}", str(a - b)) for a in range(41) for b in range(min(a, 30) + 1)]
    products = [(f"{a} * {b}", str(a * b)) for a in range(13) for b in range(13)]
    return sums + differences + products


def _sequences() -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for names in (tables.DAYS, tables.MONTHS, tuple(tables.LETTERS)):
        for length in (1, 3):
            for i in range(len(names) - length):
                found[", ".join(names[i : i + length])] = names[i + length]
    for step in (1, 2, 3, 5, 10, -1, -2):
        for start in range(31):
            run = [start + step * k for k in range(5)]
            if min(run) >= 0:
                found[", ".join(map(str, run[:4]))] = str(run[4])
    return list(found.items())


_SOURCES: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "capital": lambda: [(country, city) for country, city, _ in tables.countries() if city != "-"],
    "continent": lambda: [(country, continent) for country, _, continent in tables.countries() if continent != "-"],
    "opposite": _opposites,
    "category": lambda: [(thing, group) for group, things in tables.CATEGORIES.items() for thing in things.split()],
    "symbol": lambda: tables.pairs(tables.SYMBOLS),
    "past": lambda: tables.pairs(tables.PASTS),
    "plural": lambda: tables.pairs(tables.PLURALS),
    "arithmetic": _arithmetic,
    "sequence": _sequences,
}
