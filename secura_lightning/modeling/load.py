"""Base models and tokenizers: the embedded ``pocket``, a local folder or a hub id, all through one path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secura_lightning.errors import ConfigError, SecuraError

POCKET = "pocket"
Init = Literal["pretrained", "random"]
StorageType = Literal["float32", "bfloat16", "float16", "float64"]
ComputeType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "fp4", "int8"]
_SAMPLES = 64  # values of each tensor that enter the fingerprint


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """Which base model to load, and how.

    Attributes:
        base: ``pocket``, a local folder in Hugging Face layout, or a hub id.
        revision: Commit hash or tag of a hub id; pin it, or results change when the repository does.
        init: ``pretrained`` loads weights; ``random`` builds the model from its config alone (for pretraining).
        dtype: Storage type of the base weights.
        quantization: 4-bit or 8-bit storage through bitsandbytes.
        double_quant: Quantise the 4-bit scales too.
        compute_dtype: Type that quantised weights are multiplied in.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; null lets transformers choose.
        trust_remote_code: Run code from the model's repository. Off unless you turn it on.
    """

    base: str = POCKET
    revision: str | None = None
    init: Init = "pretrained"
    dtype: StorageType = "float32"
    quantization: Quantization = "none"
    double_quant: bool = True
    compute_dtype: ComputeType = "bfloat16"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def identity(self) -> dict[str, Any]:
        """The part that decides which function the base computes; a checkpoint of another identity is refused."""
        kept = asdict(self)
        for key in ("attn_implementation", "trust_remote_code"):
            del kept[key]
        return kept


def stored_in(spec: BaseSpec, precision: str) -> BaseSpec:
    """``spec`` with the base stored in the type that a true precision of the trainer names; else as it is."""
    types: dict[str, StorageType] = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
    return replace(spec, dtype=types[precision]) if precision in types else spec


def resolve(base: str) -> str:
    """The folder of ``pocket`` or of a local model; a hub id comes back as it is.

    Raises:
        SecuraError: ``base`` looks like a path, and no model is there.
    """
    if base == POCKET:
        return str(files("secura_lightning") / "data" / "pocket" / "model")
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SecuraError(
                f"model.base: folder {base} holds no config.json; give a model folder in Hugging Face layout"
            )
        return str(path)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise SecuraError(
            f"model.base: no folder {base}; give 'pocket', an existing folder, or a hub id like Qwen/Qwen2-1.5B"
        )
    return base


def load_tokenizer(spec: BaseSpec) -> PreTrainedTokenizerBase:
    """The base model's own tokenizer.

    Raises:
        SecuraError: It cannot be found or read.
    """
    where = resolve(spec.base)
    try:
        return AutoTokenizer.from_pretrained(
            where, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise SecuraError(f"model.base: cannot load the tokenizer of {spec.base}: {_first_line(error)}") from error


def load_config(spec: BaseSpec) -> PreTrainedConfig:
    """The base model's configuration alone.

    Raises:
        SecuraError: It cannot be found or read.
    """
    try:
        return AutoConfig.from_pretrained(
            resolve(spec.base), revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise SecuraError(f"model.base: cannot load {spec.base}: {_first_line(error)}") from error


def load_model(spec: BaseSpec) -> PreTrainedModel:
    """The base model in training mode, with the KV cache off, from safetensors weights only.

    Raises:
        SecuraError: The folder or hub id cannot be read, or holds no safetensors weights.
        ConfigError: The requested quantisation does not fit with the other keys.
    """
    where = resolve(spec.base)
    dtype = getattr(torch, spec.dtype)
    shared: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "dtype": dtype}
    if spec.attn_implementation is not None:
        shared["attn_implementation"] = spec.attn_implementation
    try:
        if spec.init == "random":
            if spec.quantization != "none":
                raise ConfigError("model.init: random weights cannot be quantised; set model.quantization: none")
            model = AutoModelForCausalLM.from_config(load_config(spec), **shared)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                where,
                revision=spec.revision or "main",
                use_safetensors=True,
                quantization_config=_quantization_config(spec),
                **shared,
            )
    except (OSError, ValueError, ImportError) as error:
        raise SecuraError(f"model.base: cannot load {spec.base}: {_first_line(error)}") from error
    model.config.use_cache = False
    return model.train()  # from_pretrained returns eval mode, in which dropout and checkpointing never run


def _quantization_config(spec: BaseSpec) -> Any:
    if spec.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype),
    )


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of a model's weights: names, shapes, types and evenly spaced values of every tensor.

    It reads 64 values a tensor, so that it takes a moment on any size, and tells apart models that differ in training.
    """
    return combine_prints({name: tensor_print(name, tensor) for name, tensor in model.state_dict().items()})


def tensor_print(name: str, tensor: torch.Tensor) -> bytes:
    """One tensor's part of the :func:`fingerprint`."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    picked = flat[::step][:_SAMPLES].to(device="cpu", dtype=torch.float64)
    return f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + picked.numpy().tobytes()


def combine_prints(prints: Mapping[str, bytes]) -> str:
    """The :func:`fingerprint` of tensors that were read one by one, by name."""
    digest = hashlib.sha256()
    for _, part in sorted(prints.items()):
        digest.update(part)
    return digest.hexdigest()[:16]


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep only each block's input for backward, and compute the block again there.

    Raises:
        ConfigError: The architecture cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"model.activation_checkpointing: {type(model).__name__} does not support it; set it to false"
        ) from error


def blocks_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The repeated blocks of a model by name: the members of its longest list of modules, counted in parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    if not lists:
        return {}
    name, longest = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(longest)}


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each block on its first call; sequences of any length share one compilation."""
    for block in blocks_of(model).values():
        block.compile(dynamic=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
