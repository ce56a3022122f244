"""TRACE: eight continual-learning tasks as prompt/answer files (Wang et al., arXiv 2310.06762)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record, lookup, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split

Dataset = Literal[
    "C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one of the eight is scored: by metric of a generated answer, or among letters by likelihood."""

    metric: str
    max_new_tokens: int
    choices: tuple[str, ...] = ()


_KINDS: dict[str, _Kind] = {
    "C-STANCE": _Kind("accuracy", 4, ("A", "B", "C")),
    "FOMC": _Kind("accuracy", 4, ("A", "B", "C")),
    "MeetingBank": _Kind("rougeL", 256),
    "Py150": _Kind("edit_similarity", 64),
    "ScienceQA": _Kind("accuracy", 4),
    "NumGLUE-cm": _Kind("numeric", 16),
    "NumGLUE-ds": _Kind("numeric", 16),
    "20Minuten": _Kind("sari", 256),
}
_OPTION = re.compile(r"^([A-Z])\. ", re.MULTILINE)


class Trace(BenchmarkTask):
    """One of TRACE's eight datasets.

    Layout: ``<path>/<dataset>/train.json``, ``eval.json``, ``test.json`` (or ``path`` is the dataset's own folder),
    lists of ``prompt`` and ``answer``; the prompt is the benchmark's own.

    C-STANCE, FOMC and ScienceQA are answered by a letter and scored by its likelihood; ScienceQA's training answers
    go on with the reasons (``reasons``), which are not scored. MeetingBank: ROUGE-L. Py150: edit similarity of the
    next line. NumGLUE: the number (TRACE compares it as text). 20Minuten: SARI, with the prompt as its source.

    Args:
        path: TRACE's folder, or the dataset's.
        dataset: Which of the eight.
        name: Name of the task; the dataset's by default.
        reasons: Train on ScienceQA's reasons too, as TRACE does, not on the letter alone.
        template: The prompt.
        metric: Metric of generated answers; the dataset's by default.
        max_new_tokens: Longest generated answer, in tokens; the dataset's by default.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    def __init__(
        self,
        path: str,
        dataset: Dataset,
        name: str | None = None,
        reasons: bool = True,
        template: str = "{prompt}",
        metric: str | None = None,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        kind = _KINDS[dataset]
        super().__init__(
            path=path,
            name=name or dataset,
            metric=metric or kind.metric,
            template=template,
            max_new_tokens=max_new_tokens or kind.max_new_tokens,
            **kwargs,
        )
        self.subfolder = dataset
        self.choices = kind.choices
        self.reasons = reasons

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The benchmark's own prompt and answer."""
        prompt = self.template.render(record)
        answer = text_of(lookup(record, "answer"), "answer").strip()
        if self.subfolder != "ScienceQA":
            return Row(id, prompt, answer, self.choices)
        if self.reasons and split == "train":
            return Row(id, prompt, answer)
        return Row(id, prompt, answer.partition("\n")[0].strip(), option_letters(prompt))


def option_letters(prompt: str) -> tuple[str, ...]:
    """The letters of the options that a ScienceQA prompt lists after "Choices:"."""
    found: list[str] = []
    for letter in _OPTION.findall(prompt.rpartition("Choices:")[2]):
        if letter == chr(ord("A") + len(found)):  # an option may itself hold a line such as "C. elegans"
            found.append(letter)
    return tuple(found)
