"""Word problems about small numbers, after GSM8K: the answer is the working, line by line, and then the result.

Problem: Tom has 5 apples. He buys 7 more. How many apples does Tom have now?
Solution: 5 + 7 = 12
The answer is 12

GSM8K's own marker ``####`` would not do: no pretraining text holds ``#``, so the tied output embedding of that token
has drifted to where frozen embeddings cannot be reached by adapters inside the network.
"""

from __future__ import annotations

import random

from secura_lightning.data.pocket import stories
from secura_lightning.data.pocket.tables import words
from secura_lightning.data.pocket.worlds import Sample

MAX_NUMBER = 10  # of sums and differences
MAX_FACTOR = 5  # of products
TWO_STEPS = 0.1  # how many problems take two steps

ITEMS = words("apples coins books pens cards stamps eggs cups balls keys letters cakes flowers stones hats boxes")
GAINS = words("buys finds gets wins")
LOSSES = words("loses sells drops")
# operators -> the wordings of problems that take them, in this order; {a}, {b}, {c} are the numbers
WORDINGS: dict[str, tuple[str, ...]] = {
    "+": (
        "{n} has {a} {t}. {P} {gain} {b} more. How many {t} does {n} have now?",
        "{n} has {a} {t}. {m} has {b} {t}. How many {t} do they have together?",
        "There are {a} {t} on the table. {n} brings {b} {t}. How many {t} are there now?",
    ),
    "-": (
        "{n} has {a} {t}. {P} {loss} {b} of them. How many {t} are left?",
        "There are {a} {t} in the bag. {n} takes {b}. How many {t} are left?",
        "{n} has {a} {t} and {m} has {b}. How many more {t} does {n} have?",
    ),
    "*": (
        "There are {a} bags with {b} {t} each. How many {t} are there?",
        "{n} buys {b} {t} a day for {a} days. How many {t} does {n} buy?",
        "{a} friends have {b} {t} each. How many {t} do they have together?",
    ),
    "+-": (
        "{n} has {a} {t}. {P} {gain} {b} more and then {loss} {c}. How many {t} are left?",
        "{n} has {a} {t}, and {m} gives {n} {b} more. Then {n} {loss} {c}. How many {t} are left?",
    ),
    "-+": ("{n} has {a} {t}. {P} {loss} {b} and then {gain} {c} more. How many {t} does {n} have now?",),
    "++": ("{n} has {a} {t}, {m} has {b} and {o} has {c}. How many {t} do they have together?",),
    "*-": ("There are {a} bags with {b} {t} each. {n} takes {c} {t}. How many {t} are left?",),
    "*+": ("{n} buys {a} bags with {b} {t} each and then {gain} {c} more {t}. How many {t} does {n} have?",),
}
ONE_STEP = [signs for signs in WORDINGS if len(signs) == 1]
TWO_STEP = [signs for signs in WORDINGS if len(signs) == 2]


def draw(rng: random.Random) -> Sample:
    """One problem; its key is the numbers, the operators and the thing that is counted."""
    signs = rng.choice(TWO_STEP if rng.random() < TWO_STEPS else ONE_STEP)
    first, numbers, lines = _working(rng, signs)
    name, pronoun = stories.person(rng)
    friend, other = rng.sample([who for who in stories.NAMES if who != name], 2)
    people = {"n": name, "P": pronoun.capitalize(), "m": friend, "o": other}
    loose = {"t": rng.choice(ITEMS), "gain": rng.choice(GAINS), "loss": rng.choice(LOSSES)}
    values = dict(zip("abc", map(str, (first, *numbers)), strict=False))
    problem = rng.choice(WORDINGS[signs]).format(**people, **loose, **values)
    result = lines[-1].rsplit(" ", 1)[1]
    answer = "\n".join([*lines, f"The answer is {result}"])
    sums = f"{first}" + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers, strict=True))
    key = f"{sums} {loose['t']}"
    return Sample(f"arithmetic/{key}", f"Problem: {problem}\nSolution:", answer)


def _working(rng: random.Random, signs: str) -> tuple[int, list[int], list[str]]:
    """The first number, the others, and one line ``a + b = c`` per step; no number leaves its limits."""
    value = first = rng.randint(2, MAX_FACTOR) if signs[0] == "*" else rng.randint(3, MAX_NUMBER)
    numbers: list[int] = []
    lines: list[str] = []
    for sign in signs:
        if sign == "*":
            number = rng.randint(2, MAX_FACTOR)
            result = value * number
        elif sign == "+":
            number = rng.randint(2, MAX_NUMBER // 2)
            result = value + number
        else:
            number = rng.randint(2, min(value - 1, MAX_NUMBER // 2))
            result = value - number
        lines.append(f"{value} {sign} {number} = {result}")
        numbers.append(number)
        value = result
    return first, numbers, lines
