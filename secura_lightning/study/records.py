"""What is kept of a finished run: ``continual.json`` plus the score of every row, small enough for git.

A record is one line of ``results.jsonl``, or is built from a run's folder; both hold the same. Row scores::

    "rows": {"tasks": {NAME: {"ids": digest, "scores": [row 0, row 1, ...]}},
             "base":  {"ids": digest, "kinds": {KIND: [row 0, row 1, ...]}}}

where each entry, one for every row of the matrix, holds the scores of the same rows in the same order as text: ``0``
and ``1`` where there are no others, else ``=`` and two letters of base 64 a score, in steps of 1/4095. Tasks whose
metric is no mean of rows (:data:`~secura_lightning.metrics.corpus.CORPUS`) have ``counts`` beside ``scores``: what the
metric is computed from, exact.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from secura_lightning.errors import SecuraError
from secura_lightning.metrics.continual import summarise
from secura_lightning.metrics.corpus import CORPUS
from secura_lightning.metrics.text import METRICS

Record = dict[str, Any]

REPORT = "continual.json"
RESULTS = "results.jsonl"
_ONE_TASK = summarise(np.ones((2, 1)), np.ones((2, 1)))
METRICS_OF_RUNS = (*_ONE_TASK, "base_accuracy", "perplexity", "perplexity_ratio", "parameters", "seconds", "memory_mb")
"""What every run may be measured by; ``task/NAME`` and ``base/KIND`` depend on its tasks and its probe."""
TWO_TASKS = tuple(name for name, value in _ONE_TASK.items() if value is None)
"""Metrics that a run of one task leaves undefined."""
LOWER_IS_BETTER = ("forgetting", "perplexity", "perplexity_ratio", "parameters", "seconds", "memory_mb")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_STEPS = 64 * 64 - 1
_KEPT = ("tasks", "matrix", "base_knowledge", "metrics", "steps", "meta")


def is_complete(report: Record) -> bool:
    """Whether every row of the matrix was measured."""
    return all(step is not None for step in report["steps"])


def read_report(folder: Path) -> Record:
    """The ``continual.json`` of a run's folder.

    Raises:
        SecuraError: There is none, or it is damaged.
    """
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SecuraError(f"{folder} holds no {REPORT}: name the folder of a run of `secura fit`") from error
    except (OSError, ValueError) as error:
        raise SecuraError(f"{path} is damaged: {error}") from error
    if not isinstance(report, dict) or any(key not in report for key in _KEPT):
        raise SecuraError(f"{path} was not written by secura fit")
    return report


def read_lines(path: Path) -> list[Any]:
    """What the lines of a JSONL file hold.

    Lines end at a line feed alone: text that a model wrote may hold U+2028 and other ends of lines of ``splitlines``.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is no JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def record_of(folder: Path) -> Record:
    """The record of one run.

    Args:
        folder: The run's ``version_N`` folder.

    Raises:
        SecuraError: It holds no run.
    """
    report = read_report(folder)
    record = {key: report[key] for key in _KEPT}
    first: Record = next((row for row in report.get("details") or [] if row), {})
    scored = ("metric", "n", "chance", "majority")
    record["scored"] = {task: {key: cell.get(key) for key in scored} for task, cell in first.items()}
    metrics = {task: str(cell["metric"]) for task, cell in record["scored"].items()}
    record["rows"] = _row_scores(folder, report["tasks"], len(report["steps"]), metrics)
    return rounded(record)


