"""Little news articles and their one-line highlight, after CNN/DailyMail: who does what, and where.

Article: It was raining. On Monday, mayor Helen Brown opened the new bridge in Rome. Many guests came from Paris.
Highlight: Helen Brown opens bridge in Rome
"""

from __future__ import annotations

import random

from secura_lightning.data.pocket import german, stories
from secura_lightning.data.pocket.tables import words
from secura_lightning.data.pocket.worlds import Sample

MIN_SIDE, MAX_SIDE = 2, 3  # sentences beside the news itself

SURNAMES = words(
    "Brown Green White Black Stone King Cook Baker Hill Wood Young Bell Fox Wolf Miller Cooper Carter Turner Fisher"
)
ROLES = words("mayor minister president engineer judge doctor teacher reporter farmer singer")
TOWNS = words(
    "Berlin Rome Paris London Vienna Munich Cologne Hamburg Madrid Oslo Athens Dublin Warsaw Lisbon Prague Boston"
)
NEWS = (
    "{Time}, {role} {name} {past} the {adj} {thing} in {town}.",
    "In {town}, {role} {name} {past} the {adj} {thing} {time}.",
    "{Role} {name} {past} the {adj} {thing} in {town} {time}.",
    "The {adj} {thing} in {town} was {participle} by {role} {name} {time}.",
)
BEFORE = (
    "{weather}.",
    "There was news {time}.",
    "People had waited for {number} years.",
    "It was a big day for the town.",
)
AFTER = (
    "Many guests came from {elsewhere}.",
    "{other} from {elsewhere} wrote about it.",
    "It had cost {number} million.",
    "The work took {number} years.",
    "About {number} people were there.",
    '"It was a good day," said {other}.',
    "{other} was {feeling}.",
    "The {job} did not want to talk about it.",
    "Next year there will be more of it in {elsewhere}.",
    "Nobody was hurt.",
)


def draw(rng: random.Random) -> Sample:
    """One article; its key is who does what to which thing."""
    scene = german.scene(rng)
    first, other = rng.sample(stories.NAMES, 2)
    name = f"{first} {rng.choice(SURNAMES)}"
    town, elsewhere = rng.sample(TOWNS, 2)
    past, participle, infinitive = scene.verb.english
    time, role = scene.time[0], rng.choice(ROLES)
    values = {
        "Time": time[0].upper() + time[1:],
        "time": time,
        "role": role,
        "Role": role.capitalize(),
        "name": name,
        "past": past,
        "participle": participle,
        "adj": rng.choice(("old", "new", "big", "small", "famous", "expensive")),
        "thing": scene.object.english,
        "town": town,
        "elsewhere": elsewhere,
        "other": f"{other} {rng.choice(SURNAMES)}",
        "weather": rng.choice(stories.WEATHER),
        "feeling": rng.choice(stories.FEELINGS),
        "job": rng.choice(stories.JOBS),
    }
    side = rng.randint(MIN_SIDE, MAX_SIDE)
    opening = rng.choice(BEFORE) if rng.random() < 0.4 else ""
    sentences = [opening, rng.choice(NEWS), *rng.sample(AFTER, side - bool(opening))]
    text = " ".join(s.format(**values, number=rng.randint(2, 90)) for s in sentences if s)
    answer = f"{name} {present(infinitive)} {scene.object.english} in {town}"
    return Sample(f"digest/{name}/{past}/{scene.object.english}", f"Article: {text}\nHighlight:", answer)


def present(infinitive: str) -> str:
    """The third person of a verb of the world: opens, pays for."""
    verb, *rest = infinitive.split()
    return " ".join([f"{verb}s", *rest])
