"""NewsDE: translation of news between English and German, from WMT's parallel text."""

from __future__ import annotations

from typing import Any, Literal

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.read import Record, lookup, text_of
from secura_lightning.data.rows import Row
from secura_lightning.data.source import Hub
from secura_lightning.data.task import Split

_LANGUAGES = {"de": "German", "en": "English"}


class NewsDE(BenchmarkTask):
    """Sentence -> its translation, scored by chrF.

    Layout: ``train``, ``validation`` and ``test`` files with columns ``en`` and ``de``, flat (tsv, jsonl, ...) or
    under ``translation`` as on the hub. The hub's training split is WMT16's whole mixture (850 MB), its test split
    newstest2016.

    Args:
        name: Name of the task: its column of the matrix.
        direction: Source and target language.
        template: The prompt; its fields are ``source``, ``source_language`` and ``target_language``.
        metric: Metric of the generated translation (``chrf`` or ``bleu``).
        max_new_tokens: Longest generated answer, in tokens.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    hub = Hub(
        "wmt/wmt16",
        "de-en",
        "41d8a4013aa1489f28fea60ec0932af246086482",
        {"train": "train", "validation": "validation", "test": "test"},
    )
    fields = ("source", "source_language", "target_language")

    def __init__(
        self,
        name: str = "news_de",
        direction: Literal["en-de", "de-en"] = "en-de",
        template: str = (
            "Translate from {source_language} to {target_language}.\n{source_language}: {source}\n{target_language}:"
        ),
        metric: str = "chrf",
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, metric=metric, template=template, max_new_tokens=max_new_tokens, **kwargs)
        self.languages = direction.split("-")

    def to_row(self, id: str, record: Record, split: Split) -> Row:
        """The source sentence with its translation."""
        pair = record["translation"] if isinstance(record.get("translation"), dict) else record
        source, target = (text_of(lookup(pair, language), language).strip() for language in self.languages)
        names = [_LANGUAGES[language] for language in self.languages]
        values = {"source": source, "source_language": names[0], "target_language": names[1]}
        return Row(id, self.template.render(values) if source else "", target)
