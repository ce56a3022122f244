"""Small exercises that teach a tiny model how to learn: copy, pick, look up, compare, and answer in few words.

Each function draws one exercise ``(context and question, answer)``. No exercise has the form of a pocket task.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from secura_lightning.data.pocket import stories, tables

ORDINALS = ("first", "second", "third", "fourth", "fifth")
COMPARED = (
    ("taller", "tallest", "shorter", "shortest"),
    ("older", "oldest", "younger", "youngest"),
    ("faster", "fastest", "slower", "slowest"),
    ("richer", "richest", "poorer", "poorest"),
)
NOUNS = stories.THINGS + stories.ANIMALS + stories.PLACES + stories.COLORS + stories.FOODS + stories.JOBS
# never invented: what looks like it but is German or English
REAL = frozenset(tables.words("das den der des du las sah so da zu gar man bin tun nun rot gut tor"))

Exercise = tuple[str, str]


def invented(rng: random.Random) -> str:
    """A word that does not exist, of one to three syllables."""
    while True:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
        made = "".join(syllables) + rng.choice(("", "", "n", "l", "r", "s", "k"))
        if made not in REAL:
            return made


def word(rng: random.Random) -> str:
    """A noun, a name, a number or an invented word."""
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(NOUNS)
    if draw < 0.7:
        return rng.choice(stories.NAMES)
    return invented(rng) if draw < 0.9 else str(rng.randint(0, 99))


def words(rng: random.Random, low: int, high: int) -> list[str]:
    """Between ``low`` and ``high`` different words."""
    count = rng.randint(low, high)
    found: list[str] = []
    while len(found) < count:
        candidate = word(rng)
        if candidate not in found:
            found.append(candidate)
    return found


def copy_phrase(rng: random.Random) -> Exercise:
    """Repeat a phrase."""
    text = " ".join(words(rng, 2, 8)) if rng.random() < 0.6 else stories.sentence(rng)
    return f"{rng.choice(('Repeat', 'Copy', 'Say again'))}: {text}", text


def repetition(rng: random.Random) -> str:
    """Unrelated words, then the same words again: the only way to predict the second time is to copy.

    Copying from the context is the skill that every task builds on, and a tiny model finds it late without this text.
    """
    text = " ".join(words(rng, 5, 14))
    return rng.choice(("\n", " ; ", " , ")).join([text] * rng.choice((2, 2, 3)))


def pick_word(rng: random.Random) -> Exercise:
    """The first, last or n-th word of a list."""
    items = words(rng, 3, 6)
    index = rng.randrange(min(len(items), 5))
    which = "last" if rng.random() < 0.25 else ORDINALS[index]
    answer = items[-1] if which == "last" else items[index]
    return f"Words: {' '.join(items)}\nQuestion: What is the {which} word?", answer


def next_word(rng: random.Random) -> Exercise:
    """The word after, or before, a given word of a list."""
    items = words(rng, 3, 7)
    index = rng.randrange(len(items) - 1)
    if rng.random() < 0.7:
        return f"Words: {' '.join(items)}\nQuestion: Which word comes after {items[index]}?", items[index + 1]
    return f"Words: {' '.join(items)}\nQuestion: Which word comes before {items[index + 1]}?", items[index]


def reverse_list(rng: random.Random) -> Exercise:
    """A short list backwards."""
    items = words(rng, 2, 4)
    return f"Say backwards: {' '.join(items)}", " ".join(reversed(items))


def count_words(rng: random.Random) -> Exercise:
    """How many words a list has."""
    items = words(rng, 1, 7)
    return f"Words: {' '.join(items)}\nQuestion: How many words are there?", str(len(items))


def compare_numbers(rng: random.Random) -> Exercise:
    """The larger or smaller of two or three numbers."""
    numbers = rng.sample(range(100), rng.choice((2, 2, 3)))
    larger = rng.random() < 0.5
    listed = ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
    question = f"Question: Which number is {'larger' if larger else 'smaller'}, {listed}?"
    return question, str(max(numbers) if larger else min(numbers))


def yes_or_no(rng: random.Random) -> Exercise:
    """A yes/no question about two numbers or about a word in a list."""
    if rng.random() < 0.5:
        a, b = rng.sample(range(60), 2)
        larger = rng.random() < 0.5
        right = (a > b) == larger
        return f"Question: Is {a} {'larger' if larger else 'smaller'} than {b}?", "yes" if right else "no"
    items = words(rng, 3, 6)
    inside = rng.random() < 0.5
    asked = rng.choice(items) if inside else word(rng)
    return f"Words: {' '.join(items)}\nQuestion: Is {asked} one of the words?", "yes" if asked in items else "no"


def holder(rng: random.Random) -> Exercise:
    """Who has a thing, or what somebody has."""
    count = rng.randint(2, 4)
    people, things = rng.sample(stories.NAMES, count), rng.sample(stories.THINGS, count)
    verb = rng.choice(("has", "found", "wants", "sold", "carries"))
    text = " ".join(f"{who} {verb} the {what}." for who, what in zip(people, things, strict=True))
    i = rng.randrange(count)
    if rng.random() < 0.5:
        return f"{text}\nQuestion: Who {verb} the {things[i]}?", people[i]
    return f"{text}\nQuestion: Which thing belongs with {people[i]}?", things[i]


def amounts(rng: random.Random) -> Exercise:
    """How many things somebody has, looked up and not computed."""
    count = rng.randint(2, 3)
    people, things = rng.sample(stories.NAMES, count), rng.sample(stories.THINGS, count)
    numbers = rng.sample(range(2, 40), count)
    text = " ".join(f"{who} has {n} {what}s." for who, n, what in zip(people, numbers, things, strict=True))
    i = rng.randrange(count)
    question, answer = rng.choice(
        (
            (f"How many {things[i]}s does {people[i]} have?", str(numbers[i])),
            (f"Who has {numbers[i]} {things[i]}s?", people[i]),
        )
    )
    return f"{text}\nQuestion: {question}", answer


def where_when(rng: random.Random) -> Exercise:
    """Where somebody went, when, and with whom, from one or two sentences."""
    asked, other = rng.sample(stories.NAMES, 2)
    friend = rng.choice([n for n in stories.NAMES if n not in (asked, other)])
    place, elsewhere = rng.sample(stories.PLACES, 2)
    day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    parts = [f"{asked} went to the {place} on {day} with {friend}.", f"{other} stayed at the {elsewhere}."]
    rng.shuffle(parts)
    question, answer = rng.choice(
        (
            (f"Where did {asked} go?", f"to the {place}"),
            (f"When did {asked} go to the {place}?", f"on {day}"),
            (f"Who went with {asked}?", friend),
            (f"Where did {other} stay?", f"at the {elsewhere}"),
        )
    )
    return f"{' '.join(parts)}\nQuestion: {question}", answer


def record(rng: random.Random) -> Exercise:
    """One field of a small record."""
    fields = {
        "Name": rng.choice(stories.NAMES),
        "Age": str(rng.randint(5, 80)),
        "Job": rng.choice(stories.JOBS),
        "Town": invented(rng).capitalize(),
        "Color": rng.choice(stories.COLORS),
        "Pet": rng.choice(stories.ANIMALS),
    }
    keys = rng.sample(list(fields), rng.randint(3, 5))
    asked = rng.choice(keys)
    return "\n".join(f"{key}: {fields[key]}" for key in keys) + f"\nQuestion: What is the {asked.lower()}?", fields[
        asked
    ]


def order(rng: random.Random) -> Exercise:
    """Who is at the end of an order that two sentences give."""
    a, b, c = rng.sample(stories.NAMES, 3)
    more, most, less, least = rng.choice(COMPARED)
    facts = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
    if rng.random() < 0.3:
        facts[1] = f"{c} is {less} than {b}."
    rng.shuffle(facts)
    top = rng.random() < 0.5
    return f"{' '.join(facts)}\nQuestion: Who is the {most if top else least}?", a if top else c


def mapping(rng: random.Random) -> Exercise:
    """Use a word list that stands in the text, for one word or for a phrase."""
    count = rng.randint(2, 5)
    known = rng.sample(NOUNS, count)
    made: list[str] = []
    while len(made) < count:
        candidate = invented(rng)
        if candidate not in made:
            made.append(candidate)
    text = "; ".join(f"{left} = {right}" for left, right in zip(known, made, strict=True))
    if rng.random() < 0.5:
        i = rng.randrange(count)
        return f"List: {text}\nQuestion: What is {known[i]}?", made[i]
    chosen = rng.sample(range(count), rng.randint(1, min(3, count)))
    return f"List: {text}\nWrite with the list: {' '.join(known[i] for i in chosen)}", " ".join(made[i] for i in chosen)


def steps(rng: random.Random) -> Exercise:
    """A number that changes once or twice, with the working."""
    value = rng.randint(1, 20)
    text, working = [f"Start with {value}."], []
    for _ in range(rng.randint(1, 2)):
        change = rng.randint(1, 12)
        if rng.random() < 0.5 and change <= value:
            text.append(f"Take away {change}.")
            working.append(f"{value} - {change} = {value - change}")
            value -= change
        else:
            text.append(f"Add {change}.")
            working.append(f"{value} + {change} = {value + change}")
            value += change
    return " ".join(text), f"{', then '.join(working)}. The result is {value}."


SKILLS: dict[Callable[[random.Random], Exercise], float] = {
    copy_phrase: 3.0,
    pick_word: 1.5,
    next_word: 1.5,
    reverse_list: 0.7,
    count_words: 0.5,
    compare_numbers: 1.0,
    yes_or_no: 1.0,
    holder: 2.0,
    amounts: 1.5,
    where_when: 2.0,
    record: 1.5,
    order: 1.0,
    mapping: 3.0,
    steps: 1.5,
}


def exercise(rng: random.Random) -> Exercise:
    """One exercise, drawn by the weights of :data:`SKILLS`."""
    return rng.choices(list(SKILLS), list(SKILLS.values()))[0](rng)
