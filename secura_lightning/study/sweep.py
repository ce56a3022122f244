"""Run a sweep: what is done is skipped, what was cut off goes on, what failed is told at the end.

search cells  ->  the best value per group (``selection.json``)  ->  main cells  ->  ``results.jsonl``, a table
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.study.axes import means, options_of, show
from secura_lightning.study.cells import CellFolder
from secura_lightning.study.grid import Cell, Sweep
from secura_lightning.study.pool import Child, Pool, locked
from secura_lightning.study.records import RESULTS, Record, metric_names, read_lines, value_of
from secura_lightning.study.settings import write_text
from secura_lightning.study.table import number, render

SHOWN = ("learning_accuracy", "AP", "forgetting", "base_retention", "perplexity")
"""Metrics of the tables, where a sweep has them."""
SELECTION = "selection.json"

Chosen = dict[tuple[Any, ...], Any]  # group -> selected value


class Runner:
    """Runs the cells of a sweep.

    Args:
        sweep: The sweep.
        jobs: Runs at a time.
        threads: Threads of each run.
        only: Axis -> the values to keep to, as text; other cells are left as they are.

    Attributes:
        undecided: Groups among the kept ones for which the search chose no value, so that none of their runs started.

    Raises:
        ConfigError: ``only`` asks for what the sweep does not have.
    """

    def __init__(
        self, sweep: Sweep, jobs: int = 1, threads: int = 1, only: Mapping[str, list[str]] | None = None
    ) -> None:
        self.sweep = sweep
        self.root = sweep.save_dir
        self.jobs = jobs
        self.threads = threads
        self.only = dict(only or {})
        self.undecided: list[str] = []
        self._check_only()
        self.records: dict[str, Record] = _read_results(self.root / RESULTS)

    def _check_only(self) -> None:
        for name, values in self.only.items():
            if name not in self.sweep.axes:
                raise ConfigError(f"--only: '{name}' is no axis; the axes are {', '.join(self.sweep.axes)}")
            options = [*options_of(self.sweep.axes, name), *(e[name] for e in self.sweep.include if name in e)]
            for value in values:
                if not any(means(value, option) for option in options):
                    known = ", ".join(dict.fromkeys(map(show, options)))
                    raise ConfigError(f"--only: axis {name} has no '{value}'; it has {known}")
        if self.only and not self._kept([*self.sweep.search(), *self.sweep.cells()]):
            raise ConfigError("--only leaves no cell: no run of the sweep has all of these values")

    # ------------------------------------------------------------------ running

    def run(self, stage: str = "all") -> list[CellFolder]:
        """Run what is not finished yet, and return the cells that failed.

        Args:
            stage: ``select`` stops once the values are chosen; ``all`` runs everything.

        Raises:
            SecuraError: Another sweep works in the same folder.
            KeyboardInterrupt: Stopped; the next run goes on.
        """
        with locked(self.root) as lock:
            self._leave_out_others({})
            failed = self._run_cells(self._kept(self.sweep.search()), "search", lock)
            chosen = None
            if self.sweep.select:
                chosen = self.choose(tell=True)
                self._leave_out_others(chosen)
            if stage == "all":
                failed += self._run_cells(self._kept(self.sweep.cells(chosen)), "runs", lock)
        return failed

    def _leave_out_others(self, chosen: Chosen) -> None:
        """Forget results of cells that the sweep does not have, or not with these settings: its file has changed since.

        Args:
            chosen: The selected value of each group. Of other groups the results of every value stay.
        """
        cells = [*self.sweep.search(), *self.sweep.cells(chosen)]
        for cell in self.sweep.search():
            if self.sweep.select and (group := self.sweep.group(cell.values)) not in chosen:
                cells += self.sweep.cells({group: cell.values[self.sweep.select.axis]})
        asked = {(cell.id, cell.signature) for cell in cells}
        other = [name for name, record in self.records.items() if (name, record.get("signature")) not in asked]
        if not other:
            return
        named = f"{', '.join(other[:3])}{', ...' if len(other) > 3 else ''}"
        print(f"left out of {RESULTS}: {len(other)} finished with settings that the sweep no longer has ({named}); "
              "their folders stay", flush=True)  # fmt: skip
        for name in other:
            del self.records[name]
        self._write_results()

    def _run_cells(self, cells: Sequence[Cell], title: str, lock: int) -> list[CellFolder]:
        """Run cells of one stage; those that failed."""
        folders = [CellFolder(cell, self.root) for cell in cells]
        done = [folder for folder in folders if folder.is_finished()]
        todo = [folder for folder in folders if folder not in done]
        for folder in folders:
            self.records.pop(folder.cell.id, None)  # its run may be gone
        for folder in done:
            self.records[folder.cell.id] = folder.record()
        self._write_results()
        if not todo:
            return []
        tell = Progress(title, len(done), todo, self.jobs)
        failed: list[CellFolder] = []

        def end(folder: CellFolder) -> None:
            if folder.state.error is None:
                self.records[folder.cell.id] = folder.record()
                self._write_results()
            else:
                failed.append(folder)
            tell.end(folder, self.records.get(folder.cell.id))

        try:
            Pool(self.jobs, self.threads, lock).run(todo, end, tell.wait)
        finally:
            tell.close()
        return failed

    def _kept(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that ``only`` leaves; a search cell is kept by the axes that set its group and value."""
        select = self.sweep.select
        own = {*select.per, select.axis} if select else set()
        return [
            cell
            for cell in cells
            if all(
                any(means(value, cell.values[name]) for value in values)
                for name, values in self.only.items()
                if name in cell.values and (cell.stage == "main" or name in own)
            )
        ]

    def _write_results(self) -> None:
        """Write ``results.jsonl``: the sweep's cells, then what other selections of it (``only``) have left there."""
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in self._ordered()]
        write_text(self.root / RESULTS, "".join(f"{line}\n" for line in lines))

    def _ordered(self) -> list[Record]:
        return sorted(self.records.values(), key=lambda record: (record["stage"] != "select", record["cell"]))

    # ---------------------------------------------------------------- selecting

    def choose(self, tell: bool = False) -> Chosen:
        """The best value of every group whose search has at least one finished run; the rest is left out.

        Ties go to the value that is listed first; an undefined metric never wins.

        Args:
            tell: Print which value won, and against what, and write ``selection.json``.
        """
        select = self.sweep.select
        assert select is not None
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in self.sweep.search():
            groups.setdefault(self.sweep.group(cell.values), []).append(cell)
        sign = 1 if select.mode == "max" else -1
        chosen: Chosen = {}
        notes: list[dict[str, Any]] = []
        for group, cells in groups.items():
            told = tell and bool(self._kept(cells))
            scores = {}
            for cell in cells:
                record = self._result(cell)
                if record:
                    scores[cell.values[select.axis]] = self._score(record, select.metric)
            known = {value: score for value, score in scores.items() if score is not None}
            name = ", ".join(show(option) for option in group) or "all"
            if not known:
                notes.append({"group": dict(zip(select.per, group, strict=True)), "chosen": None})
                if told:
                    self.undecided.append(name)
                    why = f"its search runs have no {select.metric}" if scores else "no finished search run"
                    print(f"{name}: {why}, so none of its runs can start")
                continue
            best = max(known, key=lambda value: sign * known[value])
            chosen[group] = best
            tried = [cell.values[select.axis] for cell in cells]
            edge = len(tried) > 1 and best in (min(tried), max(tried)) if _ordered_values(tried) else False
            notes.append({
                "group": dict(zip(select.per, group, strict=True)), "axis": select.axis, "chosen": best,
                "metric": select.metric, "rows": select.rows, "at_edge": edge,
                "scores": [[value, scores.get(value)] for value in tried],
            })  # fmt: skip
            if told:
                table = ", ".join(f"{show(value)}: {number(scores.get(value))}" for value in tried)
                print(f"{name}: {select.axis} {show(best)} ({select.metric} on {select.rows} rows: {table})"
                      + ("; at the edge of its values: widen them" if edge else ""))  # fmt: skip
        if notes and tell:
            write_text(self.root / SELECTION, json.dumps(notes, indent=1, ensure_ascii=False) + "\n")
        return chosen

    def _result(self, cell: Cell) -> Record | None:
        """The result of a cell with these settings."""
        record = self.records.get(cell.id)
        return record if record and record.get("signature") == cell.signature else None

    def _score(self, record: Record, metric: str) -> float | None:
        if metric not in metric_names(record):
            raise ConfigError(f"select.metric: no '{metric}'; choose among {', '.join(metric_names(record))}")
        value = value_of(record, metric)
        return None if value is None or math.isnan(value) else value

    # ------------------------------------------------------------------ telling

    def plan(self) -> str:
        """What a run would do, as a table."""
        rows = []
        cells = self._kept(self.sweep.search())
        chosen: Chosen | None = None
        if self.sweep.select and all(self._result(cell) for cell in cells):
            chosen = self.choose()
        for cell in [*cells, *self._kept(self.sweep.cells(chosen))]:
            waits = self.sweep.select is not None and self.sweep.select.axis not in cell.values
            rows.append([cell.id, "waits for the search" if waits else _standing(CellFolder(cell, self.root))])
        return render(["cell", "state"], rows, left=2)

    def summary(self, failed: Sequence[CellFolder]) -> str:
        """The finished cells with their metrics, then the failed ones with their errors."""
        records = [record for record in self._ordered() if record["stage"] == "main"] or self._ordered()
        shown = [name for name in SHOWN if any(value_of(record, name) is not None for record in records)]
        rows = [
            [
                record["cell"],
                *(number(value_of(record, name)) for name in shown),
                *(number(value_of(record, name), 0) for name in ("seconds", "memory_mb")),
            ]
            for record in records
        ]
        lines = ["", render(["cell", *shown, "seconds", "MB"], rows)] if rows else []
        for folder in failed:
            lines.append(f"failed: {folder.cell.id}: {folder.state.error} ({folder.log})")
        return "\n".join(lines)


