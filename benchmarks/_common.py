"""What the benchmarks share: contenders measured in turn, a table with targets, and the same table as JSON.

Two things measured minutes apart are not comparable on a machine that does other work or changes its clock. So
:func:`paired` runs all contenders once in every round, and a :class:`Row` holds a ratio of medians of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One comparison of a benchmark.

    Attributes:
        name: What was measured, with its unit.
        value: Its median.
        peer: What it is compared with.
        peer_value: The peer's median.
        ratio: value / peer_value, or the median of that over the rounds.
        target: What the ratio should be, such as ``<= 1.10``; empty where there is no target.
        met: Whether it is; None where there is no target.
    """

    name: str
    value: float
    peer: str
    peer_value: float
    ratio: float
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, and the measurements in order."""

    median: float
    lower: float
    upper: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise one or more measurements."""
        ordered = sorted(samples)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], tuple(samples))
        lower, median, upper = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, lower, upper, tuple(samples))

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.median:{spec}} [{self.lower:{spec}}, {self.upper:{spec}}]"


def paired(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Spread]:
    """Measure every function once in every round, so that whatever slows the machine slows all of them.

    The order turns by one from round to round: none always follows the same neighbour's cache and clock.

    Args:
        functions: Contenders by name.
        repeats: Rounds that count.
        warmup: Rounds before those that do not.
        measure: Measures one call; by default :func:`seconds`.

    Returns:
        Median, quartiles and samples of each contender.
    """
    measure = measure or seconds
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + repeats):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            value = measure(functions[name])
            if round_ >= warmup:
                samples[name].append(value)
    return {name: Spread.of(values) for name, values in samples.items()}


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, to the end of what it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of one call by this process: what other processes do hardly enters. Meant for one thread."""
    start = time.process_time()
    function()
    return time.process_time() - start


def clock(device: torch.device | str) -> Callable[[Callable[[], object]], float]:
    """CPU time for one thread on a CPU, wall time otherwise."""
    return cpu_seconds if torch.device(device).type == "cpu" and torch.get_num_threads() == 1 else seconds


def compare(name: str, value: float, peer: str, peer_value: float, at_most: float | None = None) -> Row:
    """A row whose target, if any, is a ratio of at most ``at_most``."""
    return _judged(name, value, peer, peer_value, value / peer_value, at_most)


def compare_paired(name: str, spreads: Mapping[str, Spread], ours: str, peer: str, at_most: float | None = None) -> Row:
    """A row from :func:`paired`: its ratio is the median of the rounds' ratios, which drift cannot move."""
    one, other = spreads[ours], spreads[peer]
    ratio = statistics.median(a / b for a, b in zip(one.samples, other.samples, strict=True))
    return _judged(name, one.median, peer, other.median, ratio, at_most)


def _judged(name: str, value: float, peer: str, peer_value: float, ratio: float, at_most: float | None) -> Row:
    if at_most is None:
        return Row(name, value, peer, peer_value, ratio)
    return Row(name, value, peer, peer_value, ratio, f"<= {at_most:.2f}", ratio <= at_most)


def finish(rows: Sequence[Row], json_path: str | Path | None, title: str) -> None:
    """Print the rows as an aligned table under the title, and write ``{"rows": [...]}`` where a path is given."""
    head = ("what", "value", "against", "value", "ratio", "target", "")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    print(f"{title}\n{hardware()}\n")
    for line in cells:
        parts = [
            c.rjust(w) if i in (1, 3, 4) else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(parts).rstrip())
    judged = [row for row in rows if row.met is not None]
    if judged:
        print(f"\n{sum(bool(row.met) for row in judged)} of {len(judged)} targets met")
    if json_path is not None:
        content: dict[str, Any] = {"title": title, "hardware": hardware(), "rows": [asdict(row) for row in rows]}
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        Path(json_path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    met = "" if row.met is None else ("met" if row.met else "MISSED")
    return row.name, f"{row.value:.4g}", row.peer, f"{row.peer_value:.4g}", f"{row.ratio:.3f}", row.target, met


def hardware() -> str:
    """The processor or GPU, threads and torch version, in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def tabulate(spreads: Mapping[str, Spread], unit: str) -> None:
    """Print median [lower quartile, upper quartile] of every contender."""
    width = max(map(len, spreads))
    print(f"{'':<{width}}  {unit}: median [quartiles]")
    for name, spread in spreads.items():
        print(f"{name:<{width}}  {spread:.3f}")
    print()


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have: ``--quick`` and ``--json``."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="small shapes and few rounds: a check that it runs")
    made.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    return made
