"""Any table as a task: YAML alone says which columns make the prompt, the answer and the choices."""

from __future__ import annotations

from typing import Any, Literal

from secura_lightning.data.benchmark import BenchmarkTask, lettered, number
from secura_lightning.data.read import Record, lookup, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split
from secura_lightning.data.template import Template
from secura_lightning.errors import ConfigError, SecuraError


class TableTask(BenchmarkTask):
    """Rows of any file or hub dataset::

        class_path: TableTask
        init_args:
          name: boolq
          path: data/boolq                                  # train.jsonl and test.jsonl, or any file
          template: "{passage}\\nQuestion: {question}?\\nAnswer:"
          answer: answer                                    # a column, or a template with {columns}
          choices: ["no", "yes"]
          answer_is: index

    A column inside another is named with dots (``choices.text``, ``answers.0``).

    Args:
        name: Name of the task: its column of the matrix.
        template: The prompt, with columns in braces; ``{lettered_choices}`` lists the choices as ``A. ...``.
        answer: Column of the answer, or a template.
        choices: Labels (each may be a template), or the column that holds a list; null for generated answers.
        answer_is: What the answer column holds of the choices: their ``text``, an ``index`` (0 or false is the first),
            or a ``letter`` (A or 1 is the first).
        metric: Metric of the answer; ``accuracy`` where there are choices.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    def __init__(
        self,
        name: str,
        template: str,
        answer: str = "answer",
        choices: list[str | bool | int | float] | str | None = None,
        answer_is: Literal["text", "index", "letter"] = "text",
        metric: str | None = None,
        **kwargs: Any,
    ) -> None:
        if metric is None and choices is None:
            raise ConfigError(f"task '{name}': init_args.metric is missing; name one, or give init_args.choices")
        if choices is None and answer_is != "text":
            raise ConfigError(f"task '{name}': init_args.answer_is: {answer_is} needs init_args.choices")
        labels = _labels(choices, name)
        super().__init__(name=name, metric=metric or "accuracy", template=template, **kwargs)
        self.require_source()
        self.answer = answer
        self.answer_template = Template(answer, f"task '{name}': init_args.answer") if "{" in answer else None
        self.answer_is = answer_is
        self.choices_column = choices if isinstance(choices, str) else None
        self.choice_templates = [Template(label, f"task '{name}': init_args.choices") for label in labels]

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The row that the settings make of a record."""
        choices = self._choices(record)
        answer = self._answer(record)
        if choices and self.answer_is != "text":
            answer = choices[self._place(answer, len(choices))]
        columns = {**record, "lettered_choices": lettered(choices)} if choices else record
        return Row(id, self.template.render(columns), answer, choices)

    def _answer(self, record: Record) -> str:
        if self.answer_template is not None:
            return self.answer_template.render(record)
        return text_of(lookup(record, self.answer), self.answer).strip()

    def _choices(self, record: Record) -> tuple[str, ...]:
        if self.choices_column is None:
            return tuple(template.render(record) for template in self.choice_templates)
        listed = lookup(record, self.choices_column)
        if not isinstance(listed, list):
            raise SecuraError(f"column '{self.choices_column}' must hold a list of choices, got {listed!r}")
        return tuple(text_of(choice, self.choices_column).strip() for choice in listed)

    def _place(self, answer: str, n: int) -> int:
        """Which of ``n`` choices the answer column names."""
        if self.answer_is == "index":
            place = {"false": 0, "true": 1}.get(answer.lower(), number(answer))
        elif len(answer) == 1 and answer.isalpha():
            place = ord(answer.upper()[0]) - ord("A")
        else:
            place = number(answer) - 1
        if not 0 <= place < n:
            raise SecuraError(f"the answer {answer!r} is no {self.answer_is} of one of {n} choices")
        return place


def _labels(choices: list[str | bool | int | float] | str | None, task: str) -> list[str]:
    """The labels that are listed; what YAML took for something else than text is refused, not guessed back."""
    listed = choices if isinstance(choices, list) else []
    labels = [label for label in listed if isinstance(label, str)]
    if len(labels) < len(listed):
        other = next(label for label in listed if not isinstance(label, str))
        kind = "truth value" if isinstance(other, bool) else "number"
        raise ConfigError(f"task '{task}': init_args.choices: YAML reads a label as the {kind} {other}; quote them all")
    return labels
