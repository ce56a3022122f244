"""GSM8K: grade-school word problems with worked solutions (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import re
from typing import Any

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record, lookup, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Hub
from secura_lightning.data.task import Split
from secura_lightning.errors import SecuraError

_FINAL = re.compile(r"####\s*(\S.*?)\s*$")


class GSM8K(BenchmarkTask):
    """Question -> solution that ends in ``#### N``, scored by the number.

    Layout: ``train.jsonl``, ``test.jsonl`` with ``question`` and ``answer``; validation rows are held out of train.

    Args:
        name: Name of the task: its column of the matrix.
        answer_only: Train on the final number alone, without the solution.
        template: The prompt.
        metric: Metric of the generated answer.
        max_new_tokens: Longest generated answer, in tokens; null for 256, or 16 with ``answer_only``.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    hub = Hub("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee", {"train": "train", "test": "test"})

    def __init__(
        self,
        name: str = "gsm8k",
        answer_only: bool = False,
        template: str = "Question: {question}\nAnswer:",
        metric: str = "numeric",
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        tokens = (16 if answer_only else 256) if max_new_tokens is None else max_new_tokens
        super().__init__(name=name, metric=metric, template=template, max_new_tokens=tokens, **kwargs)
        self.answer_only = answer_only

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The question with its solution, or with its number."""
        answer = text_of(lookup(record, "answer"), "answer").strip()
        final = _FINAL.search(answer)
        if answer and final is None:
            raise SecuraError(f"the answer does not end in '#### N': {answer[-40:]!r}")
        return Row(id, self.template.render(record), final.group(1) if final and self.answer_only else answer)
