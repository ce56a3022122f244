"""What the base model knows before any task: questions per kind of knowledge, and held-out text.

    PocketProbe   the embedded model's facts           TaskProbe    any tasks' test rows, a kind each (MMLU, ARC, ...)
    TextProbe     perplexity of a text file            WikiText2    perplexity of WikiText-2's test text

A probe is only ever evaluated on. Its rows serve neither for training nor for calibration.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

from secura_lightning.data.prompt import Chat, PromptFormat
from secura_lightning.data.read import documents, lookup, read_rows, read_text, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Hub, load_hub
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError, SecuraError

Part = Literal["whole", "watched", "held-out"]


class Probe(ABC):
    """Questions that measure how much of its base knowledge a model kept.

    Rows with choices are scored by answer likelihood, the others by exact match of the generated answer. Every row
    names its ``kind``; the probe's accuracy is the mean over kinds.

    Args:
        name: Short name, for reports.
        max_new_tokens: Longest answer that evaluation generates, in tokens.
        separator: Text between prompt and answer.

    Attributes:
        part: The ``whole`` of the probe, or what part of another it is: ``watched`` by a strategy, or ``held-out``.
        stop: Texts that end a generated answer.
        window: Tokens that the model reads at once for the perplexity of texts; None for its context, at most 1024.
        stride: Tokens by which those windows advance; None for the window less one.
        chat: Whether prompts go through the tokenizer's chat template; the sequence's ``data.chat``.
        system: The system message of that template; the sequence's ``data.system``.
    """

    part: Part = "whole"
    stop: tuple[str, ...] = ()
    chat: Chat = "auto"
    system: str | None = None
    window: int | None = None
    stride: int | None = None

    def __init__(self, name: str, max_new_tokens: int = 16, separator: str = " ") -> None:
        self.name = name
        self.max_new_tokens = max_new_tokens
        self.separator = separator

    @property
    def prompt_format(self) -> PromptFormat:
        """How its questions are rendered; its texts are read as they are."""
        return PromptFormat(self.separator, self.chat, self.system)

    def metric(self, row: Row) -> str:
        """The metric that scores a row: likelihood picks a choice as it stands, generated answers are compared
        leniently."""
        return "accuracy" if row.choices else "exact"

    @abstractmethod
    def rows(self) -> list[Row]:
        """The questions, each with a ``kind``, in a fixed order."""

    def texts(self) -> list[str]:
        """Held-out documents whose perplexity is reported; none by default."""
        return []


class PocketProbe(Probe):
    """Facts that the embedded model learned in pretraining, asked in wordings that its text never used."""

    def __init__(self, name: str = "pocket", max_new_tokens: int = 12, separator: str = " ") -> None:
        super().__init__(name, max_new_tokens, separator)

    def rows(self) -> list[Row]:
        """Questions on every kind of fact."""
        return self._rows

    def texts(self) -> list[str]:
        """Held-out documents of the pretraining mixture."""
        return self._texts

    @cached_property
    def _rows(self) -> list[Row]:
        from secura_lightning.data.pocket.probe import probe_rows

        return probe_rows()

    @cached_property
    def _texts(self) -> list[str]:
        from secura_lightning.data.pocket.probe import probe_text

        return probe_text()


class TaskProbe(Probe):
    """Base knowledge by public benchmarks: the test rows of tasks that are never trained on, each a kind of its own::

        probe:
          class_path: TaskProbe
          init_args:
            tasks:
              - {class_path: Benchmark, init_args: {dataset: mmlu, n_test: 500}}
              - {class_path: Benchmark, init_args: {dataset: triviaqa, n_test: 500}}
            text: WikiText2

    Args:
        tasks: The tasks; ``init_args.n_test`` keeps the evaluation after every task affordable.
        text: A probe of text, for its perplexity.
        name: Short name, for reports.
    """

    def __init__(self, tasks: list[Task], text: Probe | None = None, name: str = "benchmarks") -> None:
        if not tasks:
            raise ConfigError("data.probe.init_args.tasks is empty; list a task, or use a TextProbe")
        names = [task.name for task in tasks]
        for key, values in (
            ("name", {name: names.count(name) for name in names if names.count(name) > 1}),
            ("separator", {task.separator for task in tasks} if len({task.separator for task in tasks}) > 1 else ()),
            ("stop", {task.stop for task in tasks} if len({task.stop for task in tasks}) > 1 else ()),
        ):
            if values:
                rule = "must differ" if key == "name" else "must be the same"
                raise ConfigError(
                    f"data.probe: init_args.{key} of the tasks {rule}, got {', '.join(map(repr, values))}"
                )
        if any(task.metric in _CORPUS_ONLY or task.is_text for task in tasks):
            raise ConfigError("data.probe: a probe averages rows; choose tasks with metrics of single rows")
        super().__init__(name, max(task.max_new_tokens for task in tasks), tasks[0].separator)
        self.tasks = tasks
        self.text = text
        self.stop = tasks[0].stop
        self.window, self.stride = (text.window, text.stride) if text else (None, None)
        self._metrics = {task.name: task.metric for task in tasks}

    def metric(self, row: Row) -> str:
        """The metric of the row's task."""
        return self._metrics[row.kind]

    def rows(self) -> list[Row]:
        """The tasks' test rows, the task's name as their kind."""
        return self._rows

    def texts(self) -> list[str]:
        """The documents of ``text``."""
        return self.text.texts() if self.text else []

    @cached_property
    def _rows(self) -> list[Row]:
        return [
            replace(row, id=f"{task.name}/{row.id}", kind=task.name) for task in self.tasks for row in task.rows("test")
        ]


