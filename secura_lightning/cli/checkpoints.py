"""Find, read and rebuild checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secura_lightning.adapters import AdapterSet, inject, rebuild_adapter
from secura_lightning.callbacks.checkpoint import LAST
from secura_lightning.errors import SecuraError
from secura_lightning.modeling.load import BaseSpec, fingerprint, load_model


def find_checkpoint(wanted: str | None, run_root: Path) -> Path | None:
    """The checkpoint file that ``--ckpt_path`` means.

    Raises:
        SecuraError: There is none.
    """
    if wanted is None:
        return None
    if wanted != "last":
        path = Path(wanted)
        if not path.is_file():
            raise SecuraError(f"--ckpt_path: no file {wanted}")
        read_checkpoint(path)
        return path
    found = [path for path in run_root.glob(f"version_*/checkpoints/{LAST}") if path.is_file()]
    if not found:
        raise SecuraError(f"--ckpt_path last: no checkpoint under {run_root}; start without --ckpt_path")
    newest = max(found, key=lambda path: int(path.parent.parent.name.removeprefix("version_")))
    read_checkpoint(newest)
    return newest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint's plain values and tensors.

    Raises:
        SecuraError: It is truncated, or not one of ours.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise SecuraError(f"--ckpt_path: {path} is damaged or no checkpoint ({_short(error)})") from error
    if not isinstance(checkpoint, dict) or "secura" not in checkpoint:
        raise SecuraError(f"--ckpt_path: {path} was not written by secura fit")
    return checkpoint


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


def rebuild(path: Path) -> tuple[BaseSpec, PreTrainedModel, AdapterSet]:
    """The base model with the checkpoint's adapters, without Lightning.

    Raises:
        SecuraError: The checkpoint is damaged, or its base model's weights have changed since.
    """
    checkpoint = read_checkpoint(path)
    identity = checkpoint["secura"]
    spec = BaseSpec(**identity["base"])
    if spec.init == "random":
        torch.manual_seed(identity["seed"])
    model = load_model(spec)
    if fingerprint(model) != identity["base_fingerprint"]:
        raise SecuraError(f"--ckpt: {path} belongs to other weights than those found at model.base={spec.base}")
    adapters = inject(model, rebuild_adapter(identity["adapter"]), identity["seed"])
    adapters.load_state_dict(checkpoint["state_dict"])
    return spec, model.eval(), adapters
