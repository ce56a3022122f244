"""One table, four formats."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Format = Literal["text", "markdown", "csv", "latex"]
FORMATS: tuple[str, ...] = get_args(Format)

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$",
          ">": r"$>$"}  # fmt: skip


def render(header: Sequence[str], rows: Sequence[Sequence[str]], form: str = "text", left: int = 1) -> str:
    """A table as text.

    Args:
        header: Names of the columns.
        rows: Cells, as many as columns in each row.
        form: One of :data:`FORMATS`.
        left: How many columns, from the first, are aligned to the left; the others hold numbers.
    """
    if form == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
        return buffer.getvalue().rstrip("\n")
    if form == "latex":
        lines = [" & ".join(map(_escape, row)) + r" \\" for row in [header, *rows]]
        align = "l" * left + "r" * (len(header) - left)
        ends = (rf"\begin{{tabular}}{{{align}}}", r"\hline"), (r"\hline", r"\end{tabular}")
        return "\n".join([*ends[0], lines[0], r"\hline", *lines[1:], *ends[1]])
    if form == "markdown":
        header, rows = [_bar(cell) for cell in header], [[_bar(cell) for cell in row] for row in rows]
    least = 3 if form == "markdown" else 1  # `-:` is the shortest rule that every reader of Markdown accepts
    widths = [max(least, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> list[str]:
        return [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]

    if form == "markdown":
        rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [line(header), rule, *map(line, rows)])
    text = ["  ".join(line(cells)).rstrip() for cells in [header, *rows]]
    text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def number(value: float | None, digits: int = 3) -> str:
    """A figure; a dash where there is none. Large ones (parameters, seconds) lose their fraction."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 or (isinstance(value, int)) else f"{value:.{digits}f}"


def shortened(texts: Iterable[str], width: int = 40) -> dict[str, str]:
    """Every text, long ones cut so that no two look alike: to their start, or to where they begin to differ.

    Texts that neither tells apart stay whole.
    """
    known = list(dict.fromkeys(texts))
    long = [text for text in known if len(text) > width]
    differ = next((i for i, letters in enumerate(zip(*long, strict=False)) if len(set(letters)) > 1), 0)
    for start in (0, differ):
        cut = {text: f"{'…' if start else ''}{text[start : start + width]}…" for text in long}
        if len({cut.get(text, text) for text in known}) == len(known):
            return {text: cut.get(text, text) for text in known}
    return {text: text for text in known}


def _bar(cell: str) -> str:
    return cell.replace("|", "\\|")


def _escape(cell: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in cell)
