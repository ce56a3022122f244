"""English news sentences and their German: a small world with genders, cases and the position of the verb.

past       On Monday, the minister opened the bridge.    Am Montag eröffnete der Minister die Brücke.
perfect    The minister has opened the old bridge.       Der Minister hat die alte Brücke eröffnet.
wants      The minister wants to open the bridge.        Der Minister will die Brücke eröffnen.
passive    The bridge was opened on Monday.              Die Brücke wurde am Montag eröffnet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from secura_lightning.data.pocket.tables import words
from secura_lightning.data.pocket.worlds import Sample

# What is drawn of the tables below: words spelled in tokens that pretraining text holds. The embeddings of tokens that
# it never holds (umlauts, for one) have drifted together, so that an adapter inside the network can hardly tell them
# apart. That leaves some 36 000 sentences.
ADJECTIVE_RATE = 0.0  # how often an object takes an adjective
PLACE_RATE = 0.5  # how often the sentence names a town
FORMS = ("past", "perfect")  # of past, perfect, wants, passive
DRAWN_VERBS = frozenset(("built", "saw", "visited", "found", "planned", "praised"))
DRAWN_TIMES = frozenset(("in May", "in July", "last week"))
LEFT_OUT_TOWNS = frozenset(("Munich", "Cologne"))
LEFT_OUT_NOUNS = frozenset(
    words(
        "mayor doctor king president judge army city school court bridge house road hospital castle library ship report"
    )
)

ACTORS = """
minister m Minister|mayor m Bürgermeister|teacher m Lehrer|doctor m Arzt|king m König|president m Präsident
engineer m Ingenieur|judge m Richter|club m Verein|man m Mann|army f Armee|government f Regierung|company f Firma
team f Mannschaft|bank f Bank|city f Stadt|family f Familie|school f Schule|party f Partei|woman f Frau
court n Gericht|parliament n Parlament|child n Kind
"""
OBJECTS = {
    "building": "bridge f Brücke|house n Haus|factory f Fabrik|airport m Flughafen|station m Bahnhof|road f Straße"
    "|park m Park|hospital n Krankenhaus|museum n Museum|market m Markt|church f Kirche|castle n Schloss|hotel n Hotel"
    "|tower m Turm|library f Bibliothek|garden m Garten",
    "machine": "train m Zug|car n Auto|ship n Schiff|boat n Boot|machine f Maschine|bus m Bus",
    "text": "law n Gesetz|plan m Plan|letter m Brief|book n Buch|newspaper f Zeitung|report m Bericht"
    "|contract m Vertrag",
}
# English past, participle and infinitive; German past, participle and infinitive; classes of objects
VERBS = """
opened opened open|eröffnete eröffnet eröffnen|building
built built build|baute gebaut bauen|building machine
bought bought buy|kaufte gekauft kaufen|building machine text
sold sold sell|verkaufte verkauft verkaufen|building machine text
showed shown show|zeigte gezeigt zeigen|building machine text
saw seen see|sah gesehen sehen|building machine text
visited visited visit|besuchte besucht besuchen|building
closed closed close|schloss geschlossen schließen|building
found found find|fand gefunden finden|building machine text
read read read|las gelesen lesen|text
wrote written write|schrieb geschrieben schreiben|text
planned planned plan|plante geplant planen|building
signed signed sign|unterschrieb unterschrieben unterschreiben|text
changed changed change|änderte geändert ändern|building machine text
paid~for paid~for pay~for|bezahlte bezahlt bezahlen|building machine
praised praised praise|lobte gelobt loben|building text
checked checked check|prüfte geprüft prüfen|building machine text
repaired repaired repair|reparierte repariert reparieren|building machine
saved saved save|rettete gerettet retten|building machine
destroyed destroyed destroy|zerstörte zerstört zerstören|building machine text
"""
TOWNS = "Berlin Berlin|Rome Rom|Paris Paris|London London|Vienna Wien|Munich München|Cologne Köln|Hamburg Hamburg"
TIMES = """
on Monday~am Montag|on Tuesday~am Dienstag|on Wednesday~am Mittwoch|on Thursday~am Donnerstag|on Friday~am Freitag
on Saturday~am Samstag|on Sunday~am Sonntag|in May~im Mai|in July~im Juli|yesterday~gestern|last week~letzte Woche
last year~letztes Jahr
"""
ADJECTIVES = "old alt|new neu|big groß|small klein|famous berühmt|expensive teuer"
NOMINATIVE = {"m": "der", "f": "die", "n": "das"}
ACCUSATIVE = {"m": "den", "f": "die", "n": "das"}


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun: English, gender (``m``, ``f``, ``n``) and German."""

    english: str
    gender: str
    german: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb in three forms (past, participle, infinitive) of both languages, and the objects it goes with."""

    english: tuple[str, ...]
    german: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence's content; ``town`` and ``adjective`` may be missing, ``time`` is used in the past tenses only."""

    form: str
    actor: Noun
    verb: Verb
    object: Noun
    time: tuple[str, str]
    town: tuple[str, str] | None = None
    adjective: tuple[str, str] | None = None


