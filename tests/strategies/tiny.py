"""A run small enough for a unit test: a random Llama of two layers, byte tokens, no command line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from secura_lightning.adapters import AdapterConfig, LoRAConfig
from secura_lightning.callbacks.checkpoint import SequenceCheckpoint
from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.module import ContinualModule
from tests.evaluation.tiny import byte_tokenizer, tiny_llama
from tests.tiny import TinyTask

STEPS = [3, 2, 2]


@cache
def base() -> str:
    """A folder with the model and its tokenizer."""
    folder = mkdtemp(prefix="tiny-llama-")
    tiny_llama(seed=3, initializer_range=0.1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def lora(**changes: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "targets": ["q_proj", "down_proj"], **changes})


def build(
    root: Path,
    strategies: Sequence[Callback] = (),
    adapter: AdapterConfig | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    monitored: bool = False,
    **trainer: Any,
) -> tuple[Trainer, ContinualModule, SequenceDataModule]:
    """A trainer that has not begun, its module and its data."""
    seed_everything(7, verbose=False)
    module = ContinualModule(
        **{
            "base": base(),
            "adapter": adapter or lora(),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
            "seed": 7,
            **(model or {}),
        }
    )
    tasks = [TinyTask(name, rows=rows) for name, rows in (("first", 12), ("second", 8), ("third", 10))]
    settings = {"batch_size": 4, "max_length": 48, "steps_per_task": STEPS, "cache": None, **(data or {})}
    sequence = SequenceDataModule(**{"tasks": tasks[: len(settings["steps_per_task"])], "seed": 7, **settings})
    callbacks = [*strategies]
    if monitored:
        callbacks += [ForgettingMonitor(limit=2), SequenceCheckpoint(every_n_steps=2)]
    made = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": TensorBoardLogger(str(root), "run", version=0) if monitored else False,
            "default_root_dir": str(root),
            "callbacks": callbacks,
            "enable_checkpointing": monitored,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            **trainer,
        }
    )
    return made, module, sequence


def fit(root: Path, strategies: Sequence[Callback] = (), ckpt_path: str | None = None, **settings: Any) -> Trainer:
    """A finished run."""
    trainer, module, data = build(root, strategies, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The adapters' tensors."""
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}
