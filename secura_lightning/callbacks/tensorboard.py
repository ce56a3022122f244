"""What a continual run shows in TensorBoard: curves, several of them on one chart, the matrix, samples.

Scalars go to every logger. Everything else is TensorBoard's own and is skipped for other loggers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from secura_lightning.evaluation.evaluate import RowResult


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger without Lightning's curve ``epoch``: the whole sequence is one epoch."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


def log_scalars(loggers: Iterable[Logger], scalars: Mapping[str, float | None], step: int) -> None:
    """Log the defined scalars to every logger."""
    defined = {name: value for name, value in scalars.items() if value is not None and not math.isnan(value)}
    if defined:
        for logger in loggers:
            logger.log_metrics(defined, step=step)


def add_layout(loggers: Iterable[Logger], questions: bool, texts: bool, guarded: bool = False) -> None:
    """Declare the charts of the Custom Scalars tab: what one run's curves say together, and runs against each other.

    Args:
        loggers: The run's loggers.
        questions: Whether the run has a probe that asks questions.
        texts: Whether the run has a probe with texts.
        guarded: Whether a guard keeps a promise.
    """
    # Patterns, not the names of this run: TensorBoard draws equal charts of several runs once, unequal ones twice.
    one = {"score on every task": ["task/.+"]}
    several = {
        "average performance (AP)": ["continual/AP"],
        "learning accuracy": ["continual/learning_accuracy"],
        "forgetting": ["continual/forgetting"],
    }
    if questions:
        one["base knowledge, by kind"] = ["base/(?!perplexity$).+"]
        several["base retention"] = ["continual/base_retention"]
    if texts:
        several["base perplexity"] = ["base/perplexity"]
    one["change of the weights, |dW| / |W0|, over the modules"] = ["telemetry/relative_change/.+"]
    one["loss"] = ["train/(replay_)?loss"]
    if guarded:
        one["retention guard"] = ["guard/(retention|floor|scale)"]
    layout = {
        title: {chart: ["Multiline", [f"^{tag}$" for tag in tags]] for chart, tags in charts.items()}
        for title, charts in (("One run (tick a single one on the left)", one), ("Runs against each other", several))
    }
    for writer in writers(loggers):
        writer.add_custom_scalars(layout)


def add_matrix(
    loggers: Iterable[Logger],
    tag: str,
    matrix: NDArray[np.float64],
    tasks: Sequence[str],
    step: int,
    base: NDArray[np.float64] | None = None,
) -> None:
    """Draw the accuracy matrix ``[T+1, T]``, and accuracy on base knowledge ``[T+1]`` beside it, as a heat map."""
    found = list(writers(loggers))
    if not found:
        return
    image = draw_matrix(matrix, tasks, base)
    for writer in found:
        writer.add_image(tag, image, step, dataformats="HWC")


def draw_matrix(
    matrix: NDArray[np.float64], tasks: Sequence[str], base: NDArray[np.float64] | None = None
) -> NDArray[np.uint8]:
    """The heat map as pixels ``[h, w, 3]``; missing cells stay blank.

    The Images tab shows it 350 pixels wide: the letters are large for the figure, so that they can be read there.
    """
    # Imported here: it takes a second. Figure and canvas directly: pyplot keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = matrix.shape
    beside = 0 if base is None else 1
    figure = Figure(figsize=(2.4 + 0.8 * (columns + beside), 1.6 + 0.55 * rows), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    widths = [columns, 1] if beside else [1]
    grid = figure.subplots(1, 1 + beside, squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    _draw_cells(grid[0], matrix, tasks, learned=True)
    grid[0].set_yticks(range(rows), ["(base)", *(f"after {name}" for name in tasks)], fontsize=14)
    if base is not None:
        _draw_cells(grid[1], base[:, None], ["base"])
        grid[1].set_yticks([])
    grid[0].set_xlabel("score on", fontsize=14)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_cells(axes: Any, values: NDArray[np.float64], names: Sequence[str], learned: bool = False) -> None:
    """Colours and figures; with ``learned``, those of the diagonal, right after learning, in bold."""
    axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=14)
    for (t, i), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "black" if value > 0.6 else "white"
            weight = "bold" if learned and t == i + 1 else "normal"
            axes.text(i, t, f"{value:.2f}", ha="center", va="center", color=ink, weight=weight, fontsize=15)


def add_samples(loggers: Iterable[Logger], tag: str, rows: Sequence[RowResult], step: int) -> None:
    """Show a few prompts with prediction and reference."""
    if not rows:
        return
    text = "\n\n---\n\n".join(
        "\n\n".join(f"**{label}**\n\n{_block(content)}" for label, content in _labelled(row)) for row in rows
    )
    for writer in writers(loggers):
        summary = _text(tag, text)
        writer._get_file_writer().add_summary(summary, step)


def _text(tag: str, text: str) -> Any:
    from torch.utils.tensorboard.summary import text as text_summary

    summary = text_summary(tag, text)
    summary.value[0].tag = tag  # without the "/text_summary" that torch adds
    return summary


def _labelled(row: RowResult) -> list[tuple[str, str]]:
    return [
        (f"prompt `{row.id}`", row.prompt),
        (f"prediction (score {row.score:.2f})", row.prediction),
        ("reference", row.reference),
    ]


def _block(text: str) -> str:
    # Indented code: nothing in a model's output can end it or be rendered.
    return "\n".join(f"    {line}" for line in (text or " ").splitlines())


def writers(loggers: Iterable[Logger]) -> Iterable[Any]:
    """The writers of the TensorBoard loggers among ``loggers``."""
    return (logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger))
