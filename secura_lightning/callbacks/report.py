"""``continual.json``, ``continual.csv``, predictions and the printed table of a run.

The measurements arrive as plain rows, one per evaluation after ``after`` tasks (0: the untouched base)::

    {"after": 1, "step": 150, "tasks": [TaskScore.summary(), ...], "base": {"kinds": {...}, ...} or None}
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from secura_lightning._version import __version__
from secura_lightning.evaluation.evaluate import ProbeScore, RowResult
from secura_lightning.metrics.continual import summarise

Measurement = dict[str, Any]


def matrix_of(rows: Sequence[Measurement], n_tasks: int) -> NDArray[np.float64]:
    """Scores ``[T+1, T]``, NaN where not measured (yet)."""
    matrix = np.full((n_tasks + 1, n_tasks), np.nan)
    for row in rows:
        matrix[row["after"]] = [cell["value"] for cell in row["tasks"]]
    return matrix


def base_column(rows: Sequence[Measurement], n_tasks: int) -> NDArray[np.float64] | None:
    """Accuracy on base knowledge ``[T+1]``, NaN where not measured (yet); None without questions on it."""
    column = np.full(n_tasks + 1, np.nan)
    for row in rows:
        if row["base"] and row["base"]["accuracy"] is not None:
            column[row["after"]] = row["base"]["accuracy"]
    return None if np.isnan(column).all() else column


def base_of(score: ProbeScore) -> dict[str, Any]:
    """What a measurement keeps of a probe's score."""
    kept = ("probe", "kinds", "accuracy", "perplexity", "chance", "n", "tokens")
    interval = None if score.interval is None else list(score.interval)
    return {**{key: getattr(score, key) for key in kept}, "interval": interval}


def metrics_of(rows: Sequence[Measurement], n_tasks: int) -> dict[str, float | None]:
    """The continual metrics of the measurements so far."""
    kinds = _by_kind(rows, n_tasks)
    base = np.array([[np.nan if x is None else x for x in column] for column in kinds.values()], dtype=float).T
    return summarise(matrix_of(rows, n_tasks), base if kinds else None)


def build(rows: Sequence[Measurement], tasks: Sequence[str], meta: dict[str, Any]) -> dict[str, Any]:
    """The content of ``continual.json``.

    Returns:
        ``tasks``; ``matrix``, T+1 rows with null where missing; ``base_knowledge``, columns parallel to the matrix's
        rows, with the probe's name and the ``part`` of it that is scored (null without a probe); ``metrics``;
        ``steps``, the global step of each row; ``details``, per row and task the metric, number of rows, interval,
        chance and majority values; ``meta``.
    """
    n = len(tasks)
    place = {row["after"]: row for row in rows}
    ordered = [place.get(t) for t in range(n + 1)]
    probe = next((row["base"] for row in rows if row["base"]), None)
    base = None
    if probe:
        base = {
            "probe": probe["probe"],
            "part": _part(probe),
            "accuracy": [row and row["base"]["accuracy"] for row in ordered],
            "interval": [row and row["base"].get("interval") for row in ordered],
            "perplexity": [row and row["base"]["perplexity"] for row in ordered],
            "kinds": _by_kind(rows, n),
            **{key: probe[key] for key in ("chance", "n", "tokens")},
        }
    report = {
        "tasks": list(tasks),
        "matrix": matrix_of(rows, n).tolist(),
        "base_knowledge": base,
        "metrics": metrics_of(rows, n),
        "steps": [row and row["step"] for row in ordered],
        "details": [row and dict(zip(tasks, row["tasks"], strict=True)) for row in ordered],
        "meta": meta,
    }
    return _without_nan(report)


def _part(base: dict[str, Any]) -> str:
    """The part of the probe that a measurement or a report is of."""
    part: str = base.get("part", "whole")  # reports of 0.1.0 lack it
    return part


def _column(base: dict[str, Any]) -> str:
    """Head of the table's column of base knowledge, which says where a part of the probe alone is scored."""
    return "base" if _part(base) == "whole" else f"base {_part(base)}"


