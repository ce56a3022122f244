"""Find, read and rebuild checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from secura_lightning.adapters import AdapterSet, inject, rebuild_adapter
from secura_lightning.callbacks import report
from secura_lightning.callbacks.checkpoint import LAST
from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.errors import SecuraError
from secura_lightning.export.saved import is_adapter_folder, read_settings, read_tensors
from secura_lightning.modeling.load import BaseSpec, fingerprint, load_model
from secura_lightning.strategies.ilora import Weights, take_weights
from secura_lightning.study.records import versions


def find_checkpoint(wanted: str | None, run_root: Path) -> Path | None:
    """The checkpoint file that ``--ckpt_path`` means.

    Raises:
        SecuraError: There is none.
    """
    if wanted is None:
        return None
    if wanted not in ("last", "auto"):
        path = Path(wanted)
        if not path.is_file():
            raise SecuraError(f"--ckpt_path: no file {wanted}")
        read_checkpoint(path, "--ckpt_path")
        return path
    found = [path for folder in versions(run_root) if (path := folder / "checkpoints" / LAST).is_file()]
    if not found and wanted == "auto":
        return None
    if not found:
        raise SecuraError(f"--ckpt_path last: no checkpoint under {run_root}; start without --ckpt_path")
    read_checkpoint(found[-1], "--ckpt_path")
    return found[-1]


def read_checkpoint(path: Path, option: str = "--ckpt") -> dict[str, Any]:
    """Load a checkpoint's plain values and tensors.

    Args:
        path: The file.
        option: What named it, for messages.

    Raises:
        SecuraError: It is truncated, or not one of ours.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise SecuraError(f"{option}: {path} is damaged or no checkpoint ({_short(error)})") from error
    if not isinstance(checkpoint, dict) or "secura" not in checkpoint:
        raise SecuraError(f"{option}: {path} was not written by secura fit")
    return checkpoint


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


def adapter_folder_or_checkpoint(path: Path) -> Path:
    """``path``, where something is that :func:`rebuild` can read.

    Raises:
        SecuraError: There is nothing.
    """
    if path.is_dir():
        if not is_adapter_folder(path):
            hint = "; a merged folder goes to --model" if (path / "config.json").is_file() else ""
            raise SecuraError(f"--ckpt: {path} is a folder; give a .ckpt file, or a folder with adapter.json{hint}")
    elif not path.is_file():
        raise SecuraError(f"--ckpt: no file {path}")
    return path


def read_identity(path: Path) -> dict[str, Any]:
    """What a checkpoint file's or adapter folder's tensors are relative to: base, base_fingerprint, adapter, seed.

    Raises:
        SecuraError: It is missing, damaged or foreign.
    """
    if not adapter_folder_or_checkpoint(path).is_dir():
        return read_checkpoint(path)["secura"]
    settings = read_settings(path)
    if not (settings["base"] or {}).get("base"):
        raise SecuraError(f"--ckpt: {path} names no base model; import it again with `secura import --base`")
    return {**settings, "base": asdict(BaseSpec(**settings["base"]))}


def load_weights(adapters: AdapterSet, path: Path, weights: Weights | None = None) -> None:
    """Give adapters the tensors of a checkpoint file or an adapter folder: the one place that decides which.

    Args:
        adapters: The adapters, in place.
        path: The file or folder.
        weights: Memory of an I-LoRA run; None for the one that the run was judged by.

    Raises:
        SecuraError: The tensors do not fit, or that memory is not there.
    """
    if path.is_dir():
        if weights is not None:
            raise SecuraError(f"--weights {weights}: an adapter folder holds one memory alone; leave --weights out")
        adapters.load_state_dict(read_tensors(path))
        return
    checkpoint = read_checkpoint(path)
    adapters.load_state_dict(checkpoint["state_dict"])
    take_weights(adapters, checkpoint, weights)


def rebuild(path: Path, weights: Weights | None = None) -> tuple[BaseSpec, PreTrainedModel, AdapterSet]:
    """The base model with the adapters of a checkpoint file or an adapter folder, without Lightning.

    Args:
        path: The file or folder.
        weights: Memory of an I-LoRA run; None for the one that the run was judged by.

    Raises:
        SecuraError: The checkpoint is damaged, or its base model's weights have changed since.
    """
    identity = read_identity(path)
    spec = BaseSpec(**identity["base"])
    if spec.init == "random":
        torch.manual_seed(identity["seed"])
    model = load_model(spec)
    if identity["base_fingerprint"] not in (None, fingerprint(model)):
        raise SecuraError(f"--ckpt: {path} belongs to other weights than those found at model.base={spec.base}")
    adapters = inject(model, rebuild_adapter(identity["adapter"]), identity["seed"])
    load_weights(adapters, path, weights)
    return spec, model.eval(), adapters


def prompt_format_of(path: Path) -> PromptFormat:
    """How the prompts of a checkpoint's run were rendered; of an adapter folder, which does not say, the default."""
    if path.is_dir():
        return PromptFormat()
    data = read_checkpoint(path).get(SequenceDataModule.__qualname__)
    if data is None:
        return PromptFormat()
    return PromptFormat(chat=data.get("chat", False), system=data.get("system"))  # 0.1.0 knew no templates


def results_of(path: Path) -> str | None:
    """The table of the run up to this checkpoint; None where it holds no measurement."""
    if path.is_dir():
        return None
    checkpoint = read_checkpoint(path)
    rows = checkpoint.get("callbacks", {}).get(ForgettingMonitor.__qualname__, {}).get("rows")
    names = checkpoint.get(SequenceDataModule.__qualname__, {}).get("tasks")
    return report.table(report.build(rows, names, {})) if rows and names else None


def training_of(path: Path) -> dict[str, Any] | None:
    """What the configuration beside a checkpoint says of its training; None where the file was moved away from it."""
    file = path.parent.parent / "config.yaml"
    if path.is_dir() or not file.is_file():
        return None
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):  # a card without this part is better than none
        return None
    model, trainer = config.get("model") or {}, config.get("trainer") or {}
    return {
        "seed_everything": config.get("seed_everything"),
        "trainer": {key: trainer.get(key) for key in ("precision", "accumulate_grad_batches", "callbacks")},
        "model": {key: model.get(key) for key in ("optimizer", "schedule", "reset_optimizer")},
        "data": config.get("data"),
    }
