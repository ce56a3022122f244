"""The interface of a continual-learning strategy: a Lightning callback that keeps its state in ``state_dict``."""

from __future__ import annotations

from lightning.pytorch import Callback


class Strategy(Callback):
    """What a run does against forgetting, beside its adapter.

    A strategy is listed under ``trainer.callbacks``. It may define ``on_task_start`` and ``on_task_end`` (see
    :mod:`secura_lightning.callbacks.tasks`); a run without any strategy is the plain sequence, SEQ.
    """
