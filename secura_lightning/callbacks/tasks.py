"""Task boundaries as hooks.

Lightning sees one long epoch; these two callbacks turn positions in it into hooks that any callback may define:

    on_task_start(trainer, pl_module, index, task)   before the task's first batch, and before on_train_batch_start
    on_task_end(trainer, pl_module, index, task)     after the task's last optimizer step, before a checkpoint is saved

Order at a task's end: strategies, then the module (adapters fuse), then everything else (evaluation), then checkpoints.
While a strategy lets steps pass, adapters do nothing after them: what it holds stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from secura_lightning.strategies.base import Strategy, strategies_of


class TaskStart(Callback):
    """Announces a task before its first batch. It stands first among the callbacks."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the front, so that no other callback sees a batch of a task that has not begun, with the strategies
        in their order behind it."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        ranks = {id(strategy): place for place, strategy in enumerate(strategies_of(trainer), start=1)}
        ranks[id(self)] = 0
        callbacks.sort(key=lambda callback: ranks.get(id(callback), len(ranks)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Dispatch ``on_task_start`` where a task begins; a resumed run is past it and does not repeat it."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.plan.starts_task(batch_idx):
            index = data.plan.locate(batch_idx).task
            pl_module.on_task_start(index)  # type: ignore[operator]
            _dispatch("on_task_start", trainer, pl_module, index, trainer.callbacks)  # type: ignore[attr-defined]


class TaskEnd(Callback):
    """Announces a finished task, after every other callback has seen its last batch and before checkpoints."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the module of every whole optimizer step that was taken, and everyone of a finished task."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        strategies = strategies_of(trainer)
        if (batch_idx + 1) % data.plan.accumulate == 0 and not any(strategy.skipping for strategy in strategies):
            pl_module.on_step_end()  # type: ignore[operator]
        if not data.plan.ends_task(batch_idx):
            return
        index = data.plan.locate(batch_idx).task
        callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
        _dispatch("on_task_end", trainer, pl_module, index, strategies)
        pl_module.on_task_end(index)  # type: ignore[operator]
        _dispatch("on_task_end", trainer, pl_module, index, [c for c in callbacks if not isinstance(c, Strategy)])


def _dispatch(hook: str, trainer: Trainer, module: LightningModule, index: int, callbacks: Sequence[Callback]) -> None:
    task = trainer.datamodule.tasks[index]  # type: ignore[attr-defined]
    for callback in callbacks:
        method = getattr(callback, hook, None)
        if method is not None:
            method(trainer, module, index, task)
