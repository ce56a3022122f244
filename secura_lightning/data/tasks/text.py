"""Plain text as a task: go on pretraining on one domain after another, from any files or hub dataset."""

from __future__ import annotations

from typing import Any

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split


class TextTask(BenchmarkTask):
    """Documents without prompts, every token of them trained, scored by perplexity::

        class_path: TextTask
        init_args:
          name: reviews
          path: data/reviews.txt                   # or a folder with train.txt and test.txt, or any table
          template: "{title}\\n{text}"             # {text} by default, which a .txt file's documents are

    Documents are joined, with end-of-sequence tokens between them, and cut into blocks of ``data.max_length`` tokens.
    The matrix holds ``1 / perplexity`` of the held-out documents, which is 1 for a model that foresees every token.

    A ``.txt`` file's documents lie between ``<|endoftext|>`` markers or, where it has none, between blank lines.

    Args:
        name: Name of the task: its column of the matrix.
        template: The document, with columns in braces.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    is_text = True

    def __init__(self, name: str, template: str = "{text}", **kwargs: Any) -> None:
        super().__init__(
            name=name, metric="perplexity", template=template, separator="", stop=None, max_answer_words=None,
            max_new_tokens=1, **kwargs,
        )  # fmt: skip
        self.require_source()

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """A document: a row without a prompt."""
        return Row(id, "", self.template.render(record))
