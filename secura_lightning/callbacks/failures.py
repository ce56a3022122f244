"""What stops a long run, said so that it can be mended: a loss that is no number, memory that ran out, a lost rank.

Checked once per optimizer step, on the gradient after it was averaged over the ranks: what is not finite on one of them
is not finite on any, so all ranks decide the same without asking.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from secura_lightning.errors import ConfigError, SecuraError

_SHOWN = 8  # row ids in a message


class FailureGuard(Callback):
    """Stops, or skips the step, when a loss or gradient is not finite.

    Args:
        on_nonfinite: ``stop`` the run, or ``skip`` the step: no weight and no moment of the optimizer changes.
        max_skipped: Steps that may be skipped before the run stops after all.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"] = "stop", max_skipped: int = 100) -> None:
        if max_skipped < 1:
            raise ConfigError(f"failures.max_skipped is {max_skipped}; it must be at least 1")
        self.on_nonfinite = on_nonfinite
        self.max_skipped = max_skipped
        self.skipped = 0
        self._window: list[tuple[Tensor, dict[str, Any]]] = []  # loss and batch of each micro-batch of this step
        self._batch: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember whose loss comes next."""
        self._batch = {"rows": batch["rows"], "task": batch["task"]}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss on its device: looking at it would make the device wait."""
        self._window.append((loss.detach(), self._batch))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradient, once.

        Raises:
            SecuraError: It is not finite, and steps are not (or no longer) skipped.
        """
        window, self._window = self._window, []
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or _finite([p.grad for p in parameters if p.grad is not None]):
            return
        found = self._blame(trainer, window)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not found:
            return  # the loss scale was too high: fp16's scaler skips the step and lowers it
        message = self._message(trainer, found)
        if self.on_nonfinite == "stop" or self.skipped >= self.max_skipped:
            raise SecuraError(message)
        self.skipped += 1
        for parameter in parameters:
            parameter.grad = None  # an optimizer leaves such a parameter and its moments alone
        rank_zero_warn(f"{message} [skipped: {self.skipped}]")
        pl_module.log("train/skipped_steps", float(self.skipped), batch_size=1)

    def _blame(self, trainer: Trainer, window: list[tuple[Tensor, dict[str, Any]]]) -> list[str]:
        """Ids of the rows, on any rank, in micro-batches whose own loss is not finite."""
        mine = [row for loss, batch in window if not bool(loss.isfinite()) for row in _ids(trainer, batch)]
        if trainer.world_size == 1:
            return mine
        ranks: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(ranks, mine)
        return [row for rows in ranks for row in rows]

    def _message(self, trainer: Trainer, rows: list[str]) -> str:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        index = self._batch["task"]
        shown = ", ".join(rows[:_SHOWN]) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        what = f"the loss is not finite on rows {shown}" if rows else "the loss is finite but its gradient is not"
        return (
            f"step {trainer.global_step}, task '{data.tasks[index].name}': {what}; lower the learning rate, set "
            "trainer.gradient_clip_val: 1.0, look at these rows, or skip such steps with failures.on_nonfinite: skip"
        )


def _finite(grads: list[Tensor]) -> bool:
    return bool(torch.stack([norm.float() for norm in torch._foreach_norm(grads)]).isfinite().all())


def _ids(trainer: Trainer, batch: dict[str, Any]) -> list[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    task = data.tasks[batch["task"]]
    if task.is_text or getattr(data, "streaming", False):  # rows were cut into blocks, or are not in memory
        return [f"number {i}" for i in batch["rows"]]
    rows = task.rows("train")
    return [str(rows[i].id) for i in batch["rows"]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def memory_advice(trainer: Trainer, module: Any, data: Any) -> str:
    """What to lower, given what is set."""
    rows = data.batch_size
    parts = []
    if rows > 1:
        more = trainer.accumulate_grad_batches * 2
        parts.append(f"data.batch_size {rows // 2} with trainer.accumulate_grad_batches {more} (the same steps)")
    if not module.activation_checkpointing:
        parts.append("model.activation_checkpointing true")
    if module.chunked_loss is False:
        parts.append("model.chunked_loss true")
    if module.spec.quantization == "none":
        half = module.spec.dtype in ("float32", "float64")
        parts += ["model.dtype bfloat16"] if half else ["model.quantization nf4"]
    parts.append(f"data.max_length below {data.max_length}")
    parts.append("a smaller forgetting.batch_size if it was an evaluation")
    return f"out of memory at step {trainer.global_step}: set {', or '.join(parts)}; `secura plan` estimates what fits"


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective call failed because another process is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
