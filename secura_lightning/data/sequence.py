"""A sequence of tasks served as one run: the LightningDataModule that ``secura fit`` trains on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from secura_lightning.data.batches import ResumableLoader, SequenceBatches, SequencePlan
from secura_lightning.data.encode import pad_id
from secura_lightning.data.probe import Probe
from secura_lightning.data.prompt import Chat, PromptFormat
from secura_lightning.data.rows import Row
from secura_lightning.data.store import EncodedRows
from secura_lightning.data.stream import stream_rows
from secura_lightning.data.task import Task
from secura_lightning.data.tokenise import CACHE, Tokeniser
from secura_lightning.errors import ConfigError
from secura_lightning.resumed import first_difference


class SequenceDataModule(LightningDataModule):
    """Tasks one after another, each for its own number of optimizer steps.

    Args:
        tasks: The tasks in the order in which they are learned.
        probe: What the base model knows; scored beside the tasks to measure what is forgotten.
        batch_size: Rows per device and micro-batch.
        max_length: Most tokens of a training row; longer prompts lose tokens on the left.
        chat: Whether prompts of tasks and probe go through the tokenizer's chat template, in training and evaluation
            alike. ``auto``: where the tokenizer has one; some base models' do (give false for these).
        system: System message of the chat template; null for the template's own.
        epochs_per_task: Passes over a task's rows (rounded up to whole optimizer steps), one number or one per task.
        steps_per_task: Optimizer steps of a task, instead of ``epochs_per_task``; one number or one per task.
        num_workers: DataLoader workers.
        group_by_length: Put rows of similar length into the same batch: less padding, and every row still once a pass,
            but batches are less mixed.
        packing: Put a batch's rows behind one another into fewer lines: the same rows, loss and steps without most of
            the padding. Refused where the model would let packed rows see each other.
        cache: Folder that keeps the token ids of tasks of 10 000 rows and more; null keeps nothing.
        num_proc: Processes that tokenise.
        streaming: For data larger than memory: training rows are read one by one, and their token ids are mapped from
            ``cache``.
        seed: Seed of the order of rows.
        pin_memory: Batches wait in page-locked memory, from which a GPU copies faster; null: where there is a GPU.
    """

    def __init__(
        self,
        tasks: list[Task],
        probe: Probe | None = None,
        batch_size: int = 16,
        max_length: int = 512,
        chat: Chat = "auto",
        system: str | None = None,
        epochs_per_task: float | list[float] | None = None,
        steps_per_task: int | list[int] | None = None,
        num_workers: int = 0,
        group_by_length: bool = False,
        packing: bool = False,
        cache: str | None = CACHE,
        num_proc: int = 1,
        streaming: bool = False,
        seed: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        self.chat = chat
        self.system = system
        _check_settings(tasks, batch_size, max_length, epochs_per_task, steps_per_task)
        if num_proc < 1:
            raise ConfigError(f"data.num_proc is {num_proc}; it must be at least 1")
        if group_by_length and packing:
            raise ConfigError("data.group_by_length and data.packing both save padding; packing does without: keep one")
        if streaming and cache is None:
            raise ConfigError("data.streaming maps token ids from data.cache; give data.cache a folder")
        if system is not None and chat is False:
            raise ConfigError(
                "data.system goes into the chat template, which data.chat: false leaves unused; remove one"
            )
        for task in tasks:
            self.render(task)
        if probe is not None:
            self.render(probe)
        self.tasks = tasks
        self.probe = probe
        self.batch_size = batch_size
        self.max_length = max_length
        self.epochs_per_task = epochs_per_task
        self.steps_per_task = steps_per_task
        self.num_workers = num_workers
        self.group_by_length = group_by_length
        self.packing = packing
        self.cache = cache
        self.num_proc = num_proc
        self.streaming = streaming
        self.pin_memory = pin_memory
        self.seed = seed
        self.uses_chat = False  # known once there is a tokenizer
        self.encoded: list[EncodedRows] = []
        self.plan: SequencePlan = SequencePlan([])
        self._pad = 0

    def render(self, other: Task | Probe) -> None:
        """Have prompts of another task or probe, which is no part of the sequence, go through the chat template as its
        own do."""
        other.chat, other.system = self.chat, self.system

    def prepare_data(self) -> None:
        """Fill the cache from one process of each machine, before the others look into it."""
        assert self.trainer is not None
        tokeniser = self._tokeniser(self.trainer.lightning_module.tokenizer)  # type: ignore[arg-type]
        for task in self.tasks:
            if tokeniser.folder(task) is not None:
                tokeniser.encode(task)

    def setup(self, stage: str) -> None:
        """Encode the training rows of every task and lay out the run's steps.

        Raises:
            SecuraError: A task has no training rows, or a row cannot be encoded.
        """
        assert self.trainer is not None
        tokenizer: Any = self.trainer.lightning_module.tokenizer
        self.lay_out(tokenizer, self.trainer.accumulate_grad_batches, self.trainer.world_size)

    def lay_out(self, tokenizer: PreTrainedTokenizerBase, accumulate: int = 1, world_size: int = 1) -> None:
        """What :meth:`setup` does, without a trainer.

        Args:
            tokenizer: The model's tokenizer.
            accumulate: Micro-batches per optimizer step.
            world_size: Number of processes.

        Raises:
            SecuraError: A task has no training rows, or a row cannot be encoded.
        """
        if self.encoded:
            return
        self._pad = pad_id(tokenizer)
        self.uses_chat = PromptFormat(chat=self.chat).uses_chat(tokenizer)
        if self.uses_chat:
            rank_zero_info("data.chat: prompts go through the tokenizer's chat template")
        tokeniser = self._tokeniser(tokenizer)
        self.encoded = [tokeniser.encode(task) for task in self.tasks]
        self._report_truncation()
        self.plan = SequencePlan(self._steps(self.batch_size * accumulate * world_size), accumulate)

    def train_dataloader(self) -> ResumableLoader:
        """The whole sequence as one loader; Lightning keeps its position in the checkpoint."""
        assert self.trainer is not None
        pinned = self.trainer.strategy.root_device.type == "cuda" if self.pin_memory is None else self.pin_memory
        batches = self.batches(self.trainer.global_rank, self.trainer.world_size)
        return ResumableLoader(batches, self.num_workers, pinned)

    def batches(self, rank: int = 0, world_size: int = 1) -> SequenceBatches:
        """The micro-batches of one rank."""
        return SequenceBatches(
            self.encoded,
            self.plan,
            self.batch_size,
            rank,
            world_size,
            self.seed,
            self._pad,
            self.group_by_length,
            self.packing,
        )

    def training_rows(self, task: Task) -> Iterable[Row]:
        """The training rows of a task as text, one after another where they are streamed."""
        return stream_rows(task) if self.streaming else task.rows("train")

    def describe(self) -> dict[str, Any]:
        """What a reader of the results needs to know about the data."""
        return {
            "tasks": [task.name for task in self.tasks],
            "probe": self.probe.name if self.probe else None,
            "steps_per_task": self.plan.steps,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "chat": self.uses_chat,
            "system": self.system,
            "truncated": [int((rows.truncated > 0).sum()) for rows in self.encoded],
            "group_by_length": self.group_by_length,
            "packing": self.packing,
            "data_seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """What the position in a checkpoint is relative to; the position itself is the loader's state."""
        return {**self._signature(), "accumulate": self.plan.accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose position means other rows than this configuration's.

        Raises:
            ConfigError: The sequence, its steps or its batches differ from the checkpoint's.
        """
        now = self._signature()
        kept = {key: now[key] for key in ("max_length", "metrics", "texts")}  # which 0.1.0 did not write down
        found = first_difference(state_dict, now, {"group_by_length": False, "chat": False, **kept})
        if found is not None:
            key, before, value = found
            said = f"with {key}={before}, this configuration has {key}={value}"
            if key == "texts":
                changed = [t.name for t, old, new in zip(self.tasks, before, value, strict=True) if old != new]
                said = f"on other training rows of {', '.join(changed)} (file, template, choices or tokenizer changed)"
            raise ConfigError(
                f"data: the checkpoint was written {said}; resume with the same data settings, or start a new run "
                "without --ckpt_path"
            )

    def _signature(self) -> dict[str, Any]:
        return {
            "tasks": [task.name for task in self.tasks],
            "metrics": [task.metric for task in self.tasks],
            "rows": [len(rows) for rows in self.encoded],
            "texts": [rows.digest for rows in self.encoded],
            "steps_per_task": self.plan.steps,
            "window": self.batch_size * self.plan.accumulate * (self.trainer.world_size if self.trainer else 1),
            "seed": self.seed,
            "group_by_length": self.group_by_length,
            "max_length": self.max_length,
            "chat": self.uses_chat,
            "system": self.system,
        }

    def _tokeniser(self, tokenizer: PreTrainedTokenizerBase) -> Tokeniser:
        return Tokeniser(tokenizer, self.max_length, self.cache, self.num_proc, self.streaming)

    def _report_truncation(self) -> None:
        for task, rows in zip(self.tasks, self.encoded, strict=True):
            cut = rows.truncated[rows.truncated > 0]
            if len(cut):
                rank_zero_warn(
                    f"{len(cut)} of {len(rows)} prompts of '{task.name}' lost tokens to data.max_length="
                    f"{self.max_length} ({np.mean(cut):.0f} each in the mean)"
                )

    def _steps(self, window: int) -> list[int]:
        if self.steps_per_task is not None:
            steps = [int(n) for n in _per_task(self.steps_per_task, len(self.tasks))]
        else:
            epochs = _per_task(self.epochs_per_task or 1, len(self.tasks))
            steps = [math.ceil(n * len(rows) / window) for n, rows in zip(epochs, self.encoded, strict=True)]
        for task, n in zip(self.tasks, steps, strict=True):
            rank_zero_info(f"task '{task.name}': optimizer steps {n}, rows a step {window}")
        return steps


def _per_task(value: float | Sequence[float], n: int) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value] * n


def _check_settings(
    tasks: list[Task],
    batch_size: int,
    max_length: int,
    epochs: float | list[float] | None,
    steps: int | list[int] | None,
) -> None:
    if not tasks:
        raise ConfigError("data.tasks is empty; list at least one task")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.tasks: two tasks are named '{name}'; give one another init_args.name")
    if batch_size < 1:
        raise ConfigError(f"data.batch_size is {batch_size}; it must be at least 1")
    if max_length < 2:  # a token is predicted from one before it
        raise ConfigError(f"data.max_length is {max_length}; it must be at least 2")
    if epochs is not None and steps is not None:
        raise ConfigError("data.epochs_per_task and data.steps_per_task are both set; keep one")
    for key, value in (("epochs_per_task", epochs), ("steps_per_task", steps)):
        if value is None:
            continue
        if isinstance(value, list) and len(value) != len(tasks):
            raise ConfigError(
                f"data.{key} has {len(value)} entries for {len(tasks)} tasks; give one number or one per task"
            )
        if not all(0 < n < math.inf for n in _per_task(value, len(tasks))):  # not for nan either
            raise ConfigError(f"data.{key} is {value}; it must be above 0 and finite")
