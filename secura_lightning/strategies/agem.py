"""A-GEM (arXiv 1812.00420): no step may raise the loss of the past, to first order.

    g <- g - min(0, g . r) / (r . r) r

g is the gradient of the optimizer step, complete: summed over its micro-batches, averaged over the processes, with
what other strategies added. r is the gradient of the mean cross-entropy of rows drawn from
:class:`~secura_lightning.strategies.buffer.ReplayBuffer`, by every process from its own shard, over all of them
together. It begins with the second task and acts before clipping.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from secura_lightning.errors import ConfigError
from secura_lightning.strategies.ranks import passes, total
from secura_lightning.strategies.replay import Drawing


class AGEM(Drawing):
    """A-GEM: takes from every gradient the part that works against the rows of past tasks.

    Args:
        reference_rows: Rows of the reference gradient, drawn by every process at every step; null: as many as a
            micro-batch holds.
    """

    order: ClassVar[int] = 90
    needs_tensors: ClassVar[bool] = True

    def __init__(self, reference_rows: int | None = None) -> None:
        if reference_rows is not None and reference_rows < 1:
            raise ConfigError(f"trainer.callbacks.AGEM.reference_rows is {reference_rows}; it must be at least 1")
        self.reference_rows = reference_rows

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Project the gradient, from the second task on."""
        task, _ = trainer.datamodule.plan.locate_step(trainer.global_step)  # type: ignore[attr-defined]
        parameters: list[nn.Parameter] = pl_module.adapters.trainable_parameters()  # type: ignore[union-attr, operator]
        if task == 0 or all(parameter.grad is None for parameter in parameters):  # None: a strategy lets steps pass
            return
        reference = self._reference(trainer, pl_module, task, parameters)
        if reference is None:
            return
        cosine = project_(parameters, reference)
        logged = {"agem/cosine": cosine, "agem/projected": (cosine < 0).to(cosine.dtype)}
        pl_module.log_dict(logged, batch_size=1)

    def _reference(
        self, trainer: Trainer, pl_module: LightningModule, task: int, parameters: list[nn.Parameter]
    ) -> list[Tensor] | None:
        """The gradient of the buffer's rows, by parameter; None where no row of an earlier task is held."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = self.buffer.draw(self.reference_rows or data.batch_size, task, self._generator)
        if not rows and trainer.world_size == 1:
            return None
        trained = total(trainer, [float(sum(row.n_trained for row in rows))], pl_module.device).clamp_min(1)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        parts = [rows[start : start + data.batch_size] for start in range(0, len(rows), data.batch_size)]
        for part, counts in passes(parts, [self.stand_in()], pl_module.model):  # type: ignore[arg-type]
            batch = self.collate(part, pl_module.device)
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                loss = pl_module.answer_loss(batch) / trained.to(torch.float32).squeeze()  # type: ignore[operator]
            # grad and not backward: DDP, which waits for .grad, hears nothing of this.
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            if not counts:
                continue
            self.count(part)
            pairs = [(own, new) for own, new in zip(gradients, found, strict=True) if new is not None]
            torch._foreach_add_([own for own, _ in pairs], [new for _, new in pairs])
        if trainer.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = trainer.strategy.reduce(flat, reduce_op="sum")
            parts = flat.split([gradient.numel() for gradient in gradients])
            gradients = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        return gradients


@torch.no_grad()
def project_(parameters: list[nn.Parameter], reference: list[Tensor]) -> Tensor:
    """Take from the parameters' gradients what opposes ``reference``, in place.

    Returns:
        The cosine between the two before, a scalar.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    along = torch.stack([product.sum() for product in torch._foreach_mul(gradients, reference)]).sum()
    norms = torch.stack(torch._foreach_norm(reference)).square().sum()
    own = torch.stack(torch._foreach_norm(gradients)).square().sum()
    tiny = torch.finfo(norms.dtype).tiny
    torch._foreach_sub_(gradients, torch._foreach_mul(reference, along.clamp_max(0) / norms.clamp_min(tiny)))
    return along / (norms * own).sqrt().clamp_min(tiny)
