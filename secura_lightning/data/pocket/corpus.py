"""The text that the pocket model is pretrained on: an endless, seeded stream of short documents.

:data:`MIXTURE` says how often each kind of document comes. Kinds of facts keep their held-out wordings to themselves
(see :mod:`.facts`), so that the probe's prompts never occur. Held-out documents are set apart by a hash of their own
text: one in :data:`HELD_OUT_EVERY` belongs to the held-out split and is never trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection, Iterator
from itertools import islice

from secura_lightning.data.pocket import skills, stories, tables
from secura_lightning.data.pocket.facts import KINDS, Fact, ask, distractors, facts, say, slots

# kind of document -> weight by count of documents; the names of KINDS teach facts, the others do not
MIXTURE: dict[str, float] = {
    "capital": 8.0,
    "continent": 7.0,
    "opposite": 9.0,
    "category": 8.0,
    "symbol": 3.5,
    "past": 5.5,
    "plural": 3.0,
    "arithmetic": 16.0,
    "sequence": 5.0,
    "story": 11.0,
    "skill": 28.0,
    "repetition": 14.0,
}
HELD_OUT_EVERY = 50


def documents(seed: int, split: str = "train", exclude_kinds: Collection[str] = ()) -> Iterator[str]:
    """An endless stream of documents.

    Args:
        seed: The same seed gives the same stream.
        split: ``"train"``, or any other name for the held-out documents, which training never yields.
        exclude_kinds: Keys of :data:`MIXTURE` to leave out entirely.

    Raises:
        ValueError: ``exclude_kinds`` names an unknown kind, or leaves nothing.
    """
    unknown = sorted(set(exclude_kinds) - set(MIXTURE))
    kinds = [kind for kind in MIXTURE if kind not in exclude_kinds]
    if unknown or not kinds:
        raise ValueError(f"exclude_kinds: {unknown or 'nothing is left'}; known kinds are {', '.join(MIXTURE)}")
    rng = random.Random(f"pocket corpus/{seed}/{split}")
    weights = [MIXTURE[kind] for kind in kinds]
    while True:
        text = document(rng, rng.choices(kinds, weights)[0])
        if is_held_out(text) == (split != "train"):
            yield text


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the held-out split: a property of its text alone."""
    return zlib.crc32(text.encode()) % HELD_OUT_EVERY == 0


def heldout_text(count: int = 100, seed: int = 0, exclude_kinds: Collection[str] = ()) -> list[str]:
    """``count`` different documents of the training distribution, none of which training can yield."""
    found: dict[str, None] = {}
    for text in documents(seed, "heldout", exclude_kinds):
        found.setdefault(text)
        if len(found) == count:
            break
    return list(found)


def sample(count: int, seed: int, split: str = "train", exclude_kinds: Collection[str] = ()) -> list[str]:
    """The first ``count`` documents of :func:`documents`."""
    return list(islice(documents(seed, split, exclude_kinds), count))


def document(rng: random.Random, kind: str) -> str:
    """One document of a kind of :data:`MIXTURE`."""
    if kind == "story":
        return stories.story(rng) if rng.random() < 0.7 else stories.sentence(rng)
    if kind == "skill":
        return "\n\n".join(_framed(*skills.exercise(rng)) for _ in range(_several(rng)))
    if kind == "repetition":
        return skills.repetition(rng)
    if kind == "sequence" and rng.random() < 0.25:
        return _recital(rng)
    return _fact_document(rng, kind)


def _fact_document(rng: random.Random, kind: str) -> str:
    """Facts of one kind, as statements, questions, options or yes/no questions."""
    draw = rng.random()
    if draw < 0.3:
        return "\n\n".join(_question(rng, _fact(rng, kind)) for _ in range(_several(rng)))
    if draw < 0.4:
        return _options(rng, _fact(rng, kind))
    if draw < 0.47 and KINDS[kind].check:
        return _check(rng, _fact(rng, kind))
    if draw < 0.55:
        return _dialogue(rng, _fact(rng, kind))
    glue = "\n" if rng.random() < 0.3 else " "
    return glue.join(say(rng, _fact(rng, kind)) for _ in range(rng.choice((1, 1, 2, 3, 4))))


def _fact(rng: random.Random, kind: str) -> Fact:
    """A fact of the kind; in arithmetic the small numbers and the products come more often."""
    pool = facts(kind)
    if kind == "sequence" and rng.random() < 0.4:  # days, months and letters: few entries among many numbers
        return pool[rng.randrange(_NAMED)]
    if kind == "arithmetic" and rng.random() < 0.3:
        sign = rng.choice("+-*")
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        return Fact(kind, f"{a} {sign} {b}", str(value))
    return rng.choice(pool)


def _several(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 2, 3))


def _framed(question: str, answer: str) -> str:
    return f"{question}\nAnswer: {answer}"


def _question(rng: random.Random, fact: Fact) -> str:
    return f"Question: {ask(rng, fact)}\nAnswer: {fact.object}"


def _dialogue(rng: random.Random, fact: Fact) -> str:
    asker, other = rng.sample(stories.NAMES, 2)
    verb = rng.choice(("asked", "wanted to know"))
    return f'{asker} {verb}: "{ask(rng, fact)}" {other} said: "{fact.object}."'


def _options(rng: random.Random, fact: Fact) -> str:
    """A question with its options in one line, answered by the option's text."""
    options = [fact.object, *distractors(rng, fact, rng.choice((1, 2, 3)))]
    rng.shuffle(options)
    return f"Question: {ask(rng, fact)}\nOptions: {', '.join(options)}\nAnswer: {fact.object}"


def _check(rng: random.Random, fact: Fact) -> str:
    """A yes/no question about a right or a wrong object."""
    right = rng.random() < 0.5
    claimed = fact.object if right else distractors(rng, fact, 1)[0]
    question = KINDS[fact.kind].check.format(**slots(fact, claimed))
    return _framed(f"Question: {question}", "yes" if right else "no")


def _recital(rng: random.Random) -> str:
    """A longer piece of counting, of the alphabet, of the days or of the months."""
    draw = rng.randrange(4)
    if draw == 0:
        return f"The days of the week are {', '.join(tables.DAYS)}."
    if draw == 1:
        start = rng.randrange(6)
        return f"The months are {', '.join(tables.MONTHS[start : start + rng.randint(4, 12)])}."
    if draw == 2:
        start = rng.randrange(20)
        return f"The letters are {' '.join(tables.LETTERS[start : start + rng.randint(5, 26)])}."
    start, step, length = rng.randrange(60), rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(5, 12)
    return f"Counting: {', '.join(str(start + step * i) for i in range(length))}"


_NAMED = sum(not fact.object.isdigit() for fact in facts("sequence"))
