"""FSDP2 as Lightning's engine: the base model sharded, the adapters on every process, their gradients averaged.

>>> trainer.strategy: secura_lightning.engine.ShardedStrategy       (configs/overlays/fsdp.yaml)

Base weights are DTensors that :mod:`secura_lightning.modeling.shard` made; adapters are ordinary tensors. So everything
but two things is what a single process does: the gradients are averaged before the optimizer's step, as DDP does it,
and a checkpoint holds the adapters whole, written by the first process. It resumes on any number of processes.
Full fine-tuning trains DTensors, whose gradients FSDP2 itself averages; for a checkpoint they are gathered one by one.
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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from secura_lightning.adapters.numerics import gathered, spread_like
from secura_lightning.errors import ConfigError


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
            trained = [p for p in self.lightning_module.parameters() if p.requires_grad]
            average_gradients([p for p in trained if not isinstance(p, DTensor)])

    # -------------------------------------------------------------- checkpoints
    # Lightning's versions name the optimizer's state after parameters; these write what every other run writes.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The adapters are there as soon as the model is configured."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's state over, as in any other run."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The adapters' tensors, whole; of those that are sharded, on the first process alone. A collective call."""
        return self._collect(ParallelStrategy.lightning_module_state_dict(self))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the adapters' tensors on every process."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state, whole; where it is sharded, on the first process alone. A collective call."""
        return self._collect(ParallelStrategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state on every process, each its share of what belongs to a sharded tensor."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, state in saved["state"].items():
                like = parameters[index]
                saved["state"][index] = {k: spread_like(v, like) if _shaped(v, like) else v for k, v in state.items()}
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file, from the first process."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every process."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _collect(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` with its sharded tensors whole in the CPU's memory of the first process, and empty elsewhere."""

        def gather(tensor: DTensor) -> Tensor:
            whole = gathered(tensor)
            return whole.cpu() if self.is_global_zero else torch.empty(0, dtype=tensor.dtype)

        return tree_map_only(DTensor, gather, state)


def _shaped(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


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


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose kernels know no sharded tensors.

    Raises:
        ConfigError: It is one of bitsandbytes.
    """
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise ConfigError(
            f"model.optimizer: {type(optimizer).__name__} of bitsandbytes cannot train sharded weights: use "
            "torch.optim.AdamW, or trainer.strategy: ddp"
        )
