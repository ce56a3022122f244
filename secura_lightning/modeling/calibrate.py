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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.adapters import AdapterLayer, AdapterSet, describe_adapter
from secura_lightning.data.encode import Encoded, encode_rows, encode_texts, pad_id
from secura_lightning.data.read import documents, read_text
from secura_lightning.data.task import Task
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.batching import context_length, evaluating
from secura_lightning.modeling.gram import count_steps, stream_grams
from secura_lightning.modeling.sample import sample
from secura_lightning.modeling.shard import is_sharded
from secura_lightning.seeds import derive_seed

_FORMAT = 1  # of the cache: raise it when the same settings come to mean another start
CACHE = "~/.cache/secura_lightning/calibration"


class Calibration(ABC):
    """Where calibration text comes from: choose one with ``model.calibration.class_path``."""

    samples: int
    max_length: int
    batch_size: int
    cache: str | None

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


@dataclass(kw_only=True)
class SizedCalibration(Calibration):
    """How much text, which all sources share."""

    samples: int = 256
    """Number of sequences."""
    max_length: int = 256
    """Most tokens of a sequence."""
    batch_size: int = 16
    """Sequences that run together."""
    cache: str | None = CACHE
    """Folder that keeps the adapters' starts for the next run; null keeps nothing."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range.
        """
        for key, least in (("samples", 1), ("max_length", 2), ("batch_size", 1)):
            value = getattr(self, key)
            if value < least:
                raise ConfigError(f"model.calibration.{key} is {value}: it must be at least {least}")


@dataclass(kw_only=True)
class SelfCalibration(SizedCalibration):
    """Text that the base model itself says, from a bare prompt: no data needed, and all that it can speak of."""

    temperature: float = 1.0
    """Of the sampling; 1 gives the model's own distribution."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"model.calibration.temperature is {self.temperature}: it must be above 0")

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


@dataclass
class TextCalibration(SizedCalibration):
    """Windows of a text file."""

    path: str
    """A UTF-8 text file; `<|endoftext|>` or else blank lines separate documents."""

    def sequences(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
        """Windows drawn from all documents."""
        encoded = encode_texts(tokenizer, self._documents())
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


@dataclass
class TaskCalibration(SizedCalibration):
    """Training rows of a task: prompts with their answers, or documents."""

    task: Task
    """The task, such as questions on what the base model knows."""

    def sequences(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
        """Encoded rows, drawn from the training split."""
        length = self.length(model)
        rows = _draw(self.task.rows("train"), self.samples, seed)
        if self.task.is_text:
            return [ids[:length] for ids in encode_texts(tokenizer, [row.answer for row in rows])]
        return [list(row.ids) for row in encode_rows(tokenizer, rows, length, self.task.prompt_format)]

    def settings(self) -> dict[str, Any]:
        """Plain values that decide the text."""
        return {**super().settings(), "task": self.task.name}

    def digest(self) -> str:
        """A hash of the rows."""
        form = repr(self.task.prompt_format)
        return _digest([form, *(row.prompt + self.task.separator + row.answer for row in self.task.rows("train"))])


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
    if all(layer.calibrated for layer in adapters.layers.values()):
        return
    if _leads(adapters):
        _take_starts(adapters, tokenizer, calibration, base, seed)
    _share(adapters)


def accumulate(
    adapters: AdapterSet,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    name: str,
    calibration: Calibration,
    seed: int = 0,
) -> None:
    """Show a finished task's inputs to adapters that accumulate; nothing for others.

    The inputs are those of the model as it is now, with the adapters' change: what the layers read when they answer the
    task, and what the next tasks must not answer otherwise. When distributed, as :func:`calibrate`.

    Args:
        adapters: Adapters in their model, after the task was frozen.
        tokenizer: The model's tokenizer.
        rows: The task's training rows, as it was trained on them.
        name: The task's name, for the progress bar.
        calibration: How many rows are drawn, and how many run together.
        seed: Seed of the draw.

    Raises:
        SecuraError: The model cannot be run block by block.
    """
    if not adapters.config.accumulates:
        return
    if _leads(adapters):
        sequences = [[int(token) for token in row.ids] for row in _draw(rows, calibration.samples, seed)]
        model: Any = adapters.model
        with evaluating(model):
            _measure(adapters.layers, model, tokenizer, sequences, calibration.batch_size, f"{name}: measuring")
    _share(adapters)


def _take_starts(
    adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase, calibration: Calibration, base: str, seed: int
) -> None:
    """From the cache, or by measuring."""
    # Ranks may have caches of their own, and a rank that found its start there would leave the others waiting.
    file = None if is_sharded(adapters.model) else _cache_file(adapters, calibration, base, seed)
    if file is not None and _load(adapters, file):
        return
    model: Any = adapters.model
    waiting = {name: layer for name, layer in adapters.layers.items() if not layer.calibrated}
    with evaluating(model), adapters.disabled():
        sequences = calibration.sequences(model, tokenizer, seed)
        _measure(waiting, model, tokenizer, sequences, calibration.batch_size, "calibration: measuring")
    if file is not None:
        _save(adapters, file)


def _measure(
    layers: Mapping[str, AdapterLayer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[list[int]],
    batch_size: int,
    title: str,
) -> None:
    """Hand every layer the moments of its input over these token ids, under a progress bar."""

    def take(names: list[str], gram: Tensor) -> None:
        first, *others = (layers[name] for name in names)
        first.calibrate(gram, others)

    steps = count_steps(model, dict(layers), len(sequences), batch_size)
    with tqdm(total=steps, desc=title, leave=False, disable=None) as bar:
        stream_grams(
            model,
            dict(layers),
            sequences,
            take,
            batch_size,
            pad_id(tokenizer),
            bar.update,
        )


def _leads(adapters: AdapterSet) -> bool:
    """Whether this rank measures: the first does, or all where the forward of a sharded model needs all of them."""
    return not _distributed() or dist.get_rank() == 0 or is_sharded(adapters.model)


def _share(adapters: AdapterSet) -> None:
    """Give every rank the first one's state."""
    if not _distributed():
        return
    shapes: list[Any] = [{key: value.shape for key, value in adapters.state_dict().items()}]
    dist.broadcast_object_list(shapes, src=0)
    adapters.resize(shapes[0])
    device = adapters.trainable_parameters()[0].device
    for value in adapters.state_dict().values():
        sent = value.to(device)  # NCCL sends what is on a GPU, and some state is kept on the CPU
        dist.broadcast(sent, src=0)
        if sent is not value:
            value.copy_(sent)
    for layer in adapters.layers.values():
        layer.refresh()


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
