"""What the tests do to a run while it runs."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from secura_lightning.adapters.numerics import gathered


class SameEverywhere(Callback):
    """After every optimizer step all ranks hold the same adapters, bit for bit."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        digest = hashlib.sha256()
        for key, value in sorted(pl_module.state_dict().items()):
            whole = gathered(value.detach()).cpu().reshape(-1).contiguous()
            digest.update(key.encode() + whole.view(torch.uint8).numpy().tobytes())
        found: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(found, digest.hexdigest())
        assert len(set(found)) == 1, f"adapters differ at step {trainer.global_step}"


class Signal(Callback):
    """Send this process a signal in the middle of a step."""

    def __init__(self, step: int, name: str, rank: int = 0) -> None:
        self.step = step
        self.signum = signal.Signals[name]
        self.rank = rank

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)


class Poison(Callback):
    """Make one parameter's gradient, and where asked the loss, not finite at some steps."""

    def __init__(self, steps: list[int], loss: bool = True) -> None:
        self.steps = steps
        self.loss = loss

    def _now(self, trainer: Trainer) -> bool:
        return trainer.global_step + 1 in self.steps

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self.loss and self._now(trainer):
            loss.data.fill_(float("nan"))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._now(trainer):
            next(p for p in pl_module.parameters() if p.requires_grad).grad.view(-1)[0] = float("inf")  # type: ignore
