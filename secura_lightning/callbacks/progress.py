"""A progress bar that names the task."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class SequenceProgressBar(TQDMProgressBar):
    """Lightning's bar over the whole sequence, with the current task in front."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the task's number and name where Lightning writes the epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        task = data.plan.locate(batch_idx).task
        self.train_progress_bar.set_description(f"Task {task + 1}/{len(data.tasks)} {data.tasks[task].name}")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Everything logged for the bar, without the run's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
