"""Public benchmarks in one table: hub dataset, original files, and how a record becomes prompt, answer and choices.

A benchmark here is an entry of :data:`BENCHMARKS`; :class:`~secura_lightning.data.tasks.benchmark.Benchmark` turns it
into a task. Readers take the records of the original files and of the hub's copies alike.

Revisions are commit hashes of the hub's datasets, as other projects pin them too. Sentiment140 has none: its hub
repository is a loading script, which datasets no longer runs, and what is left is the hub's own conversion under the
moving name ``refs/convert/parquet``; give ``path`` where a run must be repeatable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secura_lightning.data.benchmark import number
from secura_lightning.data.read import Record, lookup, text_of
from secura_lightning.data.source import Hub
from secura_lightning.data.task import Split
from secura_lightning.errors import SecuraError

Patterns = Mapping[Split, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a reader finds in a record.

    Attributes:
        values: Values of the template's fields.
        answer: The right answer.
        choices: Candidate answers; none for free answers.
        aliases: Other right answers.
    """

    values: Mapping[str, str]
    answer: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spec:
    """One benchmark.

    Attributes:
        hub: Its dataset on the hub. Where the test labels are hidden, the validation split serves for testing.
        files: Patterns of its original files in a folder; the first that matches is read (all matches, by name).
        fields: Fields of the template.
        template: The prompt.
        read: From a record to its parts; None leaves the record out.
        unfit: Why records are left out.
        columns: Columns of its csv files, which have no header line.
        suffix: How its files are read, where their name says something else.
        encoding: Encoding of its original files.
        max_new_tokens: Longest generated answer.
    """

    hub: Hub
    files: Patterns
    fields: tuple[str, ...]
    template: str
    read: Callable[[Record], Parts | None]
    unfit: str = ""
    columns: tuple[str, ...] | None = None
    suffix: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    max_new_tokens: int = 16


# ------------------------------------------------------------------------------------------------- classification


def _labelled(texts: Mapping[str, Sequence[str]], label: Sequence[str], names: Mapping[str, str]) -> Callable[..., Any]:
    """A reader of texts with a label.

    Args:
        texts: Columns that may hold each field, the first that a record has.
        label: Columns that may hold the label.
        names: The label's name by its value in the data.
    """

    def read(record: Record) -> Parts:
        values = {name: _text(record, columns) for name, columns in texts.items()}
        value = _text(record, label)
        if value not in names:
            raise SecuraError(f"the answer {value!r} is not among the choices {list(names)}")
        return Parts(values, names[value], tuple(dict.fromkeys(names.values())))

    return read


def _tweet(record: Record) -> Parts | None:
    value = _text(record, ("polarity", "sentiment"))
    if value == "2":  # neutral: in the test file only
        return None
    labelled = _labelled({"text": ("text",)}, ("polarity", "sentiment"), {"0": "negative", "4": "positive"})
    return labelled(record)


# ------------------------------------------------------------------------------------------------ multiple choice


def _mmlu(record: Record) -> Parts:
    options = lookup(record, "choices") if "choices" in record else [lookup(record, letter) for letter in "ABCD"]
    texts = _texts(options, "choices")
    letters = "ABCDEFGHIJ"[: len(texts)]
    value = _text(record, ("answer",))
    place = letters.find(value) if len(value) == 1 and value.isalpha() else number(value)
    if len(texts) > len(letters):
        raise SecuraError(f"{len(texts)} choices; MMLU's questions have four")
    if not 0 <= place < len(texts):
        raise SecuraError(f"the answer {value!r} is not among the choices {', '.join(letters)}")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    subject = _text(record, ("subject",)).replace("_", " ") or "general knowledge"
    values = {"question": _text(record, ("question",)), "options": listed, "subject": subject}
    return Parts(values, letters[place], tuple(letters))


def _arc(record: Record) -> Parts | None:
    question = lookup(record, "question")
    if isinstance(question, Mapping):  # the original files
        listed = [_object(option, "question.choices") for option in _list(lookup(question, "choices"), "choices")]
        labels = [lookup(option, "label") for option in listed]
        texts = [lookup(option, "text") for option in listed]
        question = lookup(question, "stem")
    else:
        labels = _list(lookup(record, "choices.label"), "choices.label")
        texts = _list(lookup(record, "choices.text"), "choices.text")
    if len(labels) != len(texts):
        raise SecuraError(f"choices: {len(labels)} labels for {len(texts)} texts")
    named = dict(zip(_texts(labels, "choices.label"), _texts(texts, "choices.text"), strict=True))
    key = _text(record, ("answerKey",))
    if key not in named:
        raise SecuraError(f"the answer {key!r} is not among the choices {', '.join(named)}")
    return _distinct({"question": text_of(question, "question").strip()}, named[key], list(named.values()))


