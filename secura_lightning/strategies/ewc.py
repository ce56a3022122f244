"""EWC (arXiv 1612.00796), online (arXiv 1805.06370): what mattered to earlier tasks is held by a quadratic penalty.

::

    loss + (lambda / 2) sum_i F_i (theta_i - theta*_i)^2          F <- gamma F + F_task  after every task

theta are the adapter's trained tensors, theta* their values at the end of the last task; for an adapter that fuses
(SECURA) they are what fusion does not move, K_L + A B. F is the empirical Fisher information of
:mod:`secura_lightning.strategies.fisher`: per sequence, which published code often replaces by the square of batch
means, smaller by about the batch size; lambdas are not comparable between the two. ``normalize_fisher`` divides each
task's F by its mean, so that lambda does not depend on the number of tokens or on the loss's scale.

The penalty's gradient is added to the finished gradient of a window, before clipping: the same as adding the penalty to
the loss, however many micro-batches and ranks the window has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from secura_lightning.adapters import AdapterSet
from secura_lightning.data.encode import Encoded, pad_id
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import evaluating
from secura_lightning.modeling.calibrate import Calibration, TaskCalibration
from secura_lightning.seeds import derive_seed
from secura_lightning.strategies.anchored import AnchoredPenalty
from secura_lightning.strategies.fisher import empirical_fisher


class EWC(AnchoredPenalty):
    """Elastic weight consolidation on the adapter's trained tensors.

    Args:
        ewc_lambda: Strength of the penalty; with ``normalize_fisher``, useful values do not depend on the model.
        samples: Training rows of a task, drawn once, that its Fisher information is measured on.
        gamma: Factor on the earlier tasks' Fisher information at every task's end.
        normalize_fisher: Divide each task's Fisher information by its mean over all parameters.
        base_text: Text that stands for the base model's knowledge, held from the first task on; null: the first task
            is free. ``SelfCalibration``, ``TextCalibration`` or ``TaskCalibration``, as in ``model.calibration``.
        batch_size: Sequences of one backward while measuring.
    """

    def __init__(
        self,
        ewc_lambda: float = 1.0,
        samples: int = 256,
        gamma: float = 0.95,
        normalize_fisher: bool = True,
        base_text: Calibration | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(ewc_lambda)
        for key, value in (("samples", samples), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"trainer.callbacks.EWC.{key} is {value}; it must be at least 1")
        if ewc_lambda < 0:
            raise ConfigError(f"trainer.callbacks.EWC.ewc_lambda is {ewc_lambda}; it must not be negative")
        if not 0 <= gamma <= 1:
            raise ConfigError(f"trainer.callbacks.EWC.gamma is {gamma}; it must lie between 0 and 1")
        self.ewc_lambda = ewc_lambda
        self.samples = samples
        self.gamma = gamma
        self.normalize_fisher = normalize_fisher
        self.base_text = base_text
        self.batch_size = batch_size

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments by name; the base text by its own settings."""
        return {**super().settings(), "base_text": self.base_text.settings() if self.base_text else None}

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """Before the first task, measure what the base's text needs, where some is given."""
        if index > 0 or self.base_text is None:
            return
        model: Any = pl_module.model
        adapters: Any = pl_module.adapters
        if isinstance(self.base_text, TaskCalibration):
            trainer.datamodule.render(self.base_text.task)  # type: ignore[attr-defined]
        with evaluating(model), adapters.disabled():
            sequences = self.base_text.sequences(model, _tokenizer(pl_module), _seed(pl_module, "text"))
        self._consolidate(trainer, pl_module, [Encoded(ids, 0) for ids in sequences], "base text")

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Task) -> None:
        """Measure the finished task and hold the adapter where it is."""
        encoded: Any = trainer.datamodule.encoded[index]  # type: ignore[attr-defined]
        drawn = random.Random(_seed(pl_module, index)).sample(range(len(encoded)), min(self.samples, len(encoded)))
        self._consolidate(trainer, pl_module, [encoded[i] for i in sorted(drawn)], task.name)

    def _consolidate(self, trainer: Trainer, pl_module: LightningModule, rows: Sequence[Encoded], what: str) -> None:
        adapters: AdapterSet = pl_module.adapters  # type: ignore[assignment]
        disable = None if trainer.is_global_zero else True  # None: no bar where there is no terminal
        bar = tqdm(total=len(rows), desc=f"EWC: Fisher of {what}", leave=False, disable=disable, unit=" rows")
        with bar, trainer.precision_plugin.forward_context():
            now = empirical_fisher(
                pl_module.model, adapters, rows, pad_id(_tokenizer(pl_module)), self.batch_size, bar.update
            )
        if self.normalize_fisher:
            normalize(now)
        if self.weights:
            torch._foreach_mul_(list(self.weights.values()), self.gamma)
            torch._foreach_add_(list(now.values()), [self.weights[name] for name in now])
        self.hold(adapters, now)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, and now and then log its value and share."""
        self.add_gradient(trainer, pl_module, "ewc")


def normalize(fisher: dict[str, Tensor]) -> None:
    """Divide by the mean over all entries of all tensors, in place; zeros stay zeros."""
    count = sum(value.numel() for value in fisher.values())
    mean = torch.stack([value.double().sum() for value in fisher.values()]).sum() / count
    for value in fisher.values():
        value /= mean.clamp_min(torch.finfo(value.dtype).tiny).to(value.dtype)


def _tokenizer(pl_module: LightningModule) -> Any:
    return pl_module.tokenizer


def _seed(pl_module: LightningModule, part: object) -> int:
    return derive_seed(pl_module.seed, "fisher", part)
