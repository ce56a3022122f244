"""Public benchmarks by name: the tasks of :data:`~secura_lightning.data.catalogue.BENCHMARKS`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.catalogue import BENCHMARKS, Patterns
from secura_lightning.data.read import SUFFIXES, Record, existing, read_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.source import FolderSource, Records, Source
from secura_lightning.data.task import Split

Name = Literal[
    "mrpc", "sst2", "sentiment140",
    "mmlu", "arc_easy", "arc_challenge", "hellaswag", "boolq",
    "triviaqa", "nq_open", "web_questions",
]  # fmt: skip


class Benchmark(BenchmarkTask):
    """One of the public benchmarks::

        class_path: Benchmark
        init_args: {dataset: mrpc}                       # from the hub
        init_args: {dataset: mrpc, path: data/MRPC}      # from its original files, or jsonl, csv, parquet of the hub's

    Classification (MRPC, SST-2, Sentiment140) and multiple choice (MMLU by letter; ARC, HellaSwag and BoolQ by text)
    are scored by likelihood; TriviaQA, NQ-open and WebQuestions by exact match with any of the right answers. All are
    asked without examples in the prompt. Where the test labels are not public, the validation split is the test split,
    and validation rows are held out of the training rows.

    Layouts: MRPC ``msr_paraphrase_{train,test}.txt`` or GLUE's tsv; SST-2 GLUE's tsv; Sentiment140
    ``training.*.csv`` and ``testdata.*.csv`` (Latin-1, neutral tweets left out); MMLU its folder with
    ``auxiliary_train``, ``val`` and ``test``; ARC ``ARC-Easy-Train.jsonl``, ...; HellaSwag
    ``hellaswag_{train,val}.jsonl``; BoolQ ``{train,dev}.jsonl``; TriviaQA ``unfiltered-web-{train,dev}.json``;
    NQ-open ``NQ-open.{train,dev}.jsonl``; WebQuestions ``webquestions.examples.{train,test}.json``.

    Args:
        dataset: Which benchmark.
        name: Name of the task; the benchmark's by default.
        template: The prompt; the benchmark's by default.
        metric: Metric of the answers (``macro_f1`` for a classification, say); the benchmark's by default.
        max_new_tokens: Longest generated answer, in tokens; the benchmark's by default.
        stop: Texts that end a generated answer; a line break by default.
        **kwargs: See :class:`~secura_lightning.data.benchmark.BenchmarkTask`.
    """

    def __init__(
        self,
        dataset: Name,
        name: str | None = None,
        template: str | None = None,
        metric: str | None = None,
        max_new_tokens: int | None = None,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        spec = BENCHMARKS[dataset]
        self.spec = spec
        self.fields = spec.fields  # type: ignore[misc]  # a property of the benchmark, not of the class
        self.hub = spec.hub  # type: ignore[misc]
        self.unfit = spec.unfit
        super().__init__(
            name=name or dataset,
            metric=metric or ("squad_exact" if dataset in ("triviaqa", "nq_open", "web_questions") else "accuracy"),
            template=template or spec.template,
            max_new_tokens=max_new_tokens or spec.max_new_tokens,
            stop=["\n"] if stop is None else stop,
            **kwargs,
        )

    @cached_property
    def source(self) -> Source:
        """The benchmark's own files where ``path`` is a folder."""
        source = super().source
        if not isinstance(source, FolderSource):
            return source
        return OriginalFiles(source.folder, source.read, source.names, self.spec.files)

    def read_file(self, path: Path) -> Records:
        """The records of one file, original or converted."""
        suffix = path.suffix.lower()
        table = suffix == ".csv"
        encoding = self.spec.encoding if table else "utf-8"
        columns = self.columns or (self.spec.columns if table else None)
        records = read_rows(path, columns, self.spec.suffix.get(suffix), encoding)
        if "subject" in self.spec.fields and table:  # MMLU names it in the file's name alone
            subject = re.sub(r"_(?:dev|val|test)$", "", path.stem)
            records = [{"subject": subject, **record} for record in records]
        return records

    def to_row(self, id: str, record: Record, split: Split) -> Row | None:
        """The row that the benchmark's reader makes of a record."""
        parts = self.spec.read(record)
        if parts is None:
            return None
        return Row(id, self.template.render(parts.values), parts.answer, parts.choices, aliases=parts.aliases)


@dataclass(frozen=True, slots=True)
class OriginalFiles(FolderSource):
    """A folder with the files that a benchmark was published as.

    Attributes:
        patterns: Patterns of each split's files; the first that matches is read.
    """

    patterns: Patterns = field(default_factory=dict)

    def has(self, split: Split) -> bool:
        """Only the validation file may be missing."""
        return split != "validation" or self.holds(split)

    def files(self, split: Split) -> list[Path]:
        """The split's file, or several that share a pattern."""
        if split in self.names:
            return [existing(self.folder / self.names[split])]
        for pattern in self.patterns.get(split, ()):
            found = sorted(file for file in self.folder.glob(pattern) if file.suffix.lower() in SUFFIXES)
            if found:
                return found
        return []
