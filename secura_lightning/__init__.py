"""Continual fine-tuning of causal language models without forgetting, on PyTorch Lightning.

Adapters work on any torch model, with or without Lightning::

    from secura_lightning import SECURAConfig, inject, merge

    adapters = inject(model, SECURAConfig(targets=["q_proj", "v_proj"]))
    ...  # train the parameters of adapters.trainable_parameters()
    model = merge(adapters)

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from secura_lightning._version import __version__

_EXPORTS = {
    "AdapterConfig": "secura_lightning.adapters",
    "AdapterSet": "secura_lightning.adapters",
    "CURLoRAConfig": "secura_lightning.adapters",
    "ContinualModule": "secura_lightning.module",
    "DoRAConfig": "secura_lightning.adapters",
    "FullConfig": "secura_lightning.adapters",
    "LoRAConfig": "secura_lightning.adapters",
    "LoRANullConfig": "secura_lightning.adapters",
    "MiLoRAConfig": "secura_lightning.adapters",
    "PiSSAConfig": "secura_lightning.adapters",
    "Row": "secura_lightning.data.rows",
    "SECURAConfig": "secura_lightning.adapters",
    "SequenceDataModule": "secura_lightning.data.sequence",
    "Task": "secura_lightning.data.task",
    "load_adapters": "secura_lightning.export.saved",
    "from_pretrained": "secura_lightning.export.saved",
    "save_adapters": "secura_lightning.export.saved",
    "inject": "secura_lightning.adapters",
    "merge": "secura_lightning.adapters",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'secura_lightning' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
