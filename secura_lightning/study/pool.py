"""Child processes, some at a time: each cell is a ``secura fit`` of its own, so that no run can disturb another."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from secura_lightning.errors import SecuraError
from secura_lightning.study.cells import CellFolder

_POLL = 0.2  # seconds between two looks at the children
_GRACE = 5.0  # seconds that a child has to end by itself; checkpoints survive a kill, so waiting longer gains nothing


@dataclass
class Child:
    """A running cell."""

    folder: CellFolder
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int
    started: float


class Pool:
    """Runs cells, ``jobs`` at a time.

    Args:
        jobs: Most children at a time.
        threads: Threads of each.
        lock: File descriptor of the sweep's lock, which children inherit: it stays locked until the last of them ends.
    """

    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "secura_lightning", "fit")
    """What runs a cell, before its arguments."""

    def __init__(self, jobs: int, threads: int, lock: int | None = None) -> None:
        self.jobs = jobs
        self.threads = threads
        self.lock = lock
        self.children: list[Child] = []

    def run(
        self,
        folders: Sequence[CellFolder],
        on_end: Callable[[CellFolder], None],
        on_wait: Callable[[list[Child]], None] = lambda children: None,
    ) -> None:
        """Run all ``folders``; a failed one does not stop the others.

        Args:
            folders: The cells, in their order.
            on_end: Called for each that ended, finished or with ``state.error``.
            on_wait: Called several times a second with those that run.

        Raises:
            KeyboardInterrupt: The user, or SIGTERM, asked to stop. The children have ended by then.
        """
        waiting = list(folders)
        with _sigterm_interrupts():
            try:
                while waiting or self.children:
                    while waiting and len(self.children) < self.jobs:
                        self._start(waiting.pop(0))
                    for child in self._ended():
                        on_end(child.folder)
                    on_wait(self.children)
                    if len(self.children) == self.jobs or not waiting:
                        time.sleep(_POLL)
            finally:
                self.stop()

    def _start(self, folder: CellFolder) -> None:
        arguments = folder.prepare()
        log = folder.log.open("ab")
        log.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} secura fit {' '.join(arguments)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [*self.command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(self.threads),
            start_new_session=True,  # the terminal's Ctrl-C reaches the sweep alone, which then ends its children
            pass_fds=() if self.lock is None else (self.lock,),
        )
        self.children.append(Child(folder, process, log, log.tell(), time.monotonic()))

    def _ended(self) -> Iterator[Child]:
        """Take the children that have ended out of the list, their states written."""
        for child in list(self.children):
            pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)  # unlike poll(), tells time and memory
            if pid:
                self.children.remove(child)
                child.process.returncode = os.waitstatus_to_exitcode(status)
                child.log.close()
                _account(child, usage)
                child.folder.state.error = _error_of(child)
                child.folder.save()
                yield child

    def stop(self) -> None:
        """End the children: SIGTERM to each with its workers, SIGKILL to what is left after a few seconds."""
        for child in self.children:
            _signal(child, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        while self.children:
            for child in list(self.children):
                pid, _, usage = os.wait4(child.process.pid, os.WNOHANG)
                if pid:
                    _signal(child, signal.SIGKILL)  # workers that outlive it
                    child.process.returncode = -signal.SIGTERM
                    child.log.close()
                    _account(child, usage)
                    child.folder.save()
                    self.children.remove(child)
                elif time.monotonic() > end:
                    _signal(child, signal.SIGKILL)
            time.sleep(0.05)


def _account(child: Child, usage: Any) -> None:
    """Add an attempt's time and memory to its cell's."""
    state = child.folder.state
    state.seconds += time.monotonic() - child.started
    state.cpu_seconds += usage.ru_utime + usage.ru_stime
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    state.memory_mb = max(state.memory_mb, usage.ru_maxrss / unit)


def _error_of(child: Child) -> str | None:
    """Why a child failed; None where its run is whole."""
    code = child.process.returncode
    try:
        finished = child.folder.is_finished()
    except SecuraError as error:
        return str(error)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; last line: {child.folder.last_error(child.log_start)}"
    if code:
        return child.folder.last_error(child.log_start)
    return None if finished else f"ended without a whole matrix; see {child.folder.log}"


def _signal(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


def _environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        "PYTHONUNBUFFERED": "1",  # a log that is followed shows what has happened
    }


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that both end the children."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int]:
    """Hold the sweep's folder.

    Raises:
        SecuraError: Another sweep holds it, or a child that outlived one.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SecuraError(f"{root}: another `secura sweep` (or a run that it left) is at work there") from error
        os.set_inheritable(file.fileno(), True)
        yield file.fileno()
