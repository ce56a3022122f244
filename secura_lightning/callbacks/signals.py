"""Ctrl-C, SIGTERM and SIGUSR1 as a request to save and stop at the next whole optimizer step, on all ranks together.

A signal arrives anywhere in a step, where a checkpoint would be wrong, and on each rank at another moment. So a handler
only takes note; after every optimizer step the ranks agree whether one of them was asked, save, and stop together.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from secura_lightning.errors import SecuraError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(SecuraError):
    """The run saved and stopped because it was asked to. Exit code 128 + the signal's number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Whether this run was asked to stop.

    Attributes:
        received: Number of the signal, 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; only a process's main thread may."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self.received = 0
        for signum in _SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, signum: int, frame: Any) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        # os.write: print may be in the middle of a line when a handler runs
        os.write(2, f"\n{signal.Signals(signum).name}: saving after this step (Ctrl-C stops at once)\n".encode())

    def agreed(self, trainer: Trainer) -> int:
        """The signal that any rank received, the same on all ranks; 0 for none. A collective call."""
        if trainer.world_size == 1:
            return self.received
        found = torch.tensor(self.received, device=trainer.strategy.root_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found.item())


def stop(trainer: Trainer, signum: int) -> None:
    """End the run, whose checkpoint is saved; under SLURM, put the job back into the queue first.

    Raises:
        Interrupted: Always.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        asks = signum == int(environment.requeue_signal or signal.SIGUSR1)
        if asks and trainer.is_global_zero:
            requeue()
    name = signal.Signals(signum).name
    raise Interrupted(signum, f"saved at step {trainer.global_step} after {name}; continue with --ckpt_path last")


def requeue() -> bool:
    """Ask SLURM to run this job again; whether it will."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"\d+(_\d+)?", job):
        rank_zero_warn(f"no requeue: SLURM_JOB_ID is {job!r}")
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        rank_zero_warn(f"no requeue of job {job}: {error}")
        return False
    if done.returncode:
        rank_zero_warn(f"no requeue of job {job}: {done.stderr.strip()}")
        return False
    rank_zero_info(f"job {job} is back in the queue")
    return True
