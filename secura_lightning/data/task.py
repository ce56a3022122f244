"""The interface of one task: a LightningDataModule that says where its rows come from and how they are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from lightning.pytorch import LightningDataModule

from secura_lightning.data.prompt import Chat, PromptFormat
from secura_lightning.data.rows import Row

Split = Literal["train", "validation", "test"]


class Task(LightningDataModule, ABC):
    """One task of a sequence.

    Subclasses implement :meth:`load`; everything else (encoding, batching, evaluation) is shared.

    Args:
        name: Short name: the column of the matrix and the TensorBoard curve.
        metric: Key of :data:`secura_lightning.metrics.text.METRICS` that scores one prediction in 0..1.
        max_new_tokens: Longest answer that evaluation generates, in tokens. Ignored where rows have choices.
        separator: Text between prompt and answer, where no chat template is used.
        seed: Seed of whatever the task draws (generated rows, splits).
        stop: Texts that end a generated answer and are no part of it, such as a line break; none by default.

    Attributes:
        is_text: Rows are whole documents (``answer`` without a prompt), packed into blocks for language modelling.
        chat: Whether prompts go through the tokenizer's chat template; the sequence's ``data.chat``.
        system: The system message of that template; the sequence's ``data.system``.
    """

    is_text = False
    chat: Chat = "auto"
    system: str | None = None
    name: str  # LightningDataModule leaves it optional

    def __init__(
        self,
        name: str,
        metric: str,
        max_new_tokens: int = 32,
        separator: str = " ",
        seed: int = 0,
        stop: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.metric = metric
        self.max_new_tokens = max_new_tokens
        self.separator = separator
        self.seed = seed
        self.stop = tuple(stop or ())
        self._rows: dict[str, list[Row]] = {}

    @property
    def prompt_format(self) -> PromptFormat:
        """How its rows are rendered."""
        return PromptFormat(self.separator, self.chat, self.system)

    @abstractmethod
    def load(self, split: Split) -> list[Row]:
        """Read or generate the rows of one split, in a fixed order. Called once per split."""

    def rows(self, split: Split) -> list[Row]:
        """The rows of ``split``, loaded on first use."""
        if split not in self._rows:
            self._rows[split] = self.load(split)
        return self._rows[split]
