"""What a checkpoint was written with, against what this run is configured to do: one comparison for all resuming."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from secura_lightning.errors import SecuraError


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


def describe_optimizer(make: OptimizerCallable) -> dict[str, Any]:
    """Class and settings of the optimizer that ``make`` builds, as plain values; how it computes is no setting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    plain = (bool, int, float, str, list, tuple, type(None))
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in optimizer.defaults.items()
        if isinstance(value, plain) and key not in ("foreach", "fused", "capturable", "differentiable")
    }
    return {"class": type(optimizer).__name__, **settings}


def check_identity(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare a checkpoint's identity with this run's.

    Raises:
        SecuraError: They differ; the message names the first key that does.
    """
    parts = {
        "base": "model",
        "adapter": "model.adapter",
        "calibration": "model.calibration",
        "optimizer": "model.optimizer",
        "schedule": "model.schedule",
    }
    for part, yaml in parts.items():
        known: dict[str, Any] | None = None if part in ("optimizer", "schedule") else {}  # 0.1.0 did not keep these
        if found := first_difference(then.get(part, {}), now[part], assumed=known):
            key, before, value = found
            raise SecuraError(
                f"--ckpt_path: the checkpoint has {yaml}.{key}={before}, this configuration has {value}; resume with "
                "the configuration that wrote it"
            )
    if then["base_fingerprint"] != now["base_fingerprint"]:
        raise SecuraError(
            f"--ckpt_path: the checkpoint belongs to other base weights than model.base={now['base']['base']} "
            f"(fingerprint {then['base_fingerprint']}, here {now['base_fingerprint']})"
        )
