"""Checkpoints of a sequence: a few MB each, written so that a kill at any moment leaves the last good one intact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from secura_lightning.errors import ConfigError

LAST = "last.ckpt"


class SequenceCheckpoint(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` every so many steps, and one file after every task.

    Args:
        every_n_steps: Optimizer steps between two saves of ``last.ckpt``.
        keep_tasks: Also keep ``task{k}-{name}.ckpt`` after each task, evaluated and fused.
    """

    def __init__(self, every_n_steps: int = 100, keep_tasks: bool = True) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep_tasks = keep_tasks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a step count or a task's end says so; only between whole optimizer steps."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if (batch_idx + 1) % data.plan.accumulate:
            return
        ended = data.plan.ends_task(batch_idx)
        if ended and self.keep_tasks:
            index = data.plan.locate(batch_idx).task
            self._save(trainer, f"task{index + 1}-{data.tasks[index].name}.ckpt")
        if ended or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, LAST)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing to do: ``last.ckpt`` stands at the last whole step that was saved."""

    def _save(self, trainer: Trainer, name: str) -> None:
        assert trainer.log_dir is not None
        target = Path(trainer.log_dir) / "checkpoints" / name
        beside = target.with_name(f".{name}.part")
        trainer.save_checkpoint(beside, weights_only=False)
        if trainer.is_global_zero:
            os.replace(beside, target)  # atomic: a reader sees the old file or the new one
        trainer.strategy.barrier("SequenceCheckpoint")
