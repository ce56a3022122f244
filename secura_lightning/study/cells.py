"""The folder of one cell, and what it says about how far the cell is.

SWEEP/lora,lr=0.001,seed=2/    fit.yaml     the whole configuration: `secura fit --config fit.yaml` repeats it
                               cell.json    its axes, its settings' digest, time, memory, last error
                               log.txt      what its processes printed
                               version_N/   the run, as `secura fit` writes it
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from secura_lightning.study.grid import Cell
from secura_lightning.study.records import Record, is_complete, read_report, record_of, versions
from secura_lightning.study.settings import dump, overlay, write_text

_TAIL = 64 * 1024  # bytes of a log that may hold its last error


@dataclass
class State:
    """What ``cell.json`` holds.

    Attributes:
        signature: Digest of the settings of the runs from ``first_version`` on; older ones had others.
        first_version: Number of the first ``version_N`` with these settings.
        seconds: Wall time of all attempts.
        cpu_seconds: Processor time of all attempts.
        memory_mb: Largest resident memory of an attempt.
        error: Last error line of the last attempt; None where it did not fail.
    """

    signature: str
    first_version: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_mb: float = 0.0
    error: str | None = None


class CellFolder:
    """One cell on disk."""

    def __init__(self, cell: Cell, root: Path) -> None:
        self.cell = cell
        self.path = root / cell.id
        self.state = self._read()

    def _read(self) -> State:
        try:
            found = json.loads((self.path / "cell.json").read_text(encoding="utf-8"))
            state = State(**{key.name: found[key.name] for key in fields(State)})
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # a new cell, or a damaged file
            state = State("")
        if state.signature != self.cell.signature:
            old = versions(self.path)
            after = int(old[-1].name.removeprefix("version_")) + 1 if old else 0
            state = State(self.cell.signature, after)
        return state

    @property
    def log(self) -> Path:
        """Output of the cell's processes."""
        return self.path / "log.txt"

    @property
    def run(self) -> Path | None:
        """The newest run with the cell's settings."""
        found = versions(self.path, self.state.first_version)
        return found[-1] if found else None

    def is_finished(self) -> bool:
        """Whether a run with these settings measured its whole matrix."""
        return self.run is not None and (self.run / "continual.json").is_file() and is_complete(read_report(self.run))

    def checkpoint(self) -> Path | None:
        """Where an interrupted run goes on; None to start anew."""
        for run in reversed(versions(self.path, self.state.first_version)):
            if (run / "checkpoints" / "last.ckpt").is_file():
                return run / "checkpoints" / "last.ckpt"
        return None

    def prepare(self) -> list[str]:
        """Write the configuration; the arguments of ``secura fit`` that start the cell or resume it."""
        own = {
            "name": self.cell.name,
            "save_dir": str(self.path.parent),
            "trainer": {"enable_progress_bar": False},  # nobody watches a log file
        }
        write_text(self.path / "fit.yaml", dump(overlay(self.cell.settings, own)))
        self.state.error = None
        self.save()
        checkpoint = self.checkpoint()
        return ["--config", str(self.path / "fit.yaml"), *(["--ckpt_path", str(checkpoint)] if checkpoint else [])]

    def save(self) -> None:
        """Write ``cell.json``."""
        content = {"cell": self.cell.id, "stage": self.cell.stage, "axes": self.cell.values, **asdict(self.state)}
        write_text(self.path / "cell.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def record(self) -> Record:
        """The cell's line of ``results.jsonl``."""
        assert self.run is not None
        mine: dict[str, Any] = {
            "cell": self.cell.id,
            "stage": self.cell.stage,
            "axes": self.cell.values,
            "signature": self.state.signature,
            "seconds": round(self.state.seconds, 1),
            "cpu_seconds": round(self.state.cpu_seconds, 1),
            "memory_mb": round(self.state.memory_mb, 1),
        }
        return mine | record_of(self.run)

    def last_error(self, start: int) -> str:
        """The telling line of what the log holds from byte ``start`` on."""
        with self.log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("secura fit: ")]
        return (own or lines or ["it printed nothing"])[-1].removeprefix("secura fit: ")[:300]
