"""Learning without Forgetting, LwF (arXiv 1606.09282): on the new task's prompts, say what the old model said.

    loss += a T^2 KL(softmax(z_old / T) || softmax(z / T))

z_old are the logits of the adapters as they were when the task began, z those of the ones being trained, on the fresh
rows; nothing of the past is stored but one copy of the adapters' tensors. By default the tokens of prompts are
compared, which the task's own loss leaves free: on answers it pulls against what is to be learned (the paper's heads
are apart, a language model's are not). The mean is over the compared tokens of the whole window. It begins with the
second task.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.data.encode import IGNORED
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.base import Strategy
from secura_lightning.strategies.memory import Memory, answering

Tokens = Literal["prompt", "answer", "all"]


class LwF(Strategy):
    """LwF: distillation from the adapters of the task's start, on the task's own rows.

    Args:
        alpha: Weight a of the distillation.
        temperature: T, which softens both distributions.
        tokens: Where the two models are compared: on the tokens of the ``prompt``, of the ``answer``, or on ``all``.
    """

    order: ClassVar[int] = 30
    needs_logits: ClassVar[bool] = True
    needs_tensors: ClassVar[bool] = True

    def __init__(self, alpha: float = 1.0, temperature: float = 2.0, tokens: Tokens = "prompt") -> None:
        for key, value in (("alpha", alpha), ("temperature", temperature)):
            if value <= 0:
                raise ConfigError(f"trainer.callbacks.LwF.{key} is {value}; it must be above 0")
        self.alpha = alpha
        self.temperature = temperature
        self.tokens = tokens
        self.memory: Memory | None = None
        self._restored: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The adapters' tensors of the task's start; empty in the first task."""
        return {"previous": dict(self.memory.values) if self.memory else dict(self._restored)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the previous adapters of a checkpoint."""
        self._restored = dict(state_dict["previous"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse tasks that have nothing to compare on.

        Raises:
            ConfigError: Prompts are compared, and a task consists of text alone.
        """
        for task in trainer.datamodule.tasks[1:]:  # type: ignore[attr-defined]
            if task.is_text and self.tokens == "prompt":
                raise ConfigError(
                    f"trainer.callbacks.LwF.tokens: the text of task '{task.name}' has no prompts to compare on; set "
                    "tokens: all"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back the previous adapters of a checkpoint."""
        if self._restored:
            self.memory, self._restored = Memory(pl_module.adapters, self._restored), {}  # type: ignore[arg-type]

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Any) -> None:
        """Remember the adapters as the earlier tasks left them."""
        if index > 0:
            self.memory = Memory(pl_module.adapters)  # type: ignore[arg-type]

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        """``loss + a T^2 KL`` from the second task on."""
        if self.memory is None:
            return loss
        with answering(pl_module.model), self.memory.active():  # type: ignore[arg-type]
            old = pl_module.logits(batch)  # type: ignore[operator]
        places = compared(batch, self.tokens)
        apart = distillation(batch["logits"][:, :-1][places], old[:, :-1][places], self.temperature)
        apart = apart * (trainer.accumulate_grad_batches * trainer.world_size / self._in_window(trainer, batch_idx))
        pl_module.log_share("lwf/distillation", apart, batch_size=len(batch["rows"]))  # type: ignore[operator]
        return loss + self.alpha * apart

    def _in_window(self, trainer: Trainer, batch_idx: int) -> int:
        """Compared tokens of the whole window, over all micro-batches and ranks."""
        batches: Any = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        position = batches.plan.locate(batch_idx)
        rows = [batches.rows[position.task][i] for i in batches.window(position.task, position.step)]
        everything, answers = sum(len(row.ids) - 1 for row in rows), sum(row.n_trained for row in rows)
        return max(1, {"all": everything, "answer": answers, "prompt": everything - answers}[self.tokens])


def compared(batch: dict[str, Any], tokens: Tokens) -> Tensor:
    """Where the next token is one of those compared, ``[b, t - 1]`` of bool."""
    answer = batch["labels"][:, 1:] != IGNORED
    real = batch["attention_mask"][:, 1:].bool()
    if "position_ids" in batch:  # rows packed into lines: the first token of a row follows nothing
        real = real & (batch["position_ids"][:, 1:] > 0)
    return answer if tokens == "answer" else real if tokens == "all" else real & ~answer


def distillation(logits: Tensor, old: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(old / T) || softmax(logits / T))``, summed over tokens ``[n, v]``; a scalar in fp32."""
    now, then = (F.log_softmax(z.float() / temperature, dim=-1) for z in (logits, old))
    return temperature**2 * F.kl_div(now, then, reduction="sum", log_target=True)
