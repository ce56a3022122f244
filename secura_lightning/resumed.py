"""What a checkpoint was written with, against what this run is configured to do: one comparison for all resuming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def recount(checkpoint: dict[str, Any], then: int, now: int) -> None:
    """Turn a checkpoint's counts of micro-batches into this run's, in place. It was written between optimizer steps.

    Args:
        checkpoint: What Lightning is about to restore.
        then: Micro-batches of an optimizer step where it was written.
        now: Micro-batches of an optimizer step here.
    """
    if then == now:
        return
    loop = checkpoint["loops"]["fit_loop"]
    for loader in loop["state_dict"].get("combined_loader", []):
        loader["position"] = loader["position"] // then * now
    for count in ("total", "current"):
        progress = loop["epoch_loop.batch_progress"][count]
        behind = progress["ready"] - progress["completed"]  # 1 where it was written from a hook of the last batch
        for key in ("ready", "started", "processed"):
            progress[key] = progress[key] // then * now
        progress["completed"] = progress["ready"] - behind


def first_difference(
    then: Mapping[str, Any], now: Mapping[str, Any], assumed: Mapping[str, Any] | None = None
) -> tuple[str, Any, Any] | None:
    """The first setting of this run that the checkpoint has otherwise.

    Args:
        then: The checkpoint's settings.
        now: This run's; others of the checkpoint do not matter.
        assumed: What it means that the checkpoint lacks a setting, which then counts as None where it is not named;
            None: nothing, such settings agree.

    Returns:
        Its name, the checkpoint's value and this run's; None where all agree.
    """
    for key, value in now.items():
        if key not in then and assumed is None:
            continue
        before = then[key] if key in then else (assumed or {}).get(key)
        if before != value:
            return key, before, value
    return None