def _cells(table: str) -> list[str]:
    return [cell for line in table.strip().splitlines() for cell in line.split("|")]


def _nouns(table: str) -> tuple[Noun, ...]:
    return tuple(Noun(*cell.split()) for cell in _cells(table))


def _verb(line: str) -> Verb:
    english, german, classes = line.split("|")
    return Verb(tuple(e.replace("~", " ") for e in english.split()), tuple(german.split()), tuple(classes.split()))


def _couples(table: str, gap: str) -> tuple[tuple[str, str], ...]:
    return tuple((left, right) for left, right in (cell.split(gap) for cell in _cells(table)))


ACTOR_NOUNS = _nouns(ACTORS)
OBJECT_NOUNS = {name: _nouns(table) for name, table in OBJECTS.items()}
VERB_LIST = tuple(_verb(line) for line in VERBS.strip().splitlines())
TOWN_NAMES = _couples(TOWNS, " ")
TIME_PHRASES = _couples(TIMES, "~")
ADJECTIVE_WORDS = _couples(ADJECTIVES, " ")


def draw(rng: random.Random) -> Sample:
    """One translation; its key is who does what to which thing, as far as the sentence says it."""
    s = scene(rng)
    actor = "" if s.form == "passive" else s.actor.english
    return Sample(
        f"german/{actor}/{s.verb.english[0]}/{s.object.english}", f"English: {english(s)}\nGerman:", german(s)
    )


def scene(rng: random.Random) -> Sentence:
    """The content of one sentence."""
    verb = rng.choice([verb for verb in VERB_LIST if verb.english[0] in DRAWN_VERBS])
    return Sentence(
        rng.choice(FORMS),
        rng.choice([noun for noun in ACTOR_NOUNS if noun.english not in LEFT_OUT_NOUNS]),
        verb,
        rng.choice(
            [noun for name in verb.classes for noun in OBJECT_NOUNS[name] if noun.english not in LEFT_OUT_NOUNS]
        ),
        rng.choice([phrase for phrase in TIME_PHRASES if phrase[0] in DRAWN_TIMES]),
        rng.choice([town for town in TOWN_NAMES if town[0] not in LEFT_OUT_TOWNS])
        if rng.random() < PLACE_RATE
        else None,
        rng.choice(ADJECTIVE_WORDS) if rng.random() < ADJECTIVE_RATE else None,
    )


def english(s: Sentence) -> str:
    """The English sentence."""
    thing = f"the {s.adjective[0]} {s.object.english}" if s.adjective else f"the {s.object.english}"
    where = f" in {s.town[0]}" if s.town else ""
    actor = f"the {s.actor.english}"
    if s.form == "past":
        text = f"{s.time[0]}, {actor} {s.verb.english[0]} {thing}{where}."
    elif s.form == "perfect":
        text = f"{actor} has {s.verb.english[1]} {thing}{where}."
    elif s.form == "wants":
        text = f"{actor} wants to {s.verb.english[2]} {thing}{where}."
    else:
        text = f"{thing} was {s.verb.english[1]}{where} {s.time[0]}."
    return text[0].upper() + text[1:]


def german(s: Sentence) -> str:
    """The German sentence: verb in second place, participle and infinitive at the end, object in its case."""
    where = f" in {s.town[1]}" if s.town else ""
    actor = f"{NOMINATIVE[s.actor.gender]} {s.actor.german}"
    thing = _object(s, "nominative" if s.form == "passive" else "accusative")
    if s.form == "past":
        text = f"{s.time[1]} {s.verb.german[0]} {actor}{where} {thing}."
    elif s.form == "perfect":
        text = f"{actor} hat{where} {thing} {s.verb.german[1]}."
    elif s.form == "wants":
        text = f"{actor} will{where} {thing} {s.verb.german[2]}."
    else:
        text = f"{thing} wurde {s.time[1]}{where} {s.verb.german[1]}."
    return text[0].upper() + text[1:]


def _object(s: Sentence, case: str) -> str:
    """The object with article and adjective (weak inflection: -en in the masculine accusative, else -e)."""
    article = (NOMINATIVE if case == "nominative" else ACCUSATIVE)[s.object.gender]
    if s.adjective is None:
        return f"{article} {s.object.german}"
    stem = "teur" if s.adjective[1] == "teuer" else s.adjective[1]
    ending = "en" if case == "accusative" and s.object.gender == "m" else "e"
    return f"{article} {stem}{ending} {s.object.german}"


def lexicon() -> list[str]:
    """Every German word form of the world, for the tokenizer's coverage."""
    nouns = [noun.german for group in (ACTOR_NOUNS, *OBJECT_NOUNS.values()) for noun in group]
    verbs = [form for verb in VERB_LIST for form in verb.german]
    stems = ["teur" if adjective == "teuer" else adjective for _, adjective in ADJECTIVE_WORDS]
    others = [word for _, phrase in (*TOWN_NAMES, *TIME_PHRASES) for word in phrase.split()]
    adjectives = [stem + ending for stem in stems for ending in ("e", "en")]
    return [*nouns, *verbs, *adjectives, *others, "der", "die", "das", "den", "hat", "will", "wurde"]
