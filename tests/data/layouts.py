"""Small data files in the original layouts of the benchmarks, and the tasks that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.data.tasks.cnn_dailymail import CNNDailyMail
from secura_lightning.data.tasks.gsm8k import GSM8K
from secura_lightning.data.tasks.logiqa import LogiQA
from secura_lightning.data.tasks.news_de import NewsDE
from secura_lightning.data.tasks.standard_cl import StandardCL
from secura_lightning.data.tasks.table import TableTask
from secura_lightning.data.tasks.trace import Trace


def put(path: Path, content: Any) -> None:
    """Write text, rows as JSON, or rows as JSONL, as the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        lines = path.suffix == ".jsonl"
        content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(content, encoding="utf-8")


SUMS = [
    {"question": f"Ann has {n} pens and buys {n} more. How many?", "answer": f"She has {n}+{n}=<<{n}+{n}={2 * n}>>"
     f"{2 * n} pens.\n#### {2 * n}"} for n in range(1, 31)
]  # fmt: skip
ARTICLE = {
    "id": "x1",
    "article": "The old bridge fell. Nobody was hurt.",
    "highlights": "Bridge falls .\nNo one hurt .",
}
LOGIQA = """
b
All cats sleep. Tom is a cat.
Which one must be true?
A.Tom barks.
B.Tom sleeps.
C. Tom reads.
D.Cats read.

D
Some birds swim.
Which one is wrong?
A.Birds exist.
B.Some swim.
C.Not all fly.
D.No bird swims.

"""
FOMC = "What is the stance? A. dovish, B. hawkish, C. neutral. Choose one from A, B and C.\nText:\nRates rise.\nStance:"
SCIENCE = (
    "Choose an answer and give your reasons.\n\nQuestion:\nWhat is ice?\n\nChoices:\nA. a gas\nB. a solid\n\nAnswer:"
)
TEXTS = [
    {"sentence": "Title: A win\nText: The team won 3-0.\n", "label": "Sports"},
    {"sentence": "Shares fell on Monday.", "label": "Business"},
]


def gsm8k(folder: Path, **changes: Any) -> BenchmarkTask:
    put(folder / "train.jsonl", SUMS)
    put(folder / "test.jsonl", SUMS[:2])
    return GSM8K(path=str(folder), **changes)


def cnn(folder: Path, **changes: Any) -> BenchmarkTask:
    for split in ("train", "validation", "test"):
        put(folder / f"{split}.jsonl", [ARTICLE])
    return CNNDailyMail(path=str(folder), **changes)


def news(folder: Path, **changes: Any) -> BenchmarkTask:
    put(folder / "train.tsv", "en\tde\nGood day.\tGuten Tag.\n")
    put(folder / "dev.tsv", "de\ten\nJa.\tYes.\n")
    put(folder / "test.jsonl", [{"translation": {"de": "Guten Tag.", "en": "Good day."}}])
    return NewsDE(path=str(folder), **changes)


def logiqa(folder: Path, **changes: Any) -> BenchmarkTask:
    for name in ("Train", "Eval", "Test"):
        put(folder / f"{name}.txt", LOGIQA)
    return LogiQA(path=str(folder), **changes)


def trace(dataset: Any, prompt: str, answer: str) -> Callable[..., BenchmarkTask]:
    def make(folder: Path, **changes: Any) -> BenchmarkTask:
        for name in ("train", "eval", "test"):
            put(folder / dataset / f"{name}.json", [{"prompt": prompt, "answer": answer}])
        return Trace(str(folder), dataset, **changes)

    return make


def standard(folder: Path, **changes: Any) -> BenchmarkTask:
    for name in ("train", "dev", "test"):
        put(folder / "agnews" / f"{name}.json", TEXTS)
    put(folder / "agnews" / "labels.json", ["World", "Sports", "Business"])
    return StandardCL(str(folder), "agnews", **changes)


def table(folder: Path, **changes: Any) -> BenchmarkTask:
    put(folder / "train.csv", 'q,right,A,B\n"Up, or down?",1,up,down\n')
    put(folder / "test.csv", "q,right,A,B\nLeft?,0,left,right\n")
    settings: dict[str, Any] = {
        "template": "{q}\n{lettered_choices}\nAnswer:", "answer": "right", "choices": ["{A}", "{B}"],
        "answer_is": "index", "n_validation": 0,
    }  # fmt: skip
    return TableTask("table", path=str(folder), **(settings | changes))