class Progress:
    """A line for every cell that ends, and a bar with the time that is left where there is a terminal."""

    def __init__(self, title: str, done: int, todo: Sequence[CellFolder], jobs: int) -> None:
        self.total = done + len(todo)
        self.count = done
        self.jobs = jobs
        self.started = time.monotonic()
        self.durations: list[float] = []
        self.before = {folder.cell.id: folder.state.seconds for folder in todo}
        print(f"{title}: {len(todo)} to run, {done} finished before", flush=True)
        self.bar = tqdm(total=self.total, initial=done, desc=title, unit="cell", leave=False, disable=None,
                        bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}")  # fmt: skip

    def end(self, folder: CellFolder, record: Record | None) -> None:
        """Tell of one cell."""
        self.count += 1
        seconds = folder.state.seconds - self.before[folder.cell.id]
        self.durations.append(seconds)
        if record is None:
            text = f"FAILED: {folder.state.error}"
        else:
            names = [name for name in SHOWN if value_of(record, name) is not None]
            text = ", ".join(f"{name} {number(value_of(record, name))}" for name in names)
        left = f"; {_clock(self._left(0))} left" if self.count < self.total else ""
        line = f"[{self.count}/{self.total}] {folder.cell.id}: {text} ({_clock(seconds)}{left})"
        with self.bar.external_write_mode():
            print(line, flush=True)
        self.bar.update()

    def wait(self, children: list[Child]) -> None:
        """Keep the bar's clock going."""
        if self.bar.disable:
            return
        running = sum(time.monotonic() - child.started for child in children)
        left = f", {_clock(self._left(running))} left" if self.durations else ""
        self.bar.set_postfix_str(f"{len(children)} running{left}")

    def _left(self, running: float) -> float:
        """Seconds until the last cell ends, were each as long as the mean of those that ended."""
        mean = sum(self.durations) / len(self.durations)
        return max(0.0, (self.total - self.count) * mean - running) / self.jobs

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def _standing(folder: CellFolder) -> str:
    """How far a cell is, in words."""
    if folder.is_finished():
        return "finished"
    if folder.checkpoint():
        return "to resume"
    return "to do (settings changed)" if folder.state.first_version else "to do"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _ordered_values(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _read_results(path: Path) -> dict[str, Record]:
    if not path.is_file():
        return {}
    try:
        return {record["cell"]: record for record in read_lines(path)}
    except (ValueError, TypeError, KeyError) as error:
        raise SecuraError(f"{path} is damaged ({error}); remove it, the next run writes it anew") from error
