"""Tokens per second, model-flops utilisation and peak memory, while training.

A token costs four operations per frozen weight (forward, and backward through it) and six per trained one; attention
costs 12 x layers x width x length (arXiv 2204.02311, appendix B, which counts the masked
half too). Recomputed activations are no work of the model and do not count, nor does a forward without gradient (the
long-term memory of I-LoRA, the old model of LwF). Replayed tokens count as fresh ones do, padding does not. What
evaluations take is left out, a guard's checks too, and so is the time in which a batch is fetched; steps that a guard
lets pass are no steps.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from secura_lightning.adapters.numerics import is_linear, linear_shape
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.base import strategies_of


class Throughput(Callback):
    """Logs ``throughput/tokens_per_second``, and on a GPU ``throughput/mfu`` and ``throughput/peak_memory_gb``.

    Args:
        window: Optimizer steps that are averaged.
        peak_tflops: Operations that a device can do in a second, in 10^12, where Lightning does not know it.
    """

    def __init__(self, window: int = 20, peak_tflops: float | None = None) -> None:
        if window < 1:
            raise ConfigError(f"throughput.window is {window}; it must be at least 1")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ConfigError(f"throughput.peak_tflops is {peak_tflops}; it must be above 0")
        self.window = window
        self.peak_tflops = peak_tflops
        self._peak: float | None = None
        self._fixed = self._per_length = 0.0
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)  # seconds, tokens, operations
        self._open = (0.0, 0, 0.0)
        self._start = 0.0
        self._aside = 0.0  # seconds that strategies had spent on evaluations as the batch began
        self._beside = (0, 0)  # tokens that they had trained on

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what a token costs, and ask what the device can do."""
        model: Any = pl_module.model
        adapters: Any = pl_module.adapters
        self._fixed = token_operations(model, sum(p.numel() for p in adapters.trainable_parameters()))
        config = model.config.get_text_config()
        self._per_length = 12.0 * config.num_hidden_layers * config.hidden_size
        device = trainer.strategy.root_device
        known = get_available_flops(device, compute_type(trainer, model)) if self.peak_tflops is None else None
        self._peak = self.peak_tflops * 1e12 if self.peak_tflops is not None else known

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._aside, self._beside = _strategies(trainer)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, before other callbacks evaluate; log at every whole optimizer step."""
        aside, beside = _strategies(trainer)
        took = time.perf_counter() - self._start - (aside - self._aside)
        if any(strategy.skipping for strategy in strategies_of(trainer)):
            self._open = (0.0, 0, 0.0)
            return
        fresh = round(batch["input_ids"].numel() * batch["padding_efficiency"])
        tokens = fresh + beside[0] - self._beside[0]
        times_length = fresh * batch["input_ids"].shape[1] + beside[1] - self._beside[1]
        seconds, counted, operations = self._open
        work = tokens * self._fixed + times_length * self._per_length
        self._open = seconds + took, counted + tokens, operations + work
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._steps.append(self._open)
        self._open = (0.0, 0, 0.0)
        for name, value in self.rates(trainer.world_size).items():
            pl_module.log(f"throughput/{name}", value, batch_size=1)
        if trainer.strategy.root_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
            pl_module.log("throughput/peak_memory_gb", peak / 2**30, batch_size=1)

    def rates(self, world_size: int = 1) -> dict[str, float]:
        """Tokens per second over all ranks, as this rank sees its share, and the utilisation of a device."""
        seconds, tokens, operations = (sum(column) for column in zip(*self._steps, strict=True))
        found = {"tokens_per_second": tokens / seconds * world_size}
        if self._peak:
            found["mfu"] = operations / seconds / self._peak
        return found


def _strategies(trainer: Trainer) -> tuple[float, tuple[int, int]]:
    """What the run's strategies have spent on evaluations and trained on so far; see :class:`Strategy`."""
    found = strategies_of(trainer)
    tokens, times_length = (sum(strategy.tokens_beside[i] for strategy in found) for i in range(2))
    return sum(strategy.seconds_aside for strategy in found), (tokens, times_length)


def token_operations(model: nn.Module, trained: int) -> float:
    """Floating-point operations of one token in training, attention's own aside.

    Args:
        model: The model, with or without adapters.
        trained: Number of trained weights.
    """
    weights = {id(module): linear_shape(module) for module in model.modules() if is_linear(module)}
    return 4.0 * sum(rows * columns for rows, columns in weights.values()) + 6.0 * trained


def compute_type(trainer: Trainer, model: Any) -> torch.dtype:
    """The type that the base's products run in."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else next(iter(model.parameters())).dtype