def _hellaswag(record: Record) -> Parts | None:
    """Contexts and endings without WikiHow's bracketed marks, as evaluation harnesses clean them."""
    endings = [_plain(text) for text in _texts(lookup(record, "endings"), "endings")]
    label = _text(record, ("label",))
    if not 0 <= number(label) < len(endings):
        raise SecuraError(f"the answer {label!r} is not among the choices 0-{len(endings) - 1}")
    begun = _text(record, ("ctx_b",))
    context = f"{_text(record, ('ctx_a',))} {begun[:1].upper()}{begun[1:]}"
    values = {"context": _plain(f"{_text(record, ('activity_label',))}: {context}")}
    return _distinct(values, endings[number(label)], endings)


def _plain(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return " ".join(text.split())


def _distinct(values: Mapping[str, str], answer: str, choices: Sequence[str]) -> Parts | None:
    return Parts(values, answer, tuple(choices)) if len(set(choices)) == len(choices) else None


# ------------------------------------------------------------------------------------------------- open questions


def _trivia(record: Record) -> Parts:
    answer = _object(lookup(record, "answer" if "answer" in record else "Answer"), "answer")
    value = text_of(lookup(answer, "value" if "value" in answer else "Value"), "answer.value")
    others = _texts(answer.get("aliases", answer.get("Aliases", [])), "answer.aliases")
    return _open(_text(record, ("question", "Question")), [value, *others])


def _nq(record: Record) -> Parts:
    return _open(_text(record, ("question",)), _texts(lookup(record, "answer"), "answer"))


_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()"]+))\)')


def _web(record: Record) -> Parts:
    if "targetValue" in record:  # the original files: (list (description "New York") (description Boston))
        found = _DESCRIPTION.findall(_text(record, ("targetValue",)))
        answers = [re.sub(r"\\(.)", r"\1", quoted) or bare for quoted, bare in found]
    else:
        answers = _texts(lookup(record, "answers"), "answers")
    return _open(_text(record, ("question", "utterance")), answers)


def _open(question: str, answers: Sequence[str]) -> Parts:
    """A question that any of ``answers`` answers; the first is trained on."""
    known = list(dict.fromkeys(text.strip() for text in answers if text.strip()))
    if not known:
        raise SecuraError("the answer is empty; fill it, or remove the row")
    return Parts({"question": question.strip().removesuffix("?")}, known[0], aliases=tuple(known[1:]))


def _text(record: Record, columns: Sequence[str]) -> str:
    """The first of these columns that the record has, as text without white space around it."""
    column = next((column for column in columns if column in record), columns[0])
    return text_of(lookup(record, column), column).strip()


def _texts(values: Any, column: str) -> list[str]:
    return [text_of(value, column).strip() for value in _list(values, column)]


def _list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise SecuraError(f"column '{column}' must hold a list, got {value!r}")
    return value


def _object(value: Any, column: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SecuraError(f"column '{column}' must hold an object with fields, got {value!r}")
    return value


# ------------------------------------------------------------------------------------------------------ the table


def _files(train: Sequence[str], test: Sequence[str], validation: Sequence[str] = ()) -> Patterns:
    return {"train": train, "validation": validation, "test": test}


_TRAIN = ("train.*", "train-*-of-*")
_DEV = ("dev.*", "validation.*", "val.*", "validation-*-of-*")
_TEST = ("test.*", "test-*-of-*")
_BY_VALIDATION: Mapping[Split, str] = {"train": "train", "test": "validation"}
_THREE: Mapping[Split, str] = {"train": "train", "validation": "validation", "test": "test"}
_GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
_ARC = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
_TWICE = "two of its options are the same text"
_QUESTION = "Question: {question}?\nAnswer:"


def _arc_spec(name: str) -> Spec:
    return Spec(
        hub=Hub(_ARC[0], name, _ARC[1], _THREE),
        files=_files((f"{name}-Train.*", *_TRAIN), (f"{name}-Test.*", *_TEST), (f"{name}-Dev.*", *_DEV)),
        fields=("question",),
        template="Question: {question}\nAnswer:",
        read=_arc,
        unfit=_TWICE,
    )


BENCHMARKS: dict[str, Spec] = {
    "mrpc": Spec(
        hub=Hub(_GLUE[0], "mrpc", _GLUE[1], _THREE),
        files=_files(("msr_paraphrase_train.txt", *_TRAIN), ("msr_paraphrase_test.txt", *_TEST), _DEV),
        fields=("sentence1", "sentence2"),
        template="{sentence1}\n{sentence2}\nDo both sentences mean the same? Options: no, yes\nAnswer:",
        read=_labelled(
            {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")},
            ("label", "Quality"),
            {"0": "no", "1": "yes"},
        ),
        suffix={".txt": ".tsv"},
    ),
    "sst2": Spec(
        hub=Hub(_GLUE[0], "sst2", _GLUE[1], _BY_VALIDATION),
        files=_files(_TRAIN, _DEV),
        fields=("sentence",),
        template="{sentence}\nIs the sentiment of this sentence negative or positive?\nAnswer:",
        read=_labelled({"sentence": ("sentence",)}, ("label",), {"0": "negative", "1": "positive"}),
    ),
    "sentiment140": Spec(
        hub=Hub("stanfordnlp/sentiment140", None, "refs/convert/parquet", {"train": "train", "test": "test"}),
        files=_files(("training.*.csv", *_TRAIN), ("testdata.*.csv", *_TEST), _DEV),
        fields=("text",),
        template="{text}\nIs the sentiment of this tweet negative or positive?\nAnswer:",
        read=_tweet,
        unfit="neutral tweets, which the training data lacks",
        columns=("polarity", "id", "date", "query", "user", "text"),
        encoding="latin-1",
    ),
    "mmlu": Spec(
        hub=Hub(
            "cais/mmlu",
            "all",
            "c30699e8356da336a370243923dbaf21066bb9fe",
            {"train": "auxiliary_train", "validation": "validation", "test": "test"},
        ),
        files=_files(("auxiliary_train/*.csv", *_TRAIN), ("test/*.csv", *_TEST), ("val/*.csv", *_DEV)),
        fields=("question", "options", "subject"),
        template="This is a question about {subject}.\n{question}\n{options}\nAnswer:",
        read=_mmlu,
        columns=("question", "A", "B", "C", "D", "answer"),
    ),
    "arc_easy": _arc_spec("ARC-Easy"),
    "arc_challenge": _arc_spec("ARC-Challenge"),
    "hellaswag": Spec(
        hub=Hub("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76", _BY_VALIDATION),
        files=_files(("hellaswag_train.*", *_TRAIN), ("hellaswag_val.*", *_DEV)),
        fields=("context",),
        template="{context}",
        read=_hellaswag,
        unfit=_TWICE,
    ),
    "boolq": Spec(
        hub=Hub("google/boolq", None, "35b264d03638db9f4ce671b711558bf7ff0f80d5", _BY_VALIDATION),
        files=_files(_TRAIN, _DEV),
        fields=("passage", "question"),
        template="{passage}\nQuestion: {question}?\nAnswer:",
        read=_labelled(
            {"passage": ("passage",), "question": ("question",)}, ("answer",), {"False": "no", "True": "yes"}
        ),
    ),
    "triviaqa": Spec(
        hub=Hub("mandarjoshi/trivia_qa", "rc.nocontext", "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f", _BY_VALIDATION),
        files=_files(
            ("unfiltered-web-train.json", "wikipedia-train.json", "web-train.json", *_TRAIN),
            ("unfiltered-web-dev.json", "wikipedia-dev.json", "web-dev.json", *_DEV),
        ),
        fields=("question",),
        template=_QUESTION,
        read=_trivia,
    ),
    "nq_open": Spec(
        hub=Hub(
            "google-research-datasets/nq_open", "nq_open", "5dd9790a83002ad084ddeb7c420dc716852c6f28", _BY_VALIDATION
        ),
        files=_files(("NQ-open.train.jsonl", *_TRAIN), ("NQ-open.dev.jsonl", *_DEV)),
        fields=("question",),
        template=_QUESTION,
        read=_nq,
    ),
    "web_questions": Spec(
        hub=Hub(
            "stanfordnlp/web_questions",
            None,
            "0e473cbe21d1e91ec18da343644498be6a3f5454",
            {"train": "train", "test": "test"},
        ),
        files=_files(("webquestions.examples.train.json", *_TRAIN), ("webquestions.examples.test.json", *_TEST)),
        fields=("question",),
        template=_QUESTION,
        read=_web,
    ),
}
"""Benchmarks by the name that :class:`Benchmark` takes as ``dataset``."""
