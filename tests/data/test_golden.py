"""What a model reads and is scored by, for every task, as a file that a person can look at.

``tests/golden/NAME.txt`` holds the first training row of each case. After an intended change, write the files anew with

    REGENERATE_GOLDEN=1 pytest tests/data/test_golden.py

and read the difference before it is committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secura_lightning.data.catalogue import BENCHMARKS
from secura_lightning.data.task import Task
from secura_lightning.data.tasks.pocket_arithmetic import PocketArithmetic
from secura_lightning.data.tasks.pocket_digest import PocketDigest
from secura_lightning.data.tasks.pocket_german import PocketGerman
from secura_lightning.data.tasks.pocket_logic import PocketLogic
from secura_lightning.data.tasks.standard_cl import StandardCL
from secura_lightning.metrics.text import METRICS
from tests.data.layouts import FOMC, SCIENCE, cnn, gsm8k, logiqa, news, put, standard, table, trace
from tests.data.originals import original

FOLDER = Path(__file__).parents[1] / "golden"
Make = Callable[..., Task]
PAIR = {"sentence": "sentence 1: It rains.\nsentence 2: It is wet.\n"}


def labelled(dataset: str, family: str, *labels: str) -> Make:
    """A dataset of the 15-task benchmark in O-LoRA's own folders."""

    def make(folder: Path, **changes: Any) -> Task:
        for name in ("train", "test"):
            put(folder / family / dataset / f"{name}.json", [PAIR | {"label": labels[0]}])
        put(folder / family / dataset / "labels.json", list(labels))
        return StandardCL(str(folder), dataset, **changes)

    return make


def benchmark(dataset: str) -> Make:
    def make(folder: Path, **changes: Any) -> Task:
        return original(folder, dataset, **changes)

    return make


def pocket(task: Any) -> Make:
    def make(folder: Path, **changes: Any) -> Task:
        return task(1, 1, 1)

    return make


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "gsm8k": (gsm8k, {}),
    "gsm8k_answer_only": (gsm8k, {"answer_only": True, "template": "{question} ="}),
    "cnn_dailymail": (cnn, {}),
    "cnn_dailymail_lead": (cnn, {"max_words": 4}),
    "news_en_de": (news, {}),
    "news_de_en": (news, {"direction": "de-en", "metric": "bleu"}),
    "logiqa": (logiqa, {}),
    "logiqa_text": (logiqa, {"answers": "text", "template": "{context} {question}"}),
    "trace_C-STANCE": (trace("C-STANCE", "\u6001\u5ea6:", "C"), {}),
    "trace_FOMC": (trace("FOMC", FOMC, "B"), {}),
    "trace_MeetingBank": (trace("MeetingBank", "Minutes: x\nSummary:", "It passed."), {}),
    "trace_Py150": (trace("Py150", "<s> import os <EOL>", "x = <NUM_LIT:1>"), {}),
    "trace_ScienceQA": (trace("ScienceQA", SCIENCE, "B\nIce is hard."), {}),
    "trace_ScienceQA_letter": (trace("ScienceQA", SCIENCE, "B\nIce is hard."), {"reasons": False}),
    "trace_NumGLUE-cm": (trace("NumGLUE-cm", "1 + 1 =", "2"), {}),
    "trace_NumGLUE-ds": (trace("NumGLUE-ds", "1 + 2 =", "3"), {}),
    "trace_20Minuten": (trace("20Minuten", "Vereinfache: x\n", "Einfach."), {}),
    "standard_agnews": (standard, {}),
    "standard_MNLI": (labelled("MNLI", "NLI", "entailment", "neutral", "contradiction"), {}),
    "standard_QQP": (labelled("QQP", "QQP", "True", "False"), {}),
    "standard_BoolQA": (labelled("BoolQA", "BoolQA", "True", "False"), {}),
    "standard_MultiRC": (labelled("MultiRC", "MultiRC", "True", "False"), {}),
    "standard_WiC": (labelled("WiC", "WiC", "True", "False"), {}),
    "standard_COPA": (labelled("COPA", "COPA", "A", "B"), {}),
    "standard_SST-2": (labelled("SST-2", "SC", "Bad", "Good"), {}),
    "table": (table, {}),
    "table_free": (
        table,
        {"template": "{q}", "answer": "{A}/{B}", "choices": None, "answer_is": "text", "metric": "exact"},
    ),
    **{f"benchmark_{name}": (benchmark(name), {}) for name in BENCHMARKS},
    **{
        f"pocket_{task.world}": (pocket(task), {})
        for task in (PocketArithmetic, PocketDigest, PocketGerman, PocketLogic)
    },
}


def rendered(task: Task) -> str:
    """A row as a person reads it; ``⟦`` and ``⟧`` enclose what is trained on."""
    row = task.rows("train")[0]
    parts = [f"{row.prompt}\u27e6{task.separator}{row.answer}\u27e7", "", f"metric: {task.metric}", f"row: {row.id}"]
    if row.choices:
        parts.append(f"choices: {' | '.join(row.choices)}")
    else:
        parts.append(f"longest answer: {task.max_new_tokens} tokens")
    if row.aliases:
        parts.append(f"or: {' | '.join(row.aliases)}")
    if task.stop:
        parts.append(f"stop: {list(task.stop)}")
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_first_training_row_is_rendered_as_in_its_golden_file(tmp_path: Path, name: str) -> None:
    make, changes = CASES[name]
    task = make(tmp_path, **({"n_validation": 0} | changes))
    found, file = rendered(task), FOLDER / f"{name}.txt"
    if os.environ.get("REGENERATE_GOLDEN"):
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")
    assert task.metric in METRICS


def test_every_golden_file_is_a_case() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(CASES)
