"""FSDP2 as Lightning's engine: the base model sharded, the adapters on every process, their gradients averaged.

>>> trainer.strategy: secura_lightning.engine.ShardedStrategy       (configs/overlays/fsdp.yaml)

Base weights are DTensors that :mod:`secura_lightning.modeling.shard` made; adapters are ordinary tensors. So everything
but two things is what a single process does: the gradients are averaged before the optimizer's step, as DDP does it,
and a checkpoint holds the adapters whole, written by the first process. It resumes on any number of processes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer


class ShardedStrategy(ModelParallelStrategy):
    """The base model spread over all processes by FSDP2.

    Args:
        process_group_backend: ``nccl`` or ``gloo``; null: what the devices use.
        timeout: How long a process waits for the others before it gives up.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._accumulating = False

    @property
    def mesh(self) -> DeviceMesh:
        """All processes, in one dimension."""
        return self.device_mesh["data_parallel"]

    def setup_environment(self) -> None:
        """Start the processes' group, with every process in the data-parallel dimension."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # ---------------------------------------------------------------- gradients

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Within the context gradients are added up and not averaged: the window is not complete."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the adapters' gradients over the processes at a window's end."""
        super().post_backward(closure_loss)
        if not self._accumulating:
            assert self.lightning_module is not None
            average_gradients([p for p in self.lightning_module.parameters() if p.requires_grad])

    # -------------------------------------------------------------- checkpoints
    # Lightning's versions collect sharded tensors by name; here there are none to save.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The adapters are whole as soon as the model is configured."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is that of ordinary tensors."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The adapters' tensors."""
        return ParallelStrategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the adapters' tensors on every process."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state on every process."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file, from the first process."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every process."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one collective call for each type.

    A parameter without a gradient counts as zeros, so that all processes send the same.
    """
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        group = [p for p in parameters if p.dtype == dtype]
        for parameter in group:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in group if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_([grad.view(-1) for grad in grads], list(flat.split([grad.numel() for grad in grads])))
