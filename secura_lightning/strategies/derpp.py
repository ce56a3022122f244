"""DER++ (arXiv 2004.07211): replayed rows must get their answers right, and as the model once gave them.

    loss = (1 - w) CE(fresh) + w CE(replayed) + a MSE(z_now, z_then)

z_then are the k largest logits of every answer token, kept with a row when it enters the buffer: those of the model
right after the optimizer step that trained on the row, without dropout. z_now are the logits of the same tokens now.
The authors draw rows for the two replay terms apart, with all logits of a classifier; here both terms share rows,
which halves their cost, and top-k stands for a vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.data.encode import IGNORED, Encoded, collate
from secura_lightning.errors import ConfigError
from secura_lightning.modeling.loss import summed_cross_entropy
from secura_lightning.strategies.memory import answering
from secura_lightning.strategies.ranks import passes
from secura_lightning.strategies.replay import Replay, Replayed


class DERPP(Replay):
    """DER++: replay that also holds the logits which the model gave when it learned a row.

    Args:
        replay_ratio: Replayed rows / (replayed + fresh rows) of a window. Where that is no whole number of rows, some
            windows hold one more than others.
        weight: Weight w of the replayed rows' cross-entropy; null: their share of the window's rows.
        alpha: Weight a of the mean squared difference of logits.
        top_k: Logits kept per answer token, of which each takes 8 bytes.
    """

    def __init__(
        self, replay_ratio: float = 0.5, weight: float | None = None, alpha: float = 0.1, top_k: int = 32
    ) -> None:
        super().__init__(replay_ratio, weight)
        if alpha <= 0:
            raise ConfigError(f"trainer.callbacks.DERPP.alpha is {alpha}; it must be above 0 (without it, use ER)")
        if top_k < 1:
            raise ConfigError(f"trainer.callbacks.DERPP.top_k is {top_k}; it must be at least 1")
        self.alpha = alpha
        self.top_k = top_k

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the buffer keep the model's answers."""
        super().setup(trainer, pl_module, stage)
        self.buffer.annotate = lambda rows: self._answers(trainer, pl_module, rows)

    def replay_loss(self, trainer: Trainer, pl_module: LightningModule, replayed: Replayed, weight: float) -> Tensor:
        """``w CE + a MSE`` of one micro-batch's replayed rows."""
        logits: Tensor = pl_module.logits(replayed.batch)  # type: ignore[operator]
        loss = summed_cross_entropy(logits, replayed.batch["labels"]) / replayed.trained
        then = torch.cat([row.logits for row in replayed.rows if row.logits is not None]).to(logits.device)
        tokens = torch.cat([row.tokens for row in replayed.rows if row.tokens is not None]).to(logits.device)
        now = _answer_logits(logits, replayed.batch["labels"]).gather(1, tokens)  # [n, k]
        apart = (now.float() - then).square().mean(-1).sum() / replayed.trained
        pl_module.log_share("train/replay_loss", loss, batch_size=len(replayed.rows))  # type: ignore[operator]
        pl_module.log_share("derpp/logits", apart, batch_size=len(replayed.rows))  # type: ignore[operator]
        return weight * loss + self.alpha * apart

    def _answers(
        self, trainer: Trainer, pl_module: LightningModule, rows: list[Encoded]
    ) -> list[tuple[Tensor, Tensor]]:
        """The k largest logits of every answer token, and whose they are; both ``[n, k]`` on the CPU, for every row."""
        found: list[tuple[Tensor, Tensor]] = []
        model: Any = pl_module.model
        size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        spare: list[Encoded] = [self.stand_in()]
        turns = passes(parts, spare, model)
        if not turns:
            return found
        with answering(model), trainer.precision_plugin.forward_context():
            for part, counts in turns:
                batch = {name: value.to(pl_module.device) for name, value in collate(part, self._pad).items()}
                logits = _answer_logits(pl_module.logits(batch), batch["labels"])  # type: ignore[operator]
                values, tokens = logits.float().topk(min(self.top_k, logits.shape[-1]), dim=-1)
                if not counts:
                    continue
                sizes = [row.n_trained for row in part]
                found += zip(values.cpu().split(sizes), tokens.cpu().split(sizes), strict=True)
        return found


def _answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits that predict trained tokens, row after row: ``[b, t, v]`` -> ``[n, v]``."""
    return logits[:, :-1][labels[:, 1:] != IGNORED]
