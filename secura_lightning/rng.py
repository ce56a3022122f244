"""Random state of every rank, as plain values that load under ``weights_only``."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def capture() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators on every rank (a collective call when distributed)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    mine = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if not (dist.is_available() and dist.is_initialized()):
        return {"ranks": [mine]}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {"ranks": ranks}


def restore(state: dict[str, Any], rank: int) -> None:
    """Put back what :func:`capture` took for ``rank``; a rank or a GPU that did not exist then keeps its own state."""
    if rank >= len(state["ranks"]):
        return
    mine = state["ranks"][rank]
    torch.set_rng_state(mine["torch"].cpu())
    version, internal, gauss = mine["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = mine["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    if mine["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(mine["cuda"][: torch.cuda.device_count()])
