"""Checkpoints of a sequence: a few MB each, written so that a kill at any moment leaves the last good one intact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from secura_lightning.callbacks.signals import StopRequest, stop
from secura_lightning.errors import ConfigError, SecuraError

LAST = "last.ckpt"


class SequenceCheckpoint(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` every so many steps, and one file after every task.

    It also saves and ends the run when it is asked to: Ctrl-C, SIGTERM, SIGUSR1 (see
    :mod:`secura_lightning.callbacks.signals`).

    Args:
        every_n_steps: Optimizer steps between two saves of ``last.ckpt``.
        keep_tasks: Also keep ``task{k}-{name}.ckpt`` after each task, evaluated and fused.
    """

    def __init__(self, every_n_steps: int = 100, keep_tasks: bool = True) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep_tasks = keep_tasks
        self._request = StopRequest()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals; only now, because Lightning takes them when a fit begins."""
        self._request.install()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        self._request.restore()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a step count, a task's end or a signal says so; only between whole optimizer steps."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if (batch_idx + 1) % data.plan.accumulate:
            return
        ended = data.plan.ends_task(batch_idx)
        asked = self._request.agreed(trainer)
        if ended and self.keep_tasks:
            index = data.plan.locate(batch_idx).task
            name = quote(data.tasks[index].name, safe=" ")  # a task may be called what it likes
            self._save(trainer, f"task{index + 1}-{name}.ckpt")
        if asked or ended or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, LAST)
        if asked:
            stop(trainer, asked)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more; ``last.ckpt`` stands at the last whole step that was saved."""
        self._request.restore()

    def _save(self, trainer: Trainer, name: str) -> None:
        assert trainer.log_dir is not None
        target = Path(trainer.log_dir) / "checkpoints" / name
        beside = target.with_name(f".{name}.part")
        try:
            trainer.save_checkpoint(beside, weights_only=False)
            if trainer.is_global_zero:
                os.replace(beside, target)  # atomic: a reader sees the old file or the new one
        except (OSError, RuntimeError) as error:
            if not _is_write_error(error):
                raise
            beside.unlink(missing_ok=True)
            last = target.with_name(LAST)
            kept = f"{last} is whole; make room and continue with --ckpt_path last" if last.exists() else "make room"
            raise SecuraError(f"checkpoint: cannot write {target} ({_reason(error)}); {kept}") from error
        trainer.strategy.barrier("SequenceCheckpoint")


def _is_write_error(error: Exception) -> bool:
    """Whether a file could not be written; torch says so with a RuntimeError."""
    return isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or "file write failed" in str(error)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
