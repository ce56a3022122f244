"""Pictures of a comparison: plasticity against retention, forgetting curves, matrices.

Figures are drawn without pyplot, which keeps global state and looks for a display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from secura_lightning.study.compare import Group, Kinds, summarise
from secura_lightning.study.stats import Array, pareto

# Okabe and Ito's colours, which differ for colour-blind readers too; markers repeat the distinction
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"
_CURVE = "lr"  # points that differ in this axis alone are joined to a curve


def draw(groups: Sequence[Group], folder: Path, retention: str, kinds: Kinds, top: int = 8) -> list[Path]:
    """Write ``pareto.png``, ``curves.png`` and ``matrices.png``.

    Args:
        groups: The groups, best first.
        folder: Where to.
        retention: The metric on the horizontal axis of the Pareto picture.
        kinds: Sets of kinds for ``retention/NAME``.
        top: How many groups the curves and matrices show.

    Returns:
        The files written; no Pareto picture without base knowledge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown, note = groups[:top], f" (first {top} of {len(groups)})" if len(groups) > top else ""
    figures = {
        "pareto": draw_pareto(groups, retention, kinds),
        "curves": draw_curves(shown, note),
        "matrices": draw_matrices(shown, note),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


def draw_pareto(groups: Sequence[Group], retention: str, kinds: Kinds) -> Figure | None:
    """Learning accuracy over retention, one point a group; the front's points are labelled.

    The picture is cut to the points: an interval of two or three runs may leave it.
    """
    points = []
    for one in groups:
        x, y = summarise(one, retention, kinds), summarise(one, "learning_accuracy")
        if x and y:
            points.append((one, x, y))
    if not points:
        return None
    figure = Figure(figsize=(8.5, 5.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    families: dict[str, list[int]] = {}
    labels: list[str] = []
    for i, (one, _, _) in enumerate(points):
        rest = {name: value for name, value in one.axes.items() if name != _CURVE}
        labels.append(Group(rest, []).label or "all")
        families.setdefault(labels[i], []).append(i)
    for f, (name, members) in enumerate(families.items()):
        members.sort(key=lambda i: _as_number(points[i][0].axes.get(_CURVE, "0")))
        xs, ys = [points[i][1][0] for i in members], [points[i][2][0] for i in members]
        widths = [points[i][1][1] or 0.0 for i in members], [points[i][2][1] or 0.0 for i in members]
        _, _, bars = axes.errorbar(xs, ys, xerr=widths[0], yerr=widths[1], label=name, color=_COLOURS[f % 8],
                                   marker=_MARKERS[(f + f // 8) % 8], linestyle="-" if len(members) > 1 else "none",
                                   linewidth=1, elinewidth=0.7)  # fmt: skip
        for bar in bars:
            bar.set_alpha(0.4)
    front = sorted(pareto([(x[0], y[0]) for _, x, y in points]), key=lambda i: points[i][1][0])
    axes.step([points[i][1][0] for i in front], [points[i][2][0] for i in front], where="pre", color="0.6",
              linestyle="--", linewidth=1, zorder=0, label="Pareto front")  # fmt: skip
    for i in front:
        label = points[i][0].label if len(families[labels[i]]) > 1 else labels[i]
        axes.annotate(label, (points[i][1][0], points[i][2][0]), xytext=(4, 5),
                      textcoords="offset points", fontsize=7)  # fmt: skip
    axes.set_xlim(*_room([x[0] for _, x, _ in points]))
    axes.set_ylim(*_room([y[0] for _, _, y in points]))
    axes.set_xlabel(f"{retention.replace('_', ' ')} (base knowledge kept)")
    axes.set_ylabel("learning accuracy (plasticity)")
    axes.set_title("Plasticity against retention, with 95 % intervals over runs")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _room(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that show all values, with a margin."""
    low, high = min(values), max(values)
    margin = 0.15 * (high - low) or 0.05
    return low - margin, high + margin


def draw_curves(groups: Sequence[Group], note: str = "") -> Figure:
    """Each task's score, and the base's, after every task; mean over runs, the band from lowest to highest."""
    tasks = list(dict.fromkeys(task for one in groups for record in one.records for task in record["tasks"]))
    known = any(_curve(one, None) is not None for one in groups)
    panels: list[str | None] = [*tasks, *([None] if known else [])]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns + 1.5, 3 * rows + 0.6), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(grid, panels, strict=False):
        for i, one in enumerate(groups):
            curve = _curve(one, task)
            if curve is None:
                continue
            steps = np.arange(curve.shape[1])
            axes.plot(steps, curve.mean(0), color=_COLOURS[i % 8], marker=_MARKERS[i % 8], markersize=4,
                      linestyle="-" if i < 8 else "--", label=one.label)  # fmt: skip
            axes.fill_between(steps, curve.min(0), curve.max(0), color=_COLOURS[i % 8], alpha=0.12, linewidth=0)
            axes.set_xticks(steps, ["base", *map(str, steps[1:])])
        axes.set_title("base knowledge" if task is None else task)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("after task")
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=7)
    figure.suptitle(f"Scores after every task{note}")
    return figure


def _curve(one: Group, task: str | None) -> Array | None:
    """Scores ``[runs, T+1]`` of a group on a task, or on the base's knowledge; None where a run lacks them."""
    curves = []
    for record in one.records:
        if task is None:
            column = (record.get("base_knowledge") or {}).get("accuracy")
        else:
            column = [row[record["tasks"].index(task)] for row in record["matrix"]] if task in record["tasks"] else None
        if not column or None in column:
            return None
        curves.append(column)
    return np.array(curves, dtype=np.float64) if len({len(curve) for curve in curves}) == 1 else None


def draw_matrices(groups: Sequence[Group], note: str = "") -> Figure:
    """The accuracy matrix of every group as a heat map, mean over its runs; bold where a task was just learned."""
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.3 * rows + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, one in zip(grid, groups, strict=False):
        axes.set_title(one.label, fontsize=8)
        tasks = one.records[0]["tasks"]
        if any(record["tasks"] != tasks for record in one.records):
            axes.text(0.5, 0.5, "runs differ\nin their tasks", ha="center", va="center")
            continue
        matrix = np.array([record["matrix"] for record in one.records], dtype=np.float64).mean(0)
        axes.imshow(np.ma.masked_invalid(matrix), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", rotation_mode="anchor", fontsize=7)
        axes.set_yticks(range(len(tasks) + 1), ["base", *tasks], fontsize=7)
        for (t, i), score in np.ndenumerate(matrix):
            if not np.isnan(score):
                weight, ink = "bold" if t == i + 1 else "normal", "black" if score > 0.6 else "white"
                axes.text(i, t, f"{score:.2f}", ha="center", va="center", fontsize=7, weight=weight, color=ink)
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    figure.suptitle(f"Score on each task (columns) after each task (rows){note}")
    return figure


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
