"""Checkpoints of a tiny Llama, written without training: what the commands that read one are tested on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secura_lightning.adapters import AdapterConfig, AdapterSet, describe_adapter, inject
from secura_lightning.modeling.load import BaseSpec, fingerprint, load_model
from tests.adapters.toy import VARIANTS, move
from tests.evaluation.tiny import byte_tokenizer, tiny_llama

IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(11))
_SIZES = {"rank": 4, "c": 8, "a": 12}  # the tiny model's smallest weight is 16 x 32


def fitting(config: AdapterConfig) -> AdapterConfig:
    """``config`` with sizes that the tiny model has room for."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return dataclasses.replace(config, **{k: v for k, v in _SIZES.items() if k in names})  # type: ignore[type-var]


EVERY = {name: fitting(config) for name, config in VARIANTS.items()}


def base_folder(folder: Path, **changes: Any) -> Path:
    """Write a tiny Llama and its tokenizer as a Hugging Face folder."""
    tiny_llama(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, config: AdapterConfig, size: float = 0.05, **spec: Any) -> tuple[PreTrainedModel, AdapterSet]:
    """The tiny model with adapters that were moved away from their start, where norms bend."""
    model = load_model(BaseSpec(base=str(base), **spec)).eval()
    adapters = inject(model, config, seed=1)
    move(adapters, size)
    return model, adapters


def checkpoint(path: Path, base: Path, config: AdapterConfig, size: float = 0.05, **spec: Any) -> Tensor:
    """Write what `fit` would, as far as other commands read it; returns the live logits of :data:`IDS`."""
    model, adapters = adapted(base, config, size, **spec)
    logits = logits_of(model)
    with adapters.disabled():
        assert (logits_of(model) - logits).abs().max() > 1e-2, "the change is too small to test anything"
    adapters.remove_()
    identity = {
        "version": "test",
        "base": BaseSpec(base=str(base), **spec).identity(),
        "base_fingerprint": fingerprint(model),
        "adapter": describe_adapter(config),
        "seed": 1,
    }
    state = adapted(base, config, size, **spec)[1].state_dict()
    torch.save({"state_dict": state, "secura": identity, "strategies": {}}, path)
    return logits


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.float()
