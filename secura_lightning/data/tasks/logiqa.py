"""LogiQA: logical reasoning with four options (Liu et al., arXiv 2007.08124)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from secura_lightning.data.benchmark import BenchmarkTask, lettered, letters, number
from secura_lightning.data.read import Record, lookup, read_text, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Hub, Records
from secura_lightning.data.task import Split
from secura_lightning.errors import SecuraError

_BLOCK = 8  # lines of one question in the original files
# The columns' names in the conversions of the benchmark; the first that a record has is taken.
_CONTEXT = ("context", "text", "passage")
_QUESTION = ("question", "query")
_OPTIONS = ("options", "choices")
_ANSWER = ("correct_option", "answer", "label")


class LogiQA(BenchmarkTask):
    """Passage, question and four options -> the right option, by likelihood.

    Layout: ``Train.txt``, ``Eval.txt``, ``Test.txt``, eight lines a question: an empty one, the answer's letter, the
    passage, the question, four options. Or jsonl and the like with ``context``, ``question`` (or ``query``),
    ``options`` and ``correct_option`` (or ``answer``: an index from 0, or a letter).

    Args:
        name: Name of the task: its column of the matrix.
        answers: What is trained and compared: the option's ``letter``, or its ``text``.
        template: The prompt; its fields are ``context``, ``question`` and ``options`` (one a line, lettered).
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    # The repository itself is a loading script, which datasets no longer runs: a commit of the hub's parquet copy.
    hub = Hub(
        "lucasmccabe/logiqa",
        None,
        "b5e76075f344f0e7b5ced46bfcd70659e6e5f03e",
        {"train": "train", "validation": "validation", "test": "test"},
    )
    fields = ("context", "question", "options")

    def __init__(
        self,
        name: str = "logiqa",
        answers: Literal["letter", "text"] = "letter",
        template: str = "Passage: {context}\nQuestion: {question}\n{options}\nAnswer:",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, metric="accuracy", template=template, **kwargs)
        self.answers = answers

    def read_file(self, path: Path) -> Records:
        """Records of the original text layout, or of any other file."""
        return read_blocks(path) if path.suffix.lower() == ".txt" else super().read_file(path)

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The question with its options as choices."""
        given = _first(record, _OPTIONS)
        if not isinstance(given, list) or len(given) < 2:
            raise SecuraError(f"the options must be a list of two or more, got {given!r}")
        options = [text_of(option, "options").strip() for option in given]
        names = letters(len(options))
        place = _place(_first(record, _ANSWER), names)
        values = {
            "context": _first(record, _CONTEXT),
            "question": _first(record, _QUESTION),
            "options": lettered(options),
        }
        choices = names if self.answers == "letter" else tuple(options)
        return Row(id, self.template.render(values), choices[place], choices)


def read_blocks(path: Path) -> list[dict[str, Any]]:
    """Records of an original LogiQA file.

    Raises:
        SecuraError: A block breaks the layout; the message names its line.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    records = []
    for start in range(0, len(lines), _BLOCK):
        blank, letter, context, question, *options = (lines[start : start + _BLOCK] + [""] * _BLOCK)[:_BLOCK]
        if blank or not re.fullmatch("[a-dA-D]", letter) or not question or not all(options):
            raise SecuraError(
                f"{path}, line {start + 1}: no LogiQA question starts here (an empty line, a letter a-d, passage, "
                "question, four options)"
            )
        bare = [re.sub(rf"^{name}\s*[.:)、]\s*", "", option) for name, option in zip("ABCD", options, strict=True)]
        records.append({"context": context, "question": question, "options": bare, "answer": letter})
    if not records:
        raise SecuraError(f"{path} holds no rows")
    return records


def _first(record: Record, names: tuple[str, ...]) -> Any:
    return lookup(record, next((name for name in names if name in record), names[0]))


def _place(answer: Any, names: tuple[str, ...]) -> int:
    """The index of the right option."""
    text = str(answer).strip().upper()
    place = names.index(text) if text in names else number(text)
    if not 0 <= place < len(names):
        raise SecuraError(f"the answer {answer!r} is not among the choices: a letter {names[0]}-{names[-1]}, or an "
                          f"index 0-{len(names) - 1}")  # fmt: skip
    return place
