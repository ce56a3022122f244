"""The interface of a continual-learning strategy: a Lightning callback that keeps its state in ``state_dict``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Strategy(Callback):
    """What a run does against forgetting, beside its adapter.

    A strategy is listed under ``trainer.callbacks``; several compose, acting in ascending :attr:`order` whatever their
    order in the list. It may define ``on_task_start`` and ``on_task_end`` (see :mod:`secura_lightning.callbacks.tasks`)
    and any hook of Lightning. A run without any strategy is the plain sequence, SEQ.
    """

    order: ClassVar[int] = 50
    """Place among the strategies of a run: losses that add rows first (10), penalties next (50), what changes the
    final gradient or weights last (90)."""

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        """Change the loss of one micro-batch before its backward; unchanged by default.

        Args:
            trainer: The trainer.
            pl_module: The module.
            loss: Scalar; the fresh rows' loss as shaped by the strategies before this one. Its gradient, averaged over
                the micro-batches of a window and over the ranks, is the window's.
            batch: The fresh micro-batch.
            batch_idx: Its position in the sequence.
        """
        return loss

    def evaluating(self, pl_module: LightningModule) -> AbstractContextManager[Any]:
        """A context in which the model answers as this strategy wants it to be judged; as it is by default."""
        return nullcontext()


def strategies_of(trainer: Trainer) -> list[Strategy]:
    """The strategies of a run, in the order in which they act."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, Strategy)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda strategy: strategy.order)
