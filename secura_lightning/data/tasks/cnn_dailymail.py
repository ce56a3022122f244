"""CNN/DailyMail: news articles and their highlights (See et al., arXiv 1704.04368)."""

from __future__ import annotations

from typing import Any

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record, lookup, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Hub
from secura_lightning.data.task import Split
from secura_lightning.errors import ConfigError


class CNNDailyMail(BenchmarkTask):
    """Article -> highlights, scored by ROUGE-L.

    Layout: ``train``, ``validation`` and ``test`` files with ``article`` and ``highlights``.

    A prompt that exceeds ``data.max_length`` loses tokens on its left: for an article that is the lead, the sentences
    that highlights draw on most. ``max_words`` cuts the article's end instead.

    Args:
        name: Name of the task: its column of the matrix.
        max_words: Words of the article that the prompt keeps, from its start; null for all.
        template: The prompt.
        metric: Metric of the generated highlights.
        max_new_tokens: Longest generated answer, in tokens.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    hub = Hub(
        "abisee/cnn_dailymail",
        "3.0.0",
        "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        {"train": "train", "validation": "validation", "test": "test"},
    )
    fields = ("article",)

    def __init__(
        self,
        name: str = "cnn_dailymail",
        max_words: int | None = None,
        template: str = "Article: {article}\n\nHighlights:",
        metric: str = "rougeL",
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, metric=metric, template=template, max_new_tokens=max_new_tokens, **kwargs)
        if max_words is not None and max_words < 1:
            raise ConfigError(f"task '{name}': init_args.max_words is {max_words}; it must be at least 1 (or null)")
        self.max_words = max_words

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The article, cut to ``max_words``, with its highlights, one a line."""
        article = text_of(lookup(record, "article"), "article").strip()
        if self.max_words is not None:
            article = " ".join(article.split()[: self.max_words])
        highlights = text_of(lookup(record, "highlights"), "highlights").strip()
        return Row(id, self.template.render({"article": article}) if article else "", highlights)
