"""Simple English from a small grammar: single sentences and stories of a few sentences with one hero."""

from __future__ import annotations

import random

from secura_lightning.data.pocket.tables import words

GIRLS = words("Ann Mia Lucy Emma Sara Kate Rose Lily Nora Jane Amy Ella Ruby Zoe Helen Mary Julia Clara Lena Eva")
BOYS = words("Tom Ben Max Leo Sam Jack Paul Noah Adam Luke Finn Eric Oscar Hugo Mark Peter David Simon Victor Bob")
NAMES = GIRLS + BOYS
PLACES = words(
    "park school garden market library kitchen river forest station beach shop farm house museum bridge lake "
    "hotel castle hospital theater harbor airport church tower village town square street cinema factory"
)
ANIMALS = words("dog cat bird horse rabbit mouse duck cow sheep fox frog bear goat pig hen pony")
THINGS = words(
    "ball book cup hat key box lamp coin letter map bag stone flower apple cake toy pen ring chair bottle basket "
    "drum kite shoe spoon clock picture ticket boat bread phone knife plate umbrella"
)
COLORS = words("red blue green yellow white black brown gray pink orange")
SIZES = words("big small old new long short heavy light round pretty broken clean")
FEELINGS = words("happy sad tired hungry angry proud afraid cold warm thirsty glad lonely")
FOODS = words("bread cheese soup rice fish meat cake milk water fruit honey salad eggs tea")
JOBS = words(
    "teacher doctor farmer baker driver painter singer pilot nurse cook writer sailor judge mayor minister police "
    "engineer student soldier reporter"
)
WEATHER = (
    "It was a sunny day",
    "It was raining",
    "The wind was strong",
    "Snow fell all day",
    "The sky was gray",
    "It was very hot",
    "The night was dark and quiet",
    "The sun was shining",
)
TIMES = (
    "One morning",
    "One day",
    "In the evening",
    "On Monday",
    "On Friday",
    "On Sunday afternoon",
    "Last week",
    "In the summer",
    "In winter",
    "After school",
    "Before lunch",
    "Yesterday",
    "On Tuesday morning",
)
ENDINGS = (
    "In the end, {n} was {f}.",
    "Then {p} went home.",
    "That night {n} slept well.",
    "Everyone was {f}.",
    '"Thank you," said {n}.',
    "It was a good day.",
    "{n} never forgot that day.",
    "So {n} and {m} became friends.",
)
EVENTS = (
    "{n} went to the {place}.",
    "{P} saw a {size} {animal}.",
    "The {animal} was {f}, so {p} gave it some {food}.",
    "{P} found a {color} {thing} near the {place}.",
    "{P} put the {thing} into a {color} bag.",
    "{n} met {m} at the {place}.",
    '"Where is my {thing}?" asked {m}.',
    '"Look at the {color} {thing}!" said {n}.',
    "{m} wanted to buy {num} new {thing}s, but they were too expensive.",
    "{P} was {f} because the {thing} was broken.",
    "They ate {food} and talked about the {job}.",
    "A {job} came and opened the door of the {place}.",
    "The {job} said that the {place} was closed.",
    "{P} looked for the {animal} everywhere, but could not find it.",
    "{n} helped the {job} to carry {num} boxes.",
    "{m} lost the {thing} and was {f}.",
    "The {size} {animal} ran away from the {place}.",
    "Then {m} gave {n} a {size} {thing}.",
    "{P} wanted to become a {job}.",
    "The {job} told {n} and {m} a story about a {animal}.",
    "{n} and {m} played with the {thing} until it was dark.",
    "Many people came to the {place} to see the {animal}.",
    "{P} read a {size} book about the {place}.",
    "{n} paid {num} coins for the {color} {thing}.",
)


def person(rng: random.Random) -> tuple[str, str]:
    """A name and the pronoun that stands for it."""
    name = rng.choice(NAMES)
    return name, "she" if name in GIRLS else "he"


def sentence(rng: random.Random) -> str:
    """One simple sentence."""
    return _fill(rng, rng.choice(EVENTS[1:]), _cast(rng))


def story(rng: random.Random) -> str:
    """A story of three to seven sentences about one hero and a friend."""
    cast = _cast(rng)
    opening = f"{rng.choice(WEATHER)}. " if rng.random() < 0.3 else ""
    start = rng.choice(EVENTS)
    first = _fill(rng, start, cast)
    if start.startswith(("{P}", "{p}")):
        first = cast["n"] + first[len(cast["P"]) :]
    when = rng.choice(TIMES)
    if first.startswith((cast["n"], cast["m"])):
        first = f"{when}, {first}"
    body = [_fill(rng, event, cast) for event in rng.sample([e for e in EVENTS if e != start], rng.randint(1, 4))]
    return opening + " ".join([first, *body, _fill(rng, rng.choice(ENDINGS), cast)])


def _cast(rng: random.Random) -> dict[str, str]:
    """What stays the same through one story: the people, and mostly the animal, the thing and the place."""
    name, pronoun = person(rng)
    friend = rng.choice([other for other in NAMES if other != name])
    fixed = {"animal": rng.choice(ANIMALS), "thing": rng.choice(THINGS), "place": rng.choice(PLACES)}
    return {"n": name, "m": friend, "p": pronoun, "P": pronoun.capitalize(), **fixed}


def _fill(rng: random.Random, template: str, cast: dict[str, str]) -> str:
    """A sentence of the template; what the cast does not fix is drawn anew."""
    loose = {
        "size": rng.choice(SIZES),
        "color": rng.choice(COLORS),
        "f": rng.choice(FEELINGS),
        "food": rng.choice(FOODS),
        "job": rng.choice(JOBS),
        "num": str(rng.randint(2, 30)),
    }
    text = template.format(**loose, **cast)
    return text.replace("a old", "an old").replace("a orange", "an orange").replace("a engineer", "an engineer")
