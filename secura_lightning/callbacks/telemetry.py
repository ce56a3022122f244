"""How far the adapters have moved, and how they are held, as curves.

    telemetry/relative_change/{q10,median,q90,max}    ||dW|| / ||W0|| over the adapted modules
    telemetry/restraint                               S-MagNorm's mean divisor M (1: nothing is limited)
    telemetry/null_leakage                            LoRA-Null: share of the calibration inputs that A lets through
    telemetry/slow_fast_distance                      I-LoRA: ||working - long-term|| / ||working||

every so many steps, and at each task's end: there of what the task left, after a fusion and its like. What a strategy's
loss is made of (``ewc/share``, ``train/replay_loss``) it logs itself.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning.adapters import AdapterSet
from secura_lightning.callbacks import tensorboard
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.base import strategies_of

_QUANTILES = {"q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}


class Telemetry(Callback):
    """Logs what the adapters tell about themselves.

    Args:
        every_n_steps: Optimizer steps between two measurements, which cost about as much as a forward of the adapters'
            weights; null for task ends alone.
    """

    def __init__(self, every_n_steps: int | None = 100) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"telemetry.every_n_steps is {every_n_steps}; it must be at least 1 (or null)")
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every so many whole optimizer steps. A task's last step is measured when the task has ended."""
        plan: Any = trainer.datamodule.plan  # type: ignore[attr-defined]
        if self.every_n_steps is None or (batch_idx + 1) % plan.accumulate or plan.ends_task(batch_idx):
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """Measure what the task left."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapters: AdapterSet = pl_module.adapters  # type: ignore[assignment]
        values = measure(adapters)  # on every process: reading a sharded base weight needs them all
        if not trainer.is_global_zero:
            return
        for strategy in strategies_of(trainer):
            values |= strategy.telemetry()
        names = list(values)
        numbers = torch.stack([values[name].float() for name in names]).tolist()  # the one wait for the device
        scalars = {f"telemetry/{name}": number for name, number in zip(names, numbers, strict=True)}
        tensorboard.log_scalars(trainer.loggers, scalars, trainer.global_step)


@torch.no_grad()
def measure(adapters: AdapterSet) -> dict[str, Tensor]:
    """Quantiles over the modules of ``relative_change``, and means of whatever else they tell."""
    told = [layer.telemetry() for layer in adapters.layers.values()]
    device = told[0]["relative_change"].device
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for record in told for key in record):
        column = torch.stack([record[key].to(device) for record in told if key in record])
        if key == "relative_change":
            found |= {f"{key}/{name}": column.quantile(share) for name, share in _QUANTILES.items()}
        else:
            found[key] = column.mean()
    return found
