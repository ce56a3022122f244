"""The four pocket tasks: seeded, disjoint by content, and right, by solvers that know nothing of the generators."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import secura_lightning.data.pocket as pocket
from secura_lightning.data.pocket import arithmetic, german
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Task
from secura_lightning.data.tasks.pocket_arithmetic import PocketArithmetic
from secura_lightning.data.tasks.pocket_digest import PocketDigest
from secura_lightning.data.tasks.pocket_german import PocketGerman
from secura_lightning.data.tasks.pocket_logic import PocketLogic
from secura_lightning.errors import SecuraError

TASKS = [PocketArithmetic, PocketDigest, PocketGerman, PocketLogic]
SPLITS = ("train", "validation", "test")
each_task = pytest.mark.parametrize("task_class", TASKS)


@pytest.fixture(scope="module")
def rows() -> dict[type[Task], list[Row]]:
    return {task: [row for split in SPLITS for row in task().rows(split)] for task in TASKS}


@each_task
def test_rows_are_seeded_and_complete(task_class):
    task = task_class(n_train=300, n_validation=20, n_test=30)
    assert [len(task.rows(split)) for split in SPLITS] == [300, 20, 30]
    assert task.rows("train") == task_class(n_train=300).rows("train")
    assert task.rows("train") != task_class(n_train=300, seed=1).rows("train")
    assert task.rows("train") == task_class(n_train=300, name="other").rows("train")
    for split in SPLITS:
        for row in task.rows(split):
            assert row.prompt == row.prompt.strip()
            assert row.answer == row.answer.strip() != ""


@each_task
def test_splits_share_no_prompt_whatever_the_seed(task_class):
    prompts = {
        split: {row.prompt for seed in (0, 1) for row in task_class(1000, 200, 200, seed=seed).rows(split)}
        for split in SPLITS
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


@each_task
def test_ids_and_prompts_are_unique_and_rows_are_short(rows, task_class):
    tokenizer = AutoTokenizer.from_pretrained(Path(pocket.__file__).parent / "model")
    mine = rows[task_class]
    assert len(mine) == 2200 == len({row.id for row in mine}) == len({row.prompt for row in mine})
    lengths = sorted(len(tokenizer(f"{row.prompt} {row.answer}")["input_ids"]) + 2 for row in mine[::10])
    assert lengths[len(lengths) // 2] <= (110 if task_class is PocketDigest else 70)
    answers = [len(tokenizer(f" {row.answer}")["input_ids"]) for row in mine]
    assert max(answers) < task_class().max_new_tokens


@each_task
def test_asking_for_more_rows_than_the_world_holds_names_the_key(task_class, monkeypatch):
    monkeypatch.setattr("secura_lightning.data.pocket.worlds.PATIENCE", 0)
    with pytest.raises(SecuraError, match="n_test=100000"):
        task_class(n_test=100_000).rows("test")


def test_calculations_of_test_never_occur_in_training_about_the_same_thing():
    def sums(split: str) -> set[tuple[str, str]]:
        rows = PocketArithmetic().rows(split)
        things = {row.id: next(item for item in arithmetic.ITEMS if f" {item}" in row.prompt) for row in rows}
        return {(row.answer, things[row.id]) for row in rows}

    assert not sums("train") & sums("test")
    assert not sums("train") & sums("validation")


def test_who_does_what_to_which_thing_in_test_never_occurs_in_training():
    def news(split: str) -> set[str]:
        return {row.answer.rsplit(" in ", 1)[0] for row in PocketDigest().rows(split)}

    assert not news("train") & news("test")
    german_train, german_test = ({row.answer for row in PocketGerman().rows(split)} for split in ("train", "test"))
    assert not german_train & german_test


def test_the_working_of_every_word_problem_is_right_and_uses_its_numbers(rows):
    calculate = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for row in rows[PocketArithmetic]:
        *lines, last = row.answer.split("\n")
        carried: int | None = None
        used = []
        for line in lines:
            a, sign, b, result = re.fullmatch(r"(\d+) ([*+-]) (\d+) = (\d+)", line).groups()
            assert calculate[sign](int(a), int(b)) == int(result) > 0
            assert carried is None or carried == int(a)
            used += [b] if carried is not None else [a, b]
            carried = int(result)
        assert last == f"The answer is {carried}"
        assert sorted(used) == sorted(re.findall(r"\d+", row.prompt))


@pytest.mark.parametrize(
    ("problem", "signs"),
    [
        (r"buys|finds|gets|wins", "+"),
        (r"loses|sells|drops|takes|How many more", "-"),
        (r"each\.|a day for", "*"),
        (r"together", "+"),
    ],
)
def test_the_words_of_a_problem_decide_its_operators(rows, problem, signs):
    for row in rows[PocketArithmetic]:
        if re.search(problem, row.prompt) and not ("friends have" in row.prompt or "a day for" in row.prompt):
            assert signs in row.answer


def test_every_highlight_says_who_does_what_where(rows):
    for row in rows[PocketDigest]:
        article = row.prompt
        who, verb, thing, town = re.fullmatch(r"(\w+ \w+) (\w+(?: for)?) (\w+) in (\w+)", row.answer).groups()
        news = [s for s in re.split(r"(?<=\.) ", article) if who in s and thing in s and town in s]
        assert len(news) == 1, article
        assert verb.split()[0].endswith("s")
        assert row.answer not in article
        assert 3 <= len(re.findall(r"[.]", article)) <= 6


GOLDEN = [  # written by hand
    ("On Monday, the minister opened the bridge.", "Am Montag eröffnete der Minister die Brücke."),
    (
        "On Monday, the minister opened the old airport in Rome.",
        "Am Montag eröffnete der Minister in Rom den alten Flughafen.",
    ),
    ("The woman has bought the expensive car.", "Die Frau hat das teure Auto gekauft."),
    ("The child wants to read the big report in Vienna.", "Das Kind will in Wien den großen Bericht lesen."),
    ("The old train was repaired in Cologne last week.", "Der alte Zug wurde letzte Woche in Köln repariert."),
    ("Yesterday, the government closed the small church.", "Gestern schloss die Regierung die kleine Kirche."),
    ("The law was signed in May.", "Das Gesetz wurde im Mai unterschrieben."),
    ("The court has paid for the castle in Munich.", "Das Gericht hat in München das Schloss bezahlt."),
]


def test_german_is_what_a_german_would_write():
    actors = {noun.english: noun for noun in german.ACTOR_NOUNS}
    objects = {noun.english: noun for group in german.OBJECT_NOUNS.values() for noun in group}
    verbs = {form: verb for verb in german.VERB_LIST for form in verb.english}
    for text, expected in GOLDEN:
        scene = _parse(text, actors, objects, verbs)
        assert german.english(scene) == text
        assert german.german(scene) == expected


def _parse(text: str, actors: dict, objects: dict, verbs: dict) -> german.Sentence:
    """Read an English sentence of the world back into its content."""
    body = text.rstrip(".")
    for time in german.TIME_PHRASES:
        head = time[0][0].upper() + time[0][1:]
        if body.startswith(f"{head}, "):
            body, form = body[len(head) + 2 :], "past"
            break
        if body.endswith(f" {time[0]}"):
            body, form = body[: -len(time[0]) - 1], "passive"
            break
    else:
        time, form = german.TIME_PHRASES[0], "wants" if "wants to" in body else "perfect"
    town = next((t for t in german.TOWN_NAMES if body.endswith(f" in {t[0]}")), None)
    tokens = body.removesuffix(f" in {town[0]}" if town else "").lower().split()
    adjective = next((a for a in german.ADJECTIVE_WORDS if a[0] in tokens), None)
    actor = next((actors[word] for word in tokens if word in actors), german.ACTOR_NOUNS[0])
    thing = next(objects[word] for word in tokens if word in objects)
    phrases = [*tokens, *(f"{a} {b}" for a, b in pairwise(tokens))]
    verb = next(verbs[phrase] for phrase in phrases if phrase in verbs)
    return german.Sentence(form, actor, verb, thing, time, town, adjective)


def test_german_rows_have_the_verb_in_its_place_and_the_article_in_its_case(rows):
    gender = {noun.german: noun.gender for noun in german.ACTOR_NOUNS}
    gender |= {noun.german: noun.gender for group in german.OBJECT_NOUNS.values() for noun in group}
    participles = {verb.german[1] for verb in german.VERB_LIST}
    infinitives = {verb.german[2] for verb in german.VERB_LIST}
    pasts = {verb.german[0] for verb in german.VERB_LIST}
    for row in rows[PocketGerman]:
        words = row.answer.rstrip(".").split()
        assert row.answer[0].isupper()
        articles = {word: article.lower() for article, word in _noun_phrases(words, gender)}
        for noun, article in articles.items():
            assert article in {"m": ("der", "den"), "f": ("die",), "n": ("das",)}[gender[noun]]
        if "hat" in words or "wurde" in words:
            assert words[-1] in participles
        elif "will" in words:
            assert words[-1] in infinitives
        else:
            time = next(phrase for _, phrase in german.TIME_PHRASES if row.answer.lower().startswith(phrase.lower()))
            assert words[len(time.split())] in pasts  # the verb is the second part of the sentence
        masculine = [article for noun, article in articles.items() if gender[noun] == "m"]
        if len(articles) == 2 and len(masculine) == 2:
            assert masculine == ["der", "den"]


def _noun_phrases(words: list[str], gender: dict[str, str]) -> list[tuple[str, str]]:
    """(article, noun) of every noun, an adjective between them skipped."""
    found = []
    for i, word in enumerate(words):
        if word in gender:
            article = words[i - 1] if words[i - 1].lower() in ("der", "die", "das", "den") else words[i - 2]
            found.append((article, word))
    return found


def test_exactly_one_conclusion_follows_from_the_premises(rows):
    for row in rows[PocketLogic]:
        assert len(set(row.choices)) == 4
        assert [choice for choice in row.choices if follows(row.prompt, choice)] == [row.answer], row


def follows(prompt: str, conclusion: str) -> bool:
    """Decide by the rules of logic alone whether the conclusion follows from the premises."""
    premises = prompt.removeprefix("Premises: ").removesuffix("\nConclusion:")
    rules = re.findall(r"If (\w+ \w+), then (\w+ \w+)\.", premises)
    facts = set(re.findall(r"(?<=\. )(\w+ \w+)\.", premises))
    denied = {f"{who} {what}s" for who, what in re.findall(r"(\w+) does not (\w+)\.", premises)}
    if "One of" in premises:
        people = re.findall(r"\w+", re.search(r"One of (.*) has", premises).group(1).replace(" and ", " "))
        left = set(people) - set(re.findall(r"It is not (\w+)\.", premises))
        return len(left) == 1 and conclusion.split()[0] in left
    if "Every" in premises:
        states = dict(re.findall(r"Every (\w+) is (\w+)\.", premises))
        who, role = re.search(r"(\w+) is a (\w+)\.", premises).groups()
        return conclusion == f"{who} is {states[role]}."
    known = facts | {then for condition, then in rules if condition in facts}
    false = denied | {condition for condition, then in rules if then in denied}
    negated = re.fullmatch(r"(\w+) does not (\w+)\.", conclusion)
    return f"{negated[1]} {negated[2]}s" in false if negated else conclusion.rstrip(".") in known


def test_the_answer_of_a_logic_row_stands_at_every_position_equally_often(rows):
    positions = [row.choices.index(row.answer) for row in rows[PocketLogic]]
    for position in range(4):
        assert positions.count(position) / len(positions) == pytest.approx(0.25, abs=0.03)
