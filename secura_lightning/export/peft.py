"""Standard PEFT folders (``adapter_config.json``, ``adapter_model.safetensors``), written and read without peft.

Written folders load with ``PeftModel.from_pretrained(base, folder)``. Read ones become a :class:`LoRAConfig` or
:class:`DoRAConfig` and its tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secura_lightning.adapters import AdapterConfig, AdapterSet, DoRAConfig, LoRAConfig
from secura_lightning.adapters.dora import DoRALayer
from secura_lightning.adapters.numerics import is_conv1d, is_linear
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.export.lowrank import LowRank, low_rank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys of PEFT's LoraConfig that change what the tensors mean, and that nothing here computes.
_FOREIGN = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


def export_peft(
    adapters: AdapterSet,
    folder: Path,
    base: str | None,
    revision: str | None = None,
    rank: int | None = None,
    tolerance: float = 0.05,
    progress: Callable[[int], object] | None = None,
) -> dict[str, LowRank]:
    """Write adapters as a PEFT LoRA (or DoRA) folder.

    Args:
        adapters: The adapters, trained.
        folder: Where to; created where missing.
        base: What ``base_model_name_or_path`` says.
        revision: Pinned revision of ``base``.
        rank: Rank of a truncated SVD, where the change has no exact factors; None for the smallest that suffices.
        tolerance: Largest relative error of a truncated SVD, module by module.
        progress: Called with 1 after each module.

    Returns:
        What each module's change became, by name.

    Raises:
        SecuraError: A change is no LoRA, or not to that tolerance; nothing was written.
    """
    found = {}
    for name, layer in adapters.layers.items():
        found[name] = low_rank(name, layer, rank, tolerance)
        if progress is not None:
            progress(1)
    config = _peft_config(adapters, found, base, revision)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_peft_tensors(found, bool(config["lora_bias"])), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return found


def _peft_config(
    adapters: AdapterSet, found: dict[str, LowRank], base: str | None, revision: str | None
) -> dict[str, Any]:
    layers = adapters.layers
    rslora = bool(getattr(adapters.config, "rslora", False)) and all(part.trained for part in found.values())
    alphas = {name: _alpha(part, rslora) for name, part in found.items()}
    ranks = {name: part.rank for name, part in found.items()}
    rank, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(getattr(adapters.config, "dropout", 0.0)),
        "target_modules": _targets(adapters.model, set(layers)),
        "rank_pattern": _pattern({name: r for name, r in ranks.items() if r != rank}),
        "alpha_pattern": _pattern({name: a for name, a in alphas.items() if a != alpha}),
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "bias": "none",
        "lora_bias": any(part.bias is not None for part in found.values()),
        "use_rslora": rslora,
        "use_dora": any(isinstance(layer, DoRALayer) for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(part: LowRank, rslora: bool) -> float:
    alpha = part.scale * (math.sqrt(part.rank) if rslora else part.rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _commonest(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)


def _pattern(values: dict[str, Any]) -> dict[str, Any]:
    """Values by regular expressions that match whole names; longest first, because peft takes the first that fits."""
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}


def _targets(model: nn.Module, names: set[str]) -> list[str]:
    """``target_modules``: last parts of the names where these say the same, else whole names."""
    last = {name.split(".")[-1] for name in names}
    meant = {
        name
        for name, module in model.named_modules()
        if name.split(".")[-1] in last and (name in names or is_linear(module))
    }
    return sorted(last if meant == names else names)


def _peft_tensors(found: dict[str, LowRank], with_bias: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, part in found.items():
        key = f"{_PREFIX}{name}."
        tensors[f"{key}lora_A.weight"] = part.right
        tensors[f"{key}lora_B.weight"] = part.left
        if with_bias:  # peft scales the bias with the change
            zero = part.left.new_zeros(part.left.shape[0])
            tensors[f"{key}lora_B.bias"] = zero if part.bias is None else part.bias / part.scale
        if part.magnitude is not None:
            tensors[f"{key}lora_magnitude_vector"] = part.magnitude
    # safetensors stores no two names on one memory: several modules may share R
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def read_peft(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], str | None]:
    """A PEFT LoRA or DoRA folder as settings and tensors of our own.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The settings; the tensors by ``"{module}.{tensor}"``; the base that the folder names.

    Raises:
        SecuraError: The folder is no LoRA, is damaged, or uses a part of PEFT that has no counterpart here.
    """
    config = _read_config(folder)
    try:
        raw = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SecuraError(f"{folder / WEIGHTS} is missing or damaged ({error}); only safetensors are read") from error
    dora = bool(config.get("use_dora"))
    tensors = _own_tensors(raw, dora, folder)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    rslora, bias = bool(config.get("use_rslora")), bool(config.get("lora_bias"))
    rank, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    per_target: dict[str, dict[str, int | float]] = {}
    for module in modules:
        r = tensors[f"{module}.lora_A"].shape[0]
        a = float(_by_pattern(config.get("alpha_pattern"), module, alpha))
        differs: dict[str, int | float] = {"rank": r} if r != rank else {}
        if a != alpha:
            differs["alpha"] = a
        if differs:
            per_target[module] = differs
        if bias:
            scale = a / (math.sqrt(r) if rslora else r)
            tensors[f"{module}.bias_change"] = scale * tensors[f"{module}.bias_change"]
    cls = DoRAConfig if dora else LoRAConfig
    shared: dict[str, Any] = {"rank": rank, "alpha": alpha, "rslora": rslora, "bias": bias}
    shared |= {"dropout": float(config.get("lora_dropout") or 0.0), "per_target": per_target or None}
    try:
        settings = cls(targets=_own_targets(config, modules), **shared)
    except ConfigError as error:
        raise SecuraError(f"{folder / CONFIG}: {error}") from error
    return settings, tensors, config.get("base_model_name_or_path")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SecuraError(f"{folder} holds no {CONFIG}: give the folder of a PEFT adapter") from None
    except (OSError, ValueError) as error:
        raise SecuraError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise SecuraError(f"{path}: peft_type is {kind}; only LORA (with or without use_dora) can be imported")
    for key in _FOREIGN:
        if config.get(key):
            raise SecuraError(f"{path} sets {key}, which has no counterpart here; merge that adapter with peft instead")
    if config.get("bias", "none") != "none":
        raise SecuraError(
            f"{path} sets bias: {config['bias']}, which trains biases in place; only none can be imported"
        )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise SecuraError(
            f"{path} sets init_lora_weights: {start}, which changes the base's weights too; save it with peft's "
            "path_initial_model_for_weight_conversion first"
        )
    return config


def _own_tensors(raw: dict[str, Tensor], dora: bool, folder: Path) -> dict[str, Tensor]:
    own = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_B.bias": "bias_change"}
    own |= {"lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"} if dora else {}
    found: dict[str, Tensor] = {}
    for key, value in raw.items():
        name = key.removeprefix(_PREFIX)
        ending = next((end for end in own if name.endswith(f".{end}")), None)
        if ending is None:
            raise SecuraError(f"{folder / WEIGHTS} holds {key}, which is no part of a LoRA on linear layers")
        if not value.is_floating_point() or value.dim() != (2 if ending.endswith(("A.weight", "B.weight")) else 1):
            raise SecuraError(f"{folder / WEIGHTS}: {key} has shape {tuple(value.shape)}; only linear layers are read")
        wide = value if value.dtype == torch.float64 else value.float()
        found[f"{name.removesuffix('.' + ending)}.{own[ending]}"] = wide
    for name in found:
        module, _, tensor = name.rpartition(".")
        other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(tensor)
        if dora and f"{module}.magnitude" not in found:
            raise SecuraError(f"{folder / WEIGHTS} holds no lora_magnitude_vector of {module}, though use_dora is set")
        if other is not None and f"{module}.{other}" not in found:
            raise SecuraError(f"{folder / WEIGHTS} holds {tensor} of {module} without its {other}")
    if not found:
        raise SecuraError(f"{folder / WEIGHTS} holds no tensor")
    return found


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: float) -> float:
    """peft's rule: the first regular expression that matches the end of the name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _own_targets(config: dict[str, Any], modules: list[str]) -> list[str]:
    """Short names where PEFT's own list has them and says nothing else, else the whole name of every module."""
    wanted = config.get("target_modules")
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    if isinstance(wanted, list) and not narrowed:
        return sorted(wanted)
    return modules
