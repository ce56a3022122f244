"""The standard continual benchmark in O-LoRA's layout: text classification (Wang et al., arXiv 2310.14152)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record, lookup, parse_json, read_text, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Records
from secura_lightning.data.task import Split
from secura_lightning.errors import SecuraError

_SENTIMENT = "What is the sentiment of this text?"
_TOPIC = "What is the topic of this text?"
_QUESTIONS = {
    "agnews": _TOPIC,
    "amazon": _SENTIMENT,
    "dbpedia": _TOPIC,
    "yahoo": _TOPIC,
    "yelp": _SENTIMENT,
    "imdb": _SENTIMENT,
    "sst-2": _SENTIMENT,
}


class StandardCL(BenchmarkTask):
    """Text -> one of the dataset's labels, by likelihood.

    Layout: ``<path>/<dataset>/train.json``, ``test.json`` (``dev.json`` where there is one) and ``labels.json``; or
    ``path`` is the dataset's own folder. The files are lists of ``sentence`` and ``label``, the labels a list of all.

    The text stands before the question and the labels, so that truncation, which takes from the left, spares these.

    Args:
        path: The benchmark's folder, or the dataset's.
        dataset: The dataset's folder name: agnews, amazon, dbpedia, yahoo, yelp, ...
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
        self.question = question or _QUESTIONS.get(dataset.lower(), "Which label fits this text?")
        self.labels: tuple[str, ...] = ()

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
