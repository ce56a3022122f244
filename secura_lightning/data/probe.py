"""What the base model knows before any task: questions per kind of knowledge, and held-out text.

A probe is only ever evaluated on. Its rows serve neither for training nor for calibration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Literal

from secura_lightning.data.read import documents, read_text
from secura_lightning.data.rows import Row
from secura_lightning.errors import SecuraError


class Probe(ABC):
    """Questions that measure how much of its base knowledge a model kept.

    Rows with choices are scored by answer likelihood, the others by exact match of the generated answer. Every row
    names its ``kind``; the probe's accuracy is the mean over kinds.

    Args:
        name: Short name, for reports.
        max_new_tokens: Longest answer that evaluation generates, in tokens.
        separator: Text between prompt and answer.
    """

    def __init__(self, name: str, max_new_tokens: int = 16, separator: str = " ") -> None:
        self.name = name
        self.max_new_tokens = max_new_tokens
        self.separator = separator

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


class TextProbe(Probe):
    """The perplexity of a text file: base knowledge of any model on its own kind of text, without questions.

    Args:
        path: A UTF-8 text file. ``<|endoftext|>`` always separates documents.
        documents: Without that marker, the ``file`` is one document (each token sees what precedes it, as perplexities
            of running text are reported), or blank lines separate ``blocks``.
        name: Short name, for reports.
    """

    def __init__(self, path: str, documents: Literal["file", "blocks"] = "file", name: str = "text") -> None:
        super().__init__(name)
        self.path = path
        self.documents = documents

    def rows(self) -> list[Row]:
        """No questions."""
        return []

    def texts(self) -> list[str]:
        """The file's documents.

        Raises:
            SecuraError: The file is missing, not UTF-8, or empty.
        """
        return self._texts

    @cached_property
    def _texts(self) -> list[str]:
        try:
            found = documents(read_text(self.path), blank_lines=self.documents == "blocks")
        except SecuraError as error:
            raise SecuraError(f"data.probe: {error}") from error
        if not found:
            raise SecuraError(f"data.probe: {self.path} holds no text")
        return found