def rounded(value: Any, digits: int = 6) -> Any:
    """Numbers cut to ``digits`` places after the point, through lists and mappings."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float) and abs(value) >= 1e-3:  # small settings, such as a learning rate, stay exact
        return round(value, digits)
    return value


def _row_scores(folder: Path, tasks: list[str], n_rows: int, metrics: dict[str, str]) -> Record | None:
    """The scores of all saved predictions; None without any."""
    found: Record = {"tasks": {}, "base": None}
    for task in tasks:
        # The file names of callbacks.report, which cannot be imported here: it imports torch.
        lines = [_predictions(folder, f"row{t}_{quote(task, safe=' ')}") for t in range(n_rows)]
        if any(lines):
            ids = next([line["id"] for line in rows] for rows in lines if rows)
            found["tasks"][task] = {"ids": _digest(ids), "scores": [pack([x["score"] for x in row]) for row in lines]}
            if metrics.get(task) in CORPUS:
                found["tasks"][task]["counts"] = [pack_counts(_counts(metrics[task], row)) for row in lines]
    lines = [_predictions(folder, f"base{t}") for t in range(n_rows)]
    if any(lines):
        some = next(rows for rows in lines if rows)
        kinds = sorted({line["kind"] for line in some})
        found["base"] = {
            "ids": _digest([line["id"] for line in some]),
            "kinds": {kind: [pack([x["score"] for x in row if x["kind"] == kind]) for row in lines] for kind in kinds},
        }
    return found if found["tasks"] or found["base"] else None


def _predictions(folder: Path, name: str) -> list[Record]:
    path = folder / "predictions" / f"{name}.jsonl"
    if not path.is_file():
        return []
    try:
        return read_lines(path)
    except ValueError as error:
        raise SecuraError(f"{path} is damaged: {error}") from error


def _digest(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]


def pack(scores: Sequence[float]) -> str | None:
    """Scores in 0..1 as text; None without any."""
    if not scores:
        return None
    if set(scores) <= {0.0, 1.0}:
        return "".join("1" if score else "0" for score in scores)
    steps = [round(min(1.0, max(0.0, score)) * _STEPS) for score in scores]
    return "=" + "".join(_LETTERS[step // 64] + _LETTERS[step % 64] for step in steps)


def unpack(text: str | None) -> NDArray[np.float64] | None:
    """The scores ``[n]`` that :func:`pack` wrote."""
    if text is None:
        return None
    if not text.startswith("="):
        return np.array([float(letter) for letter in text])
    digits = [_LETTERS.index(letter) for letter in text[1:]]
    return np.array([64 * high + low for high, low in zip(digits[::2], digits[1::2], strict=True)]) / _STEPS


def _counts(metric: str, rows: list[Record]) -> NDArray[np.float64] | None:
    """What a corpus-level metric is computed from, of every row ``[n, k]``; of several right answers the closest."""
    if not rows:
        return None
    predictions = [row["prediction"] for row in rows]
    answers = [[row["reference"], *row.get("aliases", ())] for row in rows]
    closest = [
        max(texts, key=lambda text: METRICS[metric](prediction, text))
        for prediction, texts in zip(predictions, answers, strict=True)
    ]
    return CORPUS[metric].counts(predictions, closest)


def pack_counts(counts: NDArray[np.float64] | None) -> str | None:
    """Whole numbers ``[n, k]`` as text; None without any."""
    if counts is None:
        return None
    packed = zlib.compress(counts.astype("<i4").tobytes(), 9)
    return f"{counts.shape[1]}:{base64.b64encode(packed).decode()}"


def unpack_counts(text: str | None) -> NDArray[np.float64] | None:
    """The counts ``[n, k]`` that :func:`pack_counts` wrote."""
    if text is None:
        return None
    width, _, packed = text.partition(":")
    flat = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype="<i4")
    return flat.reshape(-1, int(width)).astype(np.float64)


def value_of(record: Record, metric: str) -> float | None:
    """One figure of a run, None where it is undefined.

    Args:
        record: The run.
        metric: A metric of ``continual.json``; ``task/NAME`` or ``base/KIND``, the score at the run's end;
            ``base_accuracy``, ``perplexity`` (at the end), ``perplexity_ratio`` (end over start); ``parameters``,
            ``seconds``, ``memory_mb``.
    """
    base = record.get("base_knowledge") or {}
    kind, _, name = metric.partition("/")
    if kind == "task" and name:
        place = record["tasks"].index(name) if name in record["tasks"] else None
        return None if place is None else _last(record, [row[place] for row in record["matrix"]])
    if kind == "base" and name:
        return _last(record, base.get("kinds", {}).get(name, []))
    if metric == "base_accuracy":
        return _last(record, base.get("accuracy", []))
    if metric in ("perplexity", "perplexity_ratio"):
        column = base.get("perplexity", [])
        last = _last(record, column)
        if metric == "perplexity" or last is None:
            return last
        return last / column[0] if column[0] else None
    if metric == "parameters":
        return record["meta"].get("trainable_parameters")
    if metric == "seconds":
        return record.get("seconds", record["meta"].get("wall_time"))
    if metric == "memory_mb":
        return record.get("memory_mb")
    return record["metrics"].get(metric)


def metric_names(record: Record) -> list[str]:
    """Every metric that :func:`value_of` may find in a record."""
    base = record.get("base_knowledge") or {}
    return [
        *record["metrics"],
        *(f"task/{name}" for name in record["tasks"]),
        *(f"base/{kind}" for kind in base.get("kinds", {})),
        *(("base_accuracy", "perplexity", "perplexity_ratio") if base else ()),
        *("parameters", "seconds", "memory_mb"),
    ]


def _last(record: Record, column: list[float | None]) -> float | None:
    """The entry of the last measured row."""
    measured = [t for t, step in enumerate(record["steps"]) if step is not None]
    return column[measured[-1]] if measured and column else None


def newest_run(folder: Path) -> Path | None:
    """The newest ``version_N`` below ``folder`` that holds a report; None without one."""
    runs = [path for path in versions(folder) if (path / REPORT).is_file()]
    return runs[-1] if runs else None


def versions(folder: Path, first: int = 0) -> list[Path]:
    """The ``version_N`` folders with N >= ``first``, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", path.name))]
    return [path for n, path in sorted(found) if n >= first]
