"""What a continual run shows in TensorBoard beyond scalars: curves on one chart, the matrix, samples, HPARAMS.

Scalars go to every logger. Everything else is TensorBoard's own and is skipped for other loggers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from numpy.typing import NDArray

from secura_lightning.evaluation.evaluate import RowResult


def log_scalars(loggers: Iterable[Logger], scalars: dict[str, float | None], step: int) -> None:
    """Log the defined scalars to every logger."""
    defined = {name: value for name, value in scalars.items() if value is not None and not math.isnan(value)}
    if defined:
        for logger in loggers:
            logger.log_metrics(defined, step=step)


def add_layout(loggers: Iterable[Logger], tasks: Sequence[str], kinds: Sequence[str], guarded: bool = False) -> None:
    """Declare the custom-scalar charts: all tasks' curves on one, all kinds of base knowledge on another; where a guard
    keeps a promise, retention with its floor on a third."""
    charts = {"tasks": _multiline(f"task/{name}" for name in tasks)}
    if guarded:
        charts["retention guard"] = _multiline(["guard/retention", "guard/floor", "guard/scale"])
    if kinds:
        charts["base knowledge"] = _multiline(f"base/{kind}" for kind in [*kinds, "accuracy"])
        charts["base perplexity"] = _multiline(["base/perplexity"])
    for writer in _writers(loggers):
        writer.add_custom_scalars({"forgetting": charts})


def _multiline(tags: Iterable[str]) -> list[Any]:
    # TensorBoard reads each tag as a regular expression.
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]


def add_matrix(
    loggers: Iterable[Logger], tag: str, matrix: NDArray[np.float64], tasks: Sequence[str], step: int
) -> None:
    """Draw the accuracy matrix ``[T+1, T]`` as an annotated heat map."""
    writers = list(_writers(loggers))
    if not writers:
        return
    image = draw_matrix(matrix, tasks)
    for writer in writers:
        writer.add_image(tag, image, step, dataformats="HWC")


def draw_matrix(matrix: NDArray[np.float64], tasks: Sequence[str]) -> NDArray[np.uint8]:
    """The heat map as pixels ``[h, w, 3]``; missing cells stay blank."""
    # Imported here: it takes a second. Figure and canvas directly: pyplot keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = matrix.shape
    figure = Figure(figsize=(2.2 + 0.9 * columns, 1.4 + 0.5 * rows), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_invalid(matrix), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(columns), tasks, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(rows), ["base", *(f"after {name}" for name in tasks)])
    axes.set_xlabel("score on")
    for (t, i), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            learned = "bold" if t == i + 1 else "normal"  # the diagonal: right after learning
            ink = "black" if value > 0.6 else "white"
            axes.text(i, t, f"{value:.2f}", ha="center", va="center", color=ink, weight=learned)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def add_samples(loggers: Iterable[Logger], tag: str, rows: Sequence[RowResult], step: int) -> None:
    """Show a few prompts with prediction and reference."""
    if not rows:
        return
    text = "\n\n---\n\n".join(
        "\n\n".join(f"**{label}**\n\n{_block(content)}" for label, content in _labelled(row)) for row in rows
    )
    for writer in _writers(loggers):
        writer.add_text(tag, text, step)


def _labelled(row: RowResult) -> list[tuple[str, str]]:
    return [
        (f"prompt `{row.id}`", row.prompt),
        (f"prediction (score {row.score:.2f})", row.prediction),
        ("reference", row.reference),
    ]


def _block(text: str) -> str:
    # Indented code: nothing in a model's output can end it or be rendered.
    return "\n".join(f"    {line}" for line in (text or " ").splitlines())


def log_hyperparameters(
    loggers: Iterable[Logger], params: dict[str, Any], metrics: dict[str, float], step: int
) -> None:
    """Fill TensorBoard's HPARAMS tab: the run's settings with its final metrics; other loggers get the settings."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            # Settings and metrics in one call: the tab knows only metrics that are named together with the settings.
            logger.log_hyperparams(params, {f"final/{name}": value for name, value in metrics.items()}, step=step)
        else:
            logger.log_hyperparams(params)


def _writers(loggers: Iterable[Logger]) -> Iterable[Any]:
    return (logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger))
