"""L2-SP (arXiv 1802.01483): the adapter is pulled back to where it started.

::

    loss + (alpha / 2) sum_i (theta_i - theta*_i)^2

theta are the adapter's trained tensors, or what fusion does not move (SECURA: K_L + A B, in which its change is linear;
so is CURLoRA's in U, and LoRA-Null v2's in B). Where the change is a product of two trained factors, both factors are
held, and so is each factor's scale. theta* is their value before the first task, where the model is the base, or at the
start of the current task.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from secura_lightning.adapters import AdapterSet
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.anchored import AnchoredPenalty


class L2SP(AnchoredPenalty):
    """A quadratic penalty on the way from the start.

    Args:
        alpha: Strength of the penalty.
        start: What is held: the ``base`` model, or the adapter as the current ``task`` found it.
    """

    def __init__(self, alpha: float = 0.01, start: Literal["base", "task"] = "base") -> None:
        super().__init__(alpha)
        if alpha < 0:
            raise ConfigError(f"trainer.callbacks.L2SP.alpha is {alpha}; it must be at least 0")
        if start not in ("base", "task"):
            raise ConfigError(f"trainer.callbacks.L2SP.start is {start!r}; choose base or task")
        self.alpha = alpha
        self.start = start

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """Hold the adapter where it is now."""
        if index == 0 or self.start == "task":
            adapters: AdapterSet = pl_module.adapters  # type: ignore[assignment]
            self.hold(adapters, {name: torch.ones_like(value.detach()) for name, value in adapters.anchors().items()})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, and now and then log its value and share."""
        self.add_gradient(trainer, pl_module, "l2sp")
