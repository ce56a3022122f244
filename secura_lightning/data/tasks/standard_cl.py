"""The standard continual benchmark in O-LoRA's layout: text classification (Wang et al., arXiv 2310.14152)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record, lookup, parse_json, read_text, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Records, Source
from secura_lightning.data.task import Split
from secura_lightning.errors import SecuraError

# What is asked about each of the 15 datasets, and the folder that holds it in the benchmark's own layout.
_QUESTIONS = {
    "TC": "What is the topic of this text?",
    "SC": "What is the sentiment of this text?",
    "NLI": "What is the logical relationship between both sentences?",
    "QQP": "Do both sentences have the same meaning?",
    "BoolQA": "Is the answer to the question true or false, by the passage?",
    "MultiRC": "Is the candidate answer true or false, by the passage?",
    "WiC": "Is the word used in the same sense in both sentences?",
    "COPA": "Which option is right?",
}
_FAMILIES = {
    **dict.fromkeys(("agnews", "dbpedia", "yahoo"), "TC"),
    **dict.fromkeys(("amazon", "yelp", "imdb", "sst-2"), "SC"),
    **dict.fromkeys(("mnli", "cb", "rte"), "NLI"),
    **{name.lower(): name for name in ("QQP", "BoolQA", "MultiRC", "WiC", "COPA")},
}


class StandardCL(BenchmarkTask):
    """Text -> one of the dataset's labels, by likelihood.

    Layout: ``<path>/TC/agnews/train.json``, ``test.json`` (``dev.json`` where there is one) and ``labels.json``, as in
    O-LoRA's repository, or without the family's folder; or ``path`` is the dataset's own folder. The files are lists of
    ``sentence`` and ``label``, the labels a list of all.

    The 15 datasets: agnews, amazon, dbpedia, yahoo, yelp (the first four make orders 1 to 3), MNLI, CB, RTE, QQP,
    BoolQA, MultiRC, WiC, COPA, IMDB and SST-2; any other folder of that layout works too.

    The text stands before the question and the labels, so that truncation, which takes from the left, spares these.

    Args:
        path: The benchmark's folder, or the dataset's.
        dataset: The dataset's folder name.
        name: Name of the task; the dataset's by default.
        question: What is asked about the text; by default what suits the dataset.
        template: The prompt; its fields are ``sentence``, ``question`` and ``labels``.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    fields = ("sentence", "question", "labels")

    def __init__(
        self,
        path: str,
        dataset: str,
        name: str | None = None,
        question: str | None = None,
        template: str = "{sentence}\n{question} Options: {labels}\nAnswer:",
        **kwargs: Any,
    ) -> None:
        super().__init__(path=path, name=name or dataset, metric="accuracy", template=template, **kwargs)
        self.subfolder = dataset
        self.family = _FAMILIES.get(dataset.lower())
        self.question = question or (_QUESTIONS[self.family] if self.family else "Which label fits this text?")
        self.labels: tuple[str, ...] = ()

    @cached_property
    def source(self) -> Source:
        """The dataset's folder, with or without its family's above it."""
        assert self.path is not None
        if self.family and (Path(self.path).expanduser() / self.family / str(self.subfolder)).is_dir():
            self.subfolder = f"{self.family}/{self.subfolder}"
        return super().source

    def read_file(self, path: Path) -> Records:
        """The rows of one file, after the labels beside it."""
        self.labels = read_labels(path.with_name("labels.json"))
        return super().read_file(path)

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The text with the labels as choices."""
        values = {
            "sentence": lookup(record, "sentence"),
            "question": self.question,
            "labels": ", ".join(self.labels),
        }
        label = text_of(lookup(record, "label"), "label").strip()
        return Row(id, self.template.render(values), label, self.labels)


def read_labels(path: Path) -> tuple[str, ...]:
    """All labels of a dataset.

    Raises:
        SecuraError: The file is missing, broken, or no list of texts.
    """
    labels = parse_json(read_text(path), str(path))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise SecuraError(f"{path}: must hold a list of labels")
    return tuple(label.strip() for label in labels)
