"""State that differs between the processes of a run, in the one checkpoint that rank 0 writes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from secura_lightning.errors import SecuraError


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