class DocumentsProbe(Probe):
    """Perplexity of documents, without questions: what probes of text share.

    Args:
        path: A file; None for what the class itself knows.
        documents: How the text is cut into documents.
        name: Short name, for reports.
        window: Tokens that the model reads at once; None for its context, at most 1024.
        stride: Tokens by which windows advance; None for the window less one token.
    """

    def __init__(self, path: str | None, documents: str, name: str, window: int | None, stride: int | None) -> None:
        super().__init__(name)
        self.path = path
        self.documents = documents
        self.window, self.stride = _windows(window, stride)

    @abstractmethod
    def read_documents(self) -> list[str]:
        """The documents; empty where the text is."""

    def rows(self) -> list[Row]:
        """No questions."""
        return []

    def texts(self) -> list[str]:
        """The documents.

        Raises:
            SecuraError: The text cannot be found or read, or is empty.
        """
        return self._texts

    @cached_property
    def _texts(self) -> list[str]:
        try:
            found = self.read_documents()
        except SecuraError as error:
            raise SecuraError(f"data.probe: {error}") from error
        if not found:
            raise SecuraError(f"data.probe: {self.path} holds no text")
        return found


class TextProbe(DocumentsProbe):
    """The perplexity of a text file: base knowledge of any model on its own kind of text, without questions.

    Args:
        path: A UTF-8 text file. ``<|endoftext|>`` always separates documents.
        documents: Without that marker, the ``file`` is one document (each token sees what precedes it, as perplexities
            of running text are reported), or blank lines separate ``blocks``.
        name: Short name, for reports.
        window: Tokens that the model reads at once; null for its context, at most 1024.
        stride: Tokens by which windows advance. Smaller strides give each token more context and cost more; null for
            the window less one token.
    """

    def __init__(
        self,
        path: str,
        documents: Literal["file", "blocks"] = "file",
        name: str = "text",
        window: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__(path, documents, name, window, stride)

    def read_documents(self) -> list[str]:
        """The documents of the file."""
        return documents(read_text(str(self.path)), blank_lines=self.documents == "blocks")


class WikiText2(DocumentsProbe):
    """Perplexity of WikiText-2's test text (Merity et al., arXiv 1609.07843), as CURLoRA reports its base knowledge.

    Published perplexities join the hub's lines by empty ones, and so does this; ``wiki.test.raw`` is taken as it is.

    Args:
        path: ``wiki.test.raw`` (or ``wiki.test.tokens``), or the hub's file (parquet, jsonl) of the test split; null
            for the hub's dataset at its pinned revision.
        documents: The whole ``file`` as one document, as perplexities are usually reported, or every ``article`` on its
            own: these can be limited (``forgetting.limit``) and shared among processes.
        name: Short name, for reports.
        window: Tokens that the model reads at once; null for its context, at most 1024.
        stride: Tokens by which windows advance; null for the window less one token.
    """

    hub = Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3", {"test": "test"})

    def __init__(
        self,
        path: str | None = None,
        documents: Literal["file", "articles"] = "file",
        name: str = "wikitext2",
        window: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__(path, documents, name, window, stride)

    def read_documents(self) -> list[str]:
        """The test text, whole or cut into articles."""
        text = self._read()
        if not text.strip():
            return []
        if self.documents == "file":
            return [text.strip("\n")]
        starts = [0, *(found.start() for found in _ARTICLE.finditer(text)), len(text)]
        parts = [text[start:end].strip() for start, end in pairwise(starts)]
        return [part for part in parts if part]

    def _read(self) -> str:
        if self.path is not None and not self.path.endswith((".parquet", ".jsonl")):
            return read_text(self.path)
        records = (
            read_rows(self.path) if self.path else load_hub(self.hub.id, self.hub.config, "test", self.hub.revision)
        )
        return "\n\n".join(text_of(lookup(record, "text"), "text") for record in records)  # a record is a line


_ARTICLE = re.compile(r"^ = [^=\n]+ = *$", re.MULTILINE)  # " = Title = "; sections have more signs
_CORPUS_ONLY = ("bleu", "chrf", "macro_f1")


def _windows(window: int | None, stride: int | None) -> tuple[int | None, int | None]:
    if window is not None and window < 2:
        raise ConfigError(f"data.probe.init_args.window is {window}; it must be at least 2 (or null)")
    if stride is not None and (stride < 1 or (window is not None and stride >= window)):
        raise ConfigError(f"data.probe.init_args.stride is {stride}; it must be at least 1 and below init_args.window")
    return window, stride
