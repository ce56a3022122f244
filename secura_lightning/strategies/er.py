"""Experience replay, ER (arXiv 1811.11682, 1902.10486): train on rows of past tasks beside the fresh ones.

    loss = (1 - w) CE(fresh) + w CE(replayed)

From the second task on every window of fresh rows is joined by ``replay_ratio / (1 - replay_ratio)`` times as many rows
of earlier tasks, drawn from :class:`~secura_lightning.strategies.buffer.ReplayBuffer` and padded among themselves.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.strategies.replay import Replay, Replayed


class ER(Replay):
    """Experience replay: rows of past tasks beside the fresh ones.

    Args:
        replay_ratio: Replayed rows / (replayed + fresh rows) of a window. Where that is no whole number of rows, some
            windows hold one more than others.
        weight: Weight w of the replayed rows' loss; null: their share of the window's rows: all rows count alike.
    """

    joins = True

    def __init__(self, replay_ratio: float = 0.5, weight: float | None = None) -> None:
        super().__init__(replay_ratio, weight)

    def replay_loss(self, trainer: Trainer, pl_module: LightningModule, replayed: Replayed, weight: float) -> Tensor:
        """The weighted cross-entropy of the replayed answers."""
        return weight * self.cross_entropy(pl_module, replayed)
