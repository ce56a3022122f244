"""Calibration: text that stands for what the base model must keep, and the start that adapters take from it.

>>> adapters = inject(model, LoRANullConfig(), seed=0)
>>> calibrate(adapters, tokenizer, SelfCalibration(samples=256), base=fingerprint(model), seed=0)

The text is a file, the training rows of a task, or what the base model itself says. Never use evaluation text: a probe
on it would measure the calibration, not the knowledge. What adapters took is kept on disk under a fingerprint of base,
adapter, text and settings, and taken from there the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.adapters import AdapterSet, describe_adapter
from secura_lightning.data.encode import encode_row, encode_text, pad_id
from secura_lightning.data.read import documents, read_text
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.batching import context_length, evaluating
from secura_lightning.modeling.gram import count_steps, stream_grams
from secura_lightning.modeling.sample import sample
from secura_lightning.seeds import derive_seed

_FORMAT = 1  # of the cache: raise it when the same settings come to mean another start
CACHE = "~/.cache/secura_lightning/calibration"


class Calibration(ABC):
    """Where calibration text comes from, and how much of it.

    Args:
        samples: Number of sequences.
        max_length: Most tokens of a sequence.
        batch_size: Sequences that run together.
        cache: Folder that keeps the adapters' starts for the next run; null keeps nothing.
    """

    def __init__(
        self, samples: int = 256, max_length: int = 256, batch_size: int = 16, cache: str | None = CACHE
    ) -> None:
        self.samples = samples
        self.max_length = max_length
        self.batch_size = batch_size
        self.cache = cache
        for key, least in (("samples", 1), ("max_length", 2), ("batch_size", 1)):
            value = getattr(self, key)
            if value < least:
                raise ConfigError(f"model.calibration.{key} is {value}: it must be at least {least}")

    @abstractmethod
    def sequences(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
        """Token ids of the calibration text, at most ``samples`` sequences.

        Args:
            model: The base model, in evaluation mode and without gradients.
            tokenizer: Its tokenizer.
            seed: Seed of whatever is drawn.

        Raises:
            SecuraError: There is no text.
        """

    def settings(self) -> dict[str, Any]:
        """Plain values that decide, together with base, seed and :meth:`digest`, what :meth:`sequences` gives."""
        return {"class": type(self).__name__, "samples": self.samples, "max_length": self.max_length}

    def digest(self) -> str:
        """A hash of the text that sequences are taken from; empty where the model says it."""
        return ""

    def length(self, model: PreTrainedModel) -> int:
        """Most tokens of a sequence that the model has room for."""
        return min(self.max_length, context_length(model) or self.max_length)


class SelfCalibration(Calibration):
    """Text that the base model itself says, from a bare prompt: no data needed, and all that it can speak of.

    Args:
        samples: Number of sequences.
        max_length: Most tokens of a sequence.
        temperature: Of the sampling; 1 gives the model's own distribution.
        batch_size: Sequences that run together.
        cache: Folder that keeps the adapters' starts for the next run; null keeps nothing.
    """

    def __init__(
        self,
        samples: int = 256,
        max_length: int = 256,
        temperature: float = 1.0,
        batch_size: int = 16,
        cache: str | None = CACHE,
    ) -> None:
        super().__init__(samples, max_length, batch_size, cache)
        self.temperature = temperature
        if temperature <= 0:
            raise ConfigError(f"model.calibration.temperature is {temperature}: it must be above 0")

    def sequences(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
        """Samples of the model."""
        with tqdm(total=self.samples, desc="calibration: sampling", leave=False, disable=None) as bar:
            return sample(
                model,
                tokenizer,
                self.samples,
                self.length(model),
                self.temperature,
                seed=derive_seed(seed, "calibration"),
                batch_size=self.batch_size,
                progress=bar.update,
            )

    def settings(self) -> dict[str, Any]:
        """Plain values that decide the text; the batch size too, because sequences of a batch share the draws."""
        return {**super().settings(), "temperature": self.temperature, "batch_size": self.batch_size}


class TextCalibration(Calibration):
    """Windows of a text file.

    Args:
        path: A UTF-8 text file; ``<|endoftext|>`` or else blank lines separate documents.
        samples: Number of windows.
        max_length: Most tokens of a window.
        batch_size: Windows that run together.
        cache: Folder that keeps the adapters' starts for the next run; null keeps nothing.
    """

    def __init__(
        self,
        path: str,
        samples: int = 256,
        max_length: int = 256,
        batch_size: int = 16,
        cache: str | None = CACHE,
    ) -> None:
        super().__init__(samples, max_length, batch_size, cache)
        self.path = path

    def sequences(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
        """Windows drawn from all documents."""
        encoded = [encode_text(tokenizer, text) for text in self._documents()]
        length = self.length(model)
        windows = [ids[start : start + length] for ids in encoded for start in range(0, len(ids), length)]
        return _draw(windows, self.samples, seed)

    def digest(self) -> str:
        """A hash of the documents."""
        return _digest(self._documents())

    def _documents(self) -> list[str]:
        try:
            found = documents(read_text(self.path))
        except SecuraError as error:
            raise SecuraError(f"model.calibration: {error}") from error
        if not found:
            raise SecuraError(f"model.calibration: {self.path} holds no text")
        return found


class TaskCalibration(Calibration):
    """Training rows of a task: prompts with their answers, or documents.

    Args:
        task: The task, such as questions on what the base model knows.
        samples: Number of rows.
        max_length: Most tokens of a row.
        batch_size: Rows that run together.
        cache: Folder that keeps the adapters' starts for the next run; null keeps nothing.
    """

    def __init__(
        self,
        task: Task,
        samples: int = 256,
        max_length: int = 256,
        batch_size: int = 16,
        cache: str | None = CACHE,
    ) -> None:
        super().__init__(samples, max_length, batch_size, cache)
        self.task = task

    def sequences(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
        """Encoded rows, drawn from the training split."""
        length = self.length(model)
        rows = _draw(self.task.rows("train"), self.samples, seed)
        if self.task.is_text:
            return [encode_text(tokenizer, row.answer)[:length] for row in rows]
        return [list(encode_row(tokenizer, row, length, self.task.separator).ids) for row in rows]

    def settings(self) -> dict[str, Any]:
        """Plain values that decide the text."""
        return {**super().settings(), "task": self.task.name}

    def digest(self) -> str:
        """A hash of the rows."""
        return _digest([row.prompt + self.task.separator + row.answer for row in self.task.rows("train")])


def calibrate(
    adapters: AdapterSet,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    base: str = "",
    seed: int = 0,
) -> None:
    """Give every layer that waits for calibration its start; layers that have one, as after a load, are left alone.

    When distributed, the first rank measures and the others receive its starts (a collective call).

    Args:
        adapters: Adapters in their model, before any training.
        tokenizer: The model's tokenizer.
        calibration: The text.
        base: Fingerprint of the base model, for the cache; empty keeps nothing.
        seed: Seed of whatever is drawn.

    Raises:
        SecuraError: There is no text, or the model cannot be run block by block.
    """
    waiting = {name: layer for name, layer in adapters.layers.items() if not layer.calibrated}
    if not waiting:
        return
    if not _distributed() or dist.get_rank() == 0:
        _take_starts(adapters, tokenizer, calibration, base, seed)
    if _distributed():
        for value in adapters.state_dict().values():
            dist.broadcast(value, src=0)
        for layer in waiting.values():
            layer.refresh()


def _take_starts(
    adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, base: str, seed: int
) -> None:
    """From the cache, or by measuring."""
    file = _cache_file(adapters, calibration, base, seed)
    if file is not None and _load(adapters, file):
        return
    model: Any = adapters.model
    waiting = {name: layer for name, layer in adapters.layers.items() if not layer.calibrated}
    with evaluating(model), adapters.disabled():
        sequences = calibration.sequences(model, tokenizer, seed)
        total = count_steps(model, dict(waiting), len(sequences), calibration.batch_size)
        with tqdm(total=total, desc="calibration: measuring", leave=False, disable=None) as bar:
            stream_grams(
                model,
                dict(waiting),
                sequences,
                lambda name, gram: waiting[name].calibrate(gram),
                calibration.batch_size,
                pad_id(tokenizer),
                bar.update,
            )
    if file is not None:
        _save(adapters, file)


def _cache_file(adapters: AdapterSet, calibration: Calibration, base: str, seed: int) -> Path | None:
    if calibration.cache is None or not base:
        return None
    decides = {
        "format": _FORMAT,
        "base": base,
        "adapter": describe_adapter(adapters.config),
        "calibration": calibration.settings(),
        "text": calibration.digest(),
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]
    return Path(calibration.cache).expanduser() / f"{key}.safetensors"


def _load(adapters: AdapterSet, file: Path) -> bool:
    """Whether the cache had the starts; a file that is damaged or does not fit is measured again."""
    if not file.is_file():
        return False
    try:
        adapters.load_state_dict(load_file(file))
    except (SafetensorError, SecuraError, OSError):
        return False
    return True


def _save(adapters: AdapterSet, file: Path) -> None:
    """Through a temporary file, so that no other process reads half of it."""
    tensors: dict[str, Tensor] = {key: value.cpu().contiguous().clone() for key, value in adapters.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, name)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _draw(items: Sequence[Any], number: int, seed: int) -> list[Any]:
    order = list(range(len(items)))
    random.Random(derive_seed(seed, "calibration")).shuffle(order)
    return [items[i] for i in sorted(order[:number])]


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} ".encode() + text.encode())
    return digest.hexdigest()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
