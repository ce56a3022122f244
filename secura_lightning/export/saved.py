"""Our own adapter folders: a few tensors in safetensors and their settings in JSON, read without Lightning.

::

    FOLDER/adapter.safetensors   "{module}.{tensor}" -> tensor, exactly what a checkpoint holds
    FOLDER/adapter.json          settings, seed, and which base the tensors belong to (null where unknown)

>>> model, tokenizer, adapters = from_pretrained("FOLDER")
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning._version import __version__
from secura_lightning.adapters import (
    AdapterConfig,
    AdapterSet,
    describe_adapter,
    inject,
    rebuild_adapter,
)
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling.load import BaseSpec, fingerprint, load_model, load_tokenizer

SETTINGS = "adapter.json"
TENSORS = "adapter.safetensors"
_FORMAT = 1
_FREE = ("targets", "exclude", "dropout", "class")  # settings that may differ without changing what tensors mean


def save_adapters(
    adapters: AdapterSet,
    folder: str | Path,
    spec: BaseSpec | None = None,
    base_fingerprint: str | None = None,
    seed: int = 0,
) -> None:
    """Write adapters as a folder of our own.

    Args:
        adapters: The adapters, trained.
        folder: Where to; created where missing.
        spec: The base they belong to; without it, :func:`load_adapters` alone can read the folder.
        base_fingerprint: Hash of the base's weights, see :func:`secura_lightning.modeling.load.fingerprint`.
        seed: The seed that they were injected with.
    """
    base = None if spec is None else spec.identity()
    write_adapter(Path(folder), adapters.config, adapters.state_dict(), base, base_fingerprint, seed)


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    base: dict[str, Any] | None = None,
    base_fingerprint: str | None = None,
    seed: int = 0,
) -> None:
    """Write settings and tensors; see :func:`save_adapters`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, folder / TENSORS)
    settings = {
        "format": _FORMAT,
        "version": __version__,
        "adapter": describe_adapter(config),
        "seed": seed,
        "base": base,
        "base_fingerprint": base_fingerprint,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def is_adapter_folder(path: str | Path) -> bool:
    """Whether ``path`` is such a folder."""
    return (Path(path) / SETTINGS).is_file()


def read_settings(folder: str | Path) -> dict[str, Any]:
    """``adapter.json`` of a folder.

    Raises:
        SecuraError: There is none, or it is damaged or of a newer format.
    """
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SecuraError(
            f"{folder} holds no {SETTINGS}: give a folder written by `secura export --format safetensors` or "
            "`secura import`"
        ) from None
    except (OSError, ValueError) as error:
        raise SecuraError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise SecuraError(f"{path} is not of format {_FORMAT}, the one that this version reads")
    return settings


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """``adapter.safetensors`` of a folder.

    Raises:
        SecuraError: It is missing or damaged.
    """
    path = Path(folder) / TENSORS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SecuraError(f"{path} is missing or damaged: {error}") from error


def load_adapters(model: nn.Module, folder: str | Path, strict: bool = True) -> AdapterSet:
    """Inject a folder's adapters into a model that you have.

    Args:
        model: The model; its weights must be those that the adapters were trained on.
        folder: A folder of :func:`save_adapters` or ``secura import``.
        strict: Refuse other base weights than the recorded ones; turn it off for the same base in another type.

    Raises:
        SecuraError: The folder is damaged, or its tensors do not belong to this model.
    """
    settings = read_settings(folder)
    expected = settings["base_fingerprint"]
    if strict and expected is not None and fingerprint(model) != expected:
        raise SecuraError(
            f"{folder} belongs to other base weights than this model's (or the same in another type: "
            "load_adapters(..., strict=False) accepts them)"
        )
    adapters = inject(model, rebuild_adapter(settings["adapter"]), settings["seed"])
    adapters.load_state_dict(read_tensors(folder))
    return adapters


def from_pretrained(
    folder: str | Path, base: str | None = None, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AdapterSet]:
    """The base model of an adapter folder with its adapters, in evaluation mode, and its tokenizer.

    Args:
        folder: A folder of ``secura export --format safetensors`` or ``secura import``.
        base: Folder or hub id to load instead of the recorded one.
        changes: Other fields of :class:`~secura_lightning.modeling.load.BaseSpec` to change, such as ``dtype``.

    Raises:
        SecuraError: The folder is damaged, names no base, or belongs to other base weights than those found.
    """
    settings = read_settings(folder)
    recorded = settings["base"] or {}
    if base is None and not recorded.get("base"):
        raise SecuraError(f"{folder} names no base model: give base=...")
    spec = BaseSpec(**{**recorded, **({} if base is None else {"base": base}), **changes})
    if spec.init == "random":
        torch.manual_seed(settings["seed"])
    model = load_model(spec)
    same_type = all(asdict(spec)[key] == value for key, value in recorded.items() if key != "base")
    adapters = load_adapters(model, folder, strict=same_type)
    model.config.use_cache = True
    return model.eval(), load_tokenizer(spec), adapters


def start_from(adapters: AdapterSet, folder: str | Path) -> None:
    """Give injected adapters the tensors of a folder: what ``model.start`` does.

    Raises:
        ConfigError: The folder's adapter has other settings.
        SecuraError: The folder is damaged, or its tensors do not fit.
    """
    settings = read_settings(folder)
    then, now = settings["adapter"], describe_adapter(adapters.config)
    if then["class"] != now["class"]:
        raise ConfigError(
            f"model.start: {folder} holds a {then['class']}, model.adapter.class_path is {now['class']}; "
            "use the folder's start.yaml, or copy its settings"
        )
    for key, value in then.items():
        if key not in _FREE and now.get(key) != value:
            raise ConfigError(
                f"model.start: {folder} was trained with model.adapter.{key}={value}, this configuration has "
                f"{now.get(key)}; use the same, or the numbers mean another change"
            )
    try:
        adapters.load_state_dict(read_tensors(folder))
    except SecuraError as error:
        raise SecuraError(f"model.start: {folder}: {error}") from error
