"""What ``secura dial`` shows of a sweep: a table, a picture, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secura_lightning.callbacks.report import write_atomically


def table(result: dict[str, Any]) -> str:
    """One line per point, then what was chosen."""
    tasks = list(result["chosen"]["tasks"])
    lines = [["scale", *tasks, "mean", "retention"]]
    points = sorted({point["scale"]: point for point in [*result["points"], result["chosen"]]}.items())
    for scale, point in points:
        cells = [*point["tasks"].values(), point["mean"], point["retention"]]
        mark = " <" if scale == result["chosen"]["scale"] else ""
        lines.append([f"{scale:.4f}", *(f"{cell:.3f}" for cell in cells[:-1]), f"{cells[-1]:.3f}{mark}"])
    widths = [max(len(line[i].removesuffix(" <")) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        last = line[-1].removesuffix(" <").rjust(widths[-1]) + (" <" if line[-1].endswith(" <") else "")
        text.append("  ".join([*(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)), last]))
    return "\n".join([*text, "", verdict(result)])


def verdict(result: dict[str, Any]) -> str:
    """What the sweep found, in one line."""
    chosen = result["chosen"]
    if not result["kept"]:
        return (
            f"no scale keeps retention at {result['floor']}: even the start of the path has {chosen['retention']:.3f}"
        )
    return (
        f"the largest scale found that keeps retention at {result['floor']} is {chosen['scale']:.4f}: "
        f"retention {chosen['retention']:.3f}, mean task score {chosen['mean']:.3f}"
    )


def save_json(result: dict[str, Any], path: Path) -> None:
    """Write the sweep, whole or not at all."""
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def draw(result: dict[str, Any], path: Path) -> None:
    """Task score against retention along the path, and both against the scale."""
    # Imported here: it takes a second. Figure and canvas directly: pyplot keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = sorted([*result["points"], result["chosen"]], key=lambda point: point["scale"])
    scales = [point["scale"] for point in points]
    kept = [point["retention"] for point in points]
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in result["chosen"]["tasks"]:
        left.plot(kept, [point["tasks"][name] for point in points], marker=".", alpha=0.45, label=name)
    left.plot(kept, [point["mean"] for point in points], marker="o", color="black", label="mean")
    left.plot(result["chosen"]["retention"], result["chosen"]["mean"], marker="*", markersize=15, color="tab:red")
    left.axvline(result["floor"], linestyle="--", color="grey", label=f"floor {result['floor']}")
    left.set_xlabel("retention of base knowledge")
    left.set_ylabel("task score")
    left.legend(fontsize="small")
    right.plot(scales, kept, marker="o", color="tab:blue", label="retention")
    right.plot(scales, [point["mean"] for point in points], marker="o", color="black", label="mean task score")
    right.axvline(result["chosen"]["scale"], linestyle="--", color="tab:red", label="chosen scale")
    right.axhline(result["floor"], linestyle="--", color="grey")
    right.set_xlabel("scale of the change")
    right.legend(fontsize="small")
    beside = path.with_name(f".{path.name}.part")
    canvas.print_png(str(beside))
    beside.replace(path)