def _by_kind(rows: Sequence[Measurement], n_tasks: int) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {}
    for row in rows:
        for kind, value in (row["base"]["kinds"] if row["base"] else {}).items():
            columns.setdefault(kind, [None] * (n_tasks + 1))[row["after"]] = value
    return columns


def _without_nan(value: Any) -> Any:
    """NaN and infinity as None, through lists and dicts: JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(report: dict[str, Any], folder: Path) -> None:
    """Write ``continual.json`` and ``continual.csv``, each whole or not at all."""
    write_atomically(folder / "continual.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    base = report["base_knowledge"]
    kinds = list(base["kinds"]) if base else []
    header = ["after", "step", *report["tasks"]]
    writer.writerow([*header, *(f"base/{kind}" for kind in [*kinds, "accuracy", "perplexity"])] if base else header)
    for t, cells in enumerate(report["matrix"]):
        line = ["base" if t == 0 else report["tasks"][t - 1], report["steps"][t], *cells]
        if base:
            line += [*(base["kinds"][kind][t] for kind in kinds), base["accuracy"][t], base["perplexity"][t]]
        writer.writerow(["" if cell is None else cell for cell in line])
    write_atomically(folder / "continual.csv", buffer.getvalue())


def save_predictions(rows: Iterable[RowResult], path: Path) -> None:
    """Write one line per row to ``path``, enough to recompute its score; nothing where there are no rows."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
    if lines:
        write_atomically(path, "".join(lines))


def predictions_path(folder: Path, after: int, task: str | None) -> Path:
    """Where the predictions after ``after`` tasks go: on ``task``, or on the probe where that is None."""
    # Quoted, so that any two names stay two files; a task may be called what it likes, "probe" included.
    name = f"base{after}" if task is None else f"row{after}_{quote(task, safe=' ')}"
    return folder / "predictions" / f"{name}.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def table(report: dict[str, Any]) -> str:
    """The run at a glance: a line per evaluation, the newest one's intervals, the guessing scores, then the metrics."""
    base = report["base_knowledge"]
    lines = [["after", *report["tasks"], *([_column(base), "ppl"] if base else [])]]
    for t, cells in enumerate(report["matrix"]):
        if report["steps"][t] is not None:
            line = ["(base)" if t == 0 else f"{t} {report['tasks'][t - 1]}", *map(_number, cells)]
            lines.append(line + ([_number(base["accuracy"][t]), _number(base["perplexity"][t], 2)] if base else []))
    lines += _intervals(report)
    first: dict[str, Any] = next((row for row in report["details"] if row), {})
    for key in ("chance", "majority"):
        values = [cell[key] for cell in first.values()]
        if any(value is not None for value in values):
            ends = [_number(base["chance"]) if key == "chance" else "-", "-"] if base else []
            lines.append([key, *map(_number, values), *ends])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *right]))
    text.insert(1, "-" * len(text[0]))
    metrics = [f"{name} {_number(value)}" for name, value in report["metrics"].items() if value is not None]
    half = (len(metrics) + 1) // 2
    return "\n".join([*text, "", "   ".join(metrics[:half]), "   ".join(metrics[half:])]).rstrip()


def _intervals(report: dict[str, Any]) -> list[list[str]]:
    """Two lines for the table: the lower and the upper end of every score of the newest measurement."""
    measured = [t for t, row in enumerate(report["details"]) if row]
    if not measured:
        return []
    newest, base = measured[-1], report["base_knowledge"]
    ends = [cell["interval"] for cell in report["details"][newest].values()]
    if base:
        ends += [base["interval"][newest], None]
    if not any(ends):
        return []
    return [
        [name, *("-" if pair is None else _number(pair[end]) for pair in ends)]
        for end, name in enumerate(("95 % from", "     to"))
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def environment() -> dict[str, Any]:
    """Versions of the libraries that decide a result, and the commit of this package's checkout (null elsewhere)."""
    versions = {"secura_lightning": __version__}
    for name in ("torch", "lightning", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a vendored build without metadata
            versions[name] = "unknown"
    return {"versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``-dirty`` for local changes; None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside someone else's repository: only a tracked file makes it ours.
    if git("ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
