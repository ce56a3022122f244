"""Short premises with one right conclusion among four, after LogiQA.

    ponens       If A sings, B reads. If C swims, D cooks. A sings.           -> B reads.    not: D cooks
    tollens      If A sings, B reads. If C swims, D cooks. B does not read.   -> A does not sing.
    elimination  One of A, B, C and D has the key. It is not A. It is not B. It is not D.       -> C has the key.
    rule         Every baker is tired. Every judge is proud. A is a judge.     -> A is proud.

The wrong conclusions are made of the same words, so that copying what the premises name most often does not help.
"""

from __future__ import annotations

import random

from secura_lightning.data.pocket import stories
from secura_lightning.data.pocket.tables import words
from secura_lightning.data.pocket.worlds import Sample

# form -> how often it comes
FORMS: dict[str, float] = {"ponens": 0.8, "tollens": 0.0, "elimination": 0.0, "rule": 0.2}
ACTIONS = words("sing read swim cook run sleep dance write laugh work play wait drive draw climb rest")
ROLES = words("baker judge doctor teacher farmer singer painter driver sailor soldier writer student")
STATES = words("tired proud happy sad hungry angry afraid cold thirsty lonely rich poor")


def draw(rng: random.Random) -> Sample:
    """One problem with four choices in random order; its key is what the right conclusion rests on."""
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    premises, conclusions, key = _MAKERS[form](rng)
    answer = conclusions[0]
    rng.shuffle(conclusions)
    prompt = f"Premises: {' '.join(premises)}\nConclusion:"
    return Sample(f"logic/{form}/{key}", prompt, answer, tuple(conclusions), form)


def does(action: str) -> str:
    """The third person: sings."""
    return f"{action}s"


def _two_rules(rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Four people, four actions and two rules, the first of which is the one that will apply."""
    a, b, c, d = people = rng.sample(stories.NAMES, 4)
    p, q, r, s = actions = rng.sample(ACTIONS, 4)
    rules = [f"If {a} {does(p)}, then {b} {does(q)}.", f"If {c} {does(r)}, then {d} {does(s)}."]
    rng.shuffle(rules)
    return people, actions, rules


def _ponens(rng: random.Random) -> tuple[list[str], list[str], str]:
    (a, b, _, d), (p, q, _, s), rules = _two_rules(rng)
    conclusions = [f"{who} {does(what)}." for who, what in ((b, q), (d, s), (b, s), (d, q))]
    return [*rules, f"{a} {does(p)}."], conclusions, f"{a} {p} {b} {q}"


def _tollens(rng: random.Random) -> tuple[list[str], list[str], str]:
    (a, b, c, _), (p, q, r, _), rules = _two_rules(rng)
    conclusions = [f"{who} does not {what}." for who, what in ((a, p), (c, r), (a, r), (c, p))]
    return [*rules, f"{b} does not {q}."], conclusions, f"{a} {p} {b} {q}"


def _elimination(rng: random.Random) -> tuple[list[str], list[str], str]:
    people = rng.sample(stories.NAMES, 4)
    thing = rng.choice(stories.THINGS)
    owner, *others = rng.sample(people, 4)
    opening = f"One of {', '.join(people[:3])} and {people[3]} has the {thing}."
    conclusions = [f"{who} has the {thing}." for who in (owner, *others)]
    return (
        [opening, *(f"It is not {who}." for who in others)],
        conclusions,
        f"{owner} {thing} {' '.join(sorted(others))}",
    )


def _rule(rng: random.Random) -> tuple[list[str], list[str], str]:
    roles, states = rng.sample(ROLES, 4), rng.sample(STATES, 4)
    who = rng.choice(stories.NAMES)
    rules = [f"Every {role} is {state}." for role, state in zip(roles, states, strict=True)]
    rng.shuffle(rules)
    conclusions = [f"{who} is {state}." for state in states]
    return [*rules, f"{who} is a {roles[0]}."], conclusions, f"{who} {roles[0]} {states[0]}"


_MAKERS = {"ponens": _ponens, "tollens": _tollens, "elimination": _elimination, "rule": _rule}
