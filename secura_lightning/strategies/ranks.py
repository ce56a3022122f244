"""What strategies share between the processes of a run: state of each rank in one checkpoint, counts, passes in step.

Every rank of a run whose base is sharded (:class:`~secura_lightning.engine.ShardedStrategy`) must pass the model as
often as the others, forward and backward, in the same order: each block's weights are gathered from all ranks when it
is their turn. Where ranks may have different numbers of rows, or may decide differently, a strategy asks
:func:`passes` or :func:`most`; anywhere else both give back what they were given, without any communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from secura_lightning.errors import SecuraError
from secura_lightning.modeling.shard import is_sharded

T = TypeVar("T")


def gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank passed, in the order of ranks (a collective call when distributed)."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def own(ranks: list[dict[str, Any]], rank: int, world_size: int, name: str) -> dict[str, Any]:
    """This rank's part of what :func:`gather` gave.

    Raises:
        SecuraError: The checkpoint was written by another number of processes.
    """
    if len(ranks) != world_size:
        raise SecuraError(
            f"--ckpt_path: {name} has one part per process, and the checkpoint was written by {len(ranks)} of them: "
            f"resume with trainer.devices (x num_nodes) = {len(ranks)}"
        )
    return ranks[rank]


def total(trainer: Trainer, values: list[float], device: torch.device) -> Tensor:
    """The sum of each value over the ranks, on ``device``, without host sync (a collective call when distributed)."""
    counts = torch.tensor(values, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    return trainer.strategy.reduce(counts, reduce_op="sum") if trainer.world_size > 1 else counts


def most(value: float, model: nn.Module) -> float:
    """The largest ``value`` of all ranks where ``model`` is sharded (a collective call), else ``value`` itself.

    So that all ranks that pass a sharded model together decide the same.
    """
    if not is_sharded(model):
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=next(model.parameters()).device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def passes(parts: Sequence[T], spare: T, model: nn.Module) -> list[tuple[T, bool]]:
    """What this rank passes through ``model``, one after another, and whether the result counts.

    Args:
        parts: What it has to pass.
        spare: What it passes, and forgets, while other ranks still have something and the model is sharded.
        model: The model.

    Returns:
        The parts, which count, and then the spare one as often as another rank has more of them.
    """
    missing = int(most(len(parts), model)) - len(parts)
    return [(part, True) for part in parts] + [(spare, False)] * missing
