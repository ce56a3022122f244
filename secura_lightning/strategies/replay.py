"""What ER, I-LoRA and DER++ share: past rows drawn for every window of fresh ones, and a weighted loss over both.

    loss = (1 - w) CE(fresh) + w CE(replayed) + what the strategy adds

Every mean is over the trained tokens of the whole window (all micro-batches, all ranks), so that splitting a window
changes nothing. Replay starts with the second task. Draws come from a generator of the strategy's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.data.encode import collate, pad_id
from secura_lightning.errors import ConfigError
from secura_lightning.seeds import derive_seed
from secura_lightning.strategies.base import Strategy
from secura_lightning.strategies.buffer import ReplayBuffer, Sample
from secura_lightning.strategies.ranks import gather, most, own, total


@dataclass(slots=True)
class Replayed:
    """The replayed rows of one micro-batch.

    Attributes:
        rows: The rows.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[b, t]`` on the module's device.
        trained: Trained tokens of the replayed rows of the whole window, as a divisor that makes the sum over a window
            and all ranks a mean: gradients are averaged over micro-batches and ranks. A scalar; infinite for rows that
            stand in for none.
        tokens: The same of all tokens, prompts included.
        loss: Their summed cross-entropy, a scalar, where they passed the model together with the fresh rows.
    """

    rows: list[Sample]
    batch: dict[str, Tensor]
    trained: Tensor
    tokens: Tensor
    loss: Tensor | None = None


class Drawing(Strategy, ABC):
    """A strategy that draws from the run's :class:`ReplayBuffer`, with a generator of its own on every rank."""

    requires: ClassVar[tuple[type[Strategy], ...]] = (ReplayBuffer,)

    buffer: ReplayBuffer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the buffer, and seed this rank's draws."""
        found = [callback for callback in trainer.callbacks if isinstance(callback, ReplayBuffer)]  # type: ignore[attr-defined]
        self.buffer = found[0]
        self._rank, self._world = trainer.global_rank, trainer.world_size
        name = type(self).__name__
        self._generator = torch.Generator().manual_seed(derive_seed(pl_module.seed, name, self._rank))
        self._pad = pad_id(pl_module.tokenizer)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The state of every rank's draws; a collective call when distributed."""
        return {"ranks": gather({"generator": self._generator.get_state()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue this rank's draws."""
        mine = own(state_dict["ranks"], self._rank, self._world, type(self).__name__)
        self._generator.set_state(mine["generator"].cpu())

    def collate(self, rows: list[Sample], device: torch.device) -> dict[str, Tensor]:
        """``rows`` as a batch on ``device``, padded among themselves."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in collate(rows, self._pad).items()}

    def stand_in(self) -> Sample:
        """A short row that a rank without any passes where all ranks must, and that counts for nothing."""
        ids, kept = np.full(2, self._pad, dtype=np.int32), torch.zeros(1, 1)
        return Sample(ids, 1, logits=kept, tokens=kept.long())

    def count(self, rows: list[Sample]) -> None:
        """Note that ``rows`` were trained on, as one batch."""
        lengths = [len(row.ids) for row in rows]
        tokens, times_length = self.tokens_beside
        self.tokens_beside = tokens + sum(lengths), times_length + sum(lengths) * max(lengths)


class Replay(Drawing):
    """A strategy that trains on rows of past tasks beside the fresh ones.

    Args:
        replay_ratio: Replayed rows / (replayed + fresh rows) of a window. Where that is no whole number of rows, some
            windows hold one more than others.
        weight: Weight w of the replayed rows' loss; null: their share of the window's rows: all rows count alike.
    """

    order: ClassVar[int] = 10
    joins: bool = False
    """Whether one forward of fresh and replayed rows gives it all that it needs."""
    role: ClassVar[str | None] = "replay rows of the buffer beside the fresh ones"

    def __init__(self, replay_ratio: float = 0.5, weight: float | None = None) -> None:
        for key, value in (("replay_ratio", replay_ratio), ("weight", weight)):
            if value is not None and not 0 < value < 1:
                raise ConfigError(
                    f"trainer.callbacks.{type(self).__name__}.{key} is {value}; it must lie between 0 and 1"
                )
        self.replay_ratio = replay_ratio
        self.weight = weight
        self._window: list[list[Sample]] = []  # replayed rows of the micro-batches that are left of this window
        self._drawn = 0  # replayed rows of the whole window
        self._trained = self._tokens = torch.ones(())
        self._now: tuple[Replayed | None, float] | None = None  # this micro-batch's rows, and their loss's weight

    def rows_beside(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> dict[str, Tensor] | None:
        """Draw, from the second task on; the rows, where they may pass with the fresh ones."""
        self._now = None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        position = data.plan.locate(batch_idx)
        if position.task == 0:
            return None
        fresh = len(batch["rows"]) * data.plan.accumulate
        if position.micro == 0:
            self._drawn = rows_of_step(position.step, fresh * self._share)
            self._draw_window(trainer, pl_module, position.task, self._drawn)
        if not self._window:
            return None
        rows = self._window.pop(0)
        weight = self._drawn / (self._drawn + fresh) if self.weight is None else self.weight
        if not rows:
            self._now = None, weight
            return None
        replayed = Replayed(rows, self.collate(rows, pl_module.device), self._trained, self._tokens)
        self._now = replayed, weight
        if rows[0].task >= 0:  # and no stand-in
            self.count(rows)
        return replayed.batch if self.joins else None

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        """``(1 - w) loss`` and what the replayed rows add, from the second task on."""
        if self._now is None:
            return loss
        (replayed, weight), self._now = self._now, None
        loss = (1 - weight) * loss
        if replayed is None:
            return loss
        replayed.loss = batch.get("beside_loss")
        return loss + self.replay_loss(trainer, pl_module, replayed, weight)

    @abstractmethod
    def replay_loss(self, trainer: Trainer, pl_module: LightningModule, replayed: Replayed, weight: float) -> Tensor:
        """What one micro-batch's replayed rows add to the loss, a scalar, given the weight of their cross-entropy."""

    def cross_entropy(self, pl_module: LightningModule, replayed: Replayed) -> Tensor:
        """The mean cross-entropy of the replayed rows' answers, logged as ``train/replay_loss``."""
        total = pl_module.answer_loss(replayed.batch) if replayed.loss is None else replayed.loss  # type: ignore[operator]
        loss = total / replayed.trained
        pl_module.log_share("train/replay_loss", loss, batch_size=len(replayed.rows))  # type: ignore[operator]
        return loss

    @property
    def _share(self) -> float:
        return self.replay_ratio / (1 - self.replay_ratio)

    def _draw_window(self, trainer: Trainer, pl_module: LightningModule, task: int, number: int) -> None:
        """Draw the rows of a whole window at its start, because its token count divides every micro-batch's loss."""
        accumulate = trainer.accumulate_grad_batches
        self._window = []
        if number == 0:
            return
        rows = self.buffer.draw(number, task, self._generator)
        counts = [float(sum(row.n_trained for row in rows)), float(sum(len(row.ids) for row in rows))]
        counted = total(trainer, counts, pl_module.device).clamp_min(1) / (accumulate * trainer.world_size)
        if most(len(rows), pl_module.model) and not rows:  # type: ignore[arg-type]
            rows, counted = [self.stand_in()] * number, torch.full_like(counted, torch.inf)
        if not rows and trainer.world_size == 1:
            return
        self._trained, self._tokens = counted.to(torch.float32).unbind()
        self._window = [rows[i::accumulate] for i in range(accumulate)]


def rows_of_step(step: int, per_step: float) -> int:
    """How many rows step number ``step`` replays: the first n steps together replay ``per_step * n``, rounded down."""
    slack = 1e-9  # 8 * 0.2 / 0.8 is a little below 2
    return int((step + 1) * per_step + slack) - int(step * per_step + slack)
