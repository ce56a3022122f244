"""The replay buffer: rows of the past that ER, I-LoRA, DER++ and A-GEM share.

    after step s     the step's fresh rows are offered          (each row of a task once, in its first pass)
    during step s    strategies draw rows of earlier tasks      (none exist before task 2)

It holds token ids, prompt lengths and task numbers on the CPU or on disk. Fresh training rows alone enter: never a
replayed row, never a row that is evaluated. Every process has its own shard, filled from its own batches with draws of
its own; ``capacity`` is the number of rows of all shards together.

A run has one buffer. A strategy that replays brings it with its defaults; list it to set it:

    trainer:
      callbacks:
        - class_path: ReplayBuffer
          init_args: {capacity: 500, policy: ring}
        - ER
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from secura_lightning.data.batches import Position
from secura_lightning.data.encode import Encoded
from secura_lightning.errors import ConfigError
from secura_lightning.seeds import derive_seed
from secura_lightning.strategies.base import Strategy, strategies_of
from secura_lightning.strategies.ranks import gather, own
from secura_lightning.strategies.store import FileStore, MemoryStore

Policy = Literal["reservoir", "ring"]


@dataclass(slots=True)
class Held:
    """One row of the buffer.

    Attributes:
        task: Its task's number.
        row: Its index among the task's training rows.
        length: Its tokens.
        n_prompt: How many of them belong to the prompt.
        top: Logits kept per answer token (0: none).
        handle: Where its words lie; see :mod:`secura_lightning.strategies.store`.
    """

    task: int
    row: int
    length: int
    n_prompt: int
    top: int
    handle: Any

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from other rows."""
        return self.task, self.row

    @property
    def n_trained(self) -> int:
        """How many of its tokens are predicted."""
        return self.length - max(1, self.n_prompt)

    @property
    def n_words(self) -> int:
        """How many words it takes."""
        return self.length + 2 * self.n_trained * self.top


@dataclass(frozen=True, slots=True)
class Sample(Encoded):
    """A row drawn from the buffer: an encoded row, with what was kept beside it.

    Attributes:
        task: Its task's number.
        row: Its index among the task's training rows.
        logits: Kept logits ``[n, k]`` of its n answer tokens, None where none were kept.
        tokens: Which tokens they belong to, ``[n, k]``.
    """

    task: int = -1
    row: int = -1
    logits: Tensor | None = None
    tokens: Tensor | None = None


Annotate = Callable[[list[Encoded]], list[tuple[Tensor, Tensor]]]
"""Top-k logits [n, k] and their token ids [n, k] of each row's answer. Called after every step, also without rows."""


class ReplayBuffer(Strategy):
    """Rows of past tasks for the strategies that replay them.

    Args:
        capacity: Rows held, over all processes; or a fraction below 1: this part of every task's rows.
        policy: ``reservoir`` holds every row offered so far with equal chance (of each task, under a fraction);
            ``ring`` the latest rows, equally many of each task.
        balanced: Draw equally from every past task, however many of its rows are held; otherwise from all rows alike.
        on_disk: Keep the rows in a file in the run's folder, for capacities beyond the memory. It grows with every row
            that enters, and what a checkpoint holds of it is never rewritten.
    """

    order: ClassVar[int] = 0
    serves: ClassVar[bool] = True

    def __init__(
        self,
        capacity: int | float = 1000,
        policy: Policy = "reservoir",
        balanced: bool = True,
        on_disk: bool = False,
    ) -> None:
        if capacity <= 0 or (capacity >= 1 and capacity != int(capacity)):
            raise ConfigError(
                f"trainer.callbacks.ReplayBuffer.capacity is {capacity}; give a number of rows, or a fraction below 1 "
                "of every task's rows"
            )
        self.capacity = capacity if capacity < 1 else int(capacity)
        self.policy = policy
        self.balanced = balanced
        self.on_disk = on_disk
        self.annotate: Annotate | None = None  # set by a strategy that keeps the model's answers
        self.rows: dict[int, list[Held]] = defaultdict(list)  # by group: a task, or -1 for one reservoir over all
        self.offered: dict[int, int] = defaultdict(int)  # rows that each group was offered
        self._keys: set[tuple[int, int]] = set()
        self._fresh: list[Held] = []  # of the window that is under way
        self._rank, self._world = 0, 1

    # ------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Every rank's shard, as plain tensors; a collective call when distributed."""
        held = [row for group in sorted(self.rows) for row in self.rows[group]]
        words, starts = self._store.save([row.handle for row in held])
        columns = [
            (group, row.task, row.row, row.length, row.n_prompt, row.top)
            for group in sorted(self.rows)
            for row in self.rows[group]
        ]
        table = torch.tensor([(*column, start) for column, start in zip(columns, starts, strict=True)])
        mine = {
            "table": table.reshape(-1, 7).long(),
            "words": words,
            "offered": dict(self.offered),
            "generator": self._generator.get_state(),
        }
        return {"ranks": gather(mine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with this rank's shard of a checkpoint."""
        mine = own(state_dict["ranks"], self._rank, self._world, "ReplayBuffer")
        if isinstance(self._store, FileStore):
            source = self._found or self._store.first
            self._store.resume(mine["words"], source, self._kept(source.parent / "checkpoints"))
        self.rows.clear()
        for group, task, row, length, n_prompt, top, start in mine["table"].tolist():
            held = Held(task, row, length, n_prompt, top, None)
            held.handle = self._store.load(mine["words"], start, held.n_words)
            self.rows[group].append(held)
        self._keys = {held.key for rows in self.rows.values() for held in rows}
        self.offered = defaultdict(int, mine["offered"])
        self._generator.set_state(mine["generator"].cpu())

    def _kept(self, folder: Path) -> dict[int, int]:
        """The furthest end that the checkpoints of a folder know of each of this rank's files, by the file's number."""
        ends: dict[int, int] = {}
        for path in folder.glob("*.ckpt"):
            try:
                checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
                words = checkpoint["callbacks"]["ReplayBuffer"]["ranks"][self._rank]["words"].tolist()
            except Exception:  # damaged, or of another run: nothing could be resumed from it (torch raises many types)
                continue
            end, number = [*words, 0][:2]
            ends[number] = max(end, ends.get(number, 0))
        return ends

    # ------------------------------------------------------------------- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Seed this rank's draws, and open its shard's file where rows lie on disk.

        Raises:
            ConfigError: There is not a row for every process.
        """
        self._rank, self._world = trainer.global_rank, trainer.world_size
        if self.capacity >= 1 and self.capacity < self._world:
            raise ConfigError(
                f"trainer.callbacks.ReplayBuffer.capacity is {self.capacity} rows for {self._world} processes; give at "
                "least one row each"
            )
        self._generator = torch.Generator().manual_seed(derive_seed(pl_module.seed, "ReplayBuffer", self._rank))
        self._store: MemoryStore | FileStore = MemoryStore()
        if self.on_disk:
            folder = trainer.log_dir  # a collective call
            assert folder is not None
            name = f"replay-buffer-rank{self._rank}.bin"
            self._store = FileStore(Path(folder) / name)
            resumed = trainer.ckpt_path
            self._found = Path(resumed).resolve().parent.parent / name if resumed else None

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Any) -> None:
        """Make room for the rows of the task that begins."""
        if self.policy == "ring":
            for past in range(index):
                quota = self._quota(trainer, past, index)
                rows = self.rows[past]
                self._keys -= {held.key for held in rows[: max(0, len(rows) - quota)]}
                del rows[: max(0, len(rows) - quota)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Offer the window's fresh rows once its optimizer step is taken."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        position = data.plan.locate(batch_idx)
        task, encoded = position.task, data.encoded[position.task]
        if not any(strategy.skipping for strategy in strategies_of(trainer)):
            for index in self._first_seen(trainer, position, batch["rows"]):
                row = encoded[index]
                ids = torch.tensor(np.asarray(row.ids, dtype=np.int32))
                self._fresh.append(Held(task, index, len(ids), row.n_prompt, 0, ids))
        if position.micro == data.plan.accumulate - 1:
            quota = self._quota(trainer, task, task)
            self._settle([held for held in self._fresh if self._offer(held, quota)])
            self._fresh = []

    # ----------------------------------------------------------------- filling

    def _first_seen(self, trainer: Trainer, position: Position, rows: list[int]) -> list[int]:
        """Those of a micro-batch's rows that the task has not trained on before, on any rank."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        size, n = len(rows) * data.plan.accumulate * self._world, len(data.encoded[position.task])
        if (position.step + 1) * size <= n:
            return rows
        if position.step * size >= n:
            return []
        # The window in which the second pass begins: once a task, so that the earlier ones may be asked for again.
        batches: Any = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        earlier = {row for step in range(position.step) for row in batches.window(position.task, step)}
        window = batches.window(position.task, position.step)
        first = (position.micro * self._world + self._rank) * len(rows)
        return [row for i, row in enumerate(rows, start=first) if row not in earlier and window.index(row) == i]

    def _quota(self, trainer: Trainer, task: int, current: int) -> int:
        """Rows that this rank may hold of ``task``, or of all under a reservoir of fixed size."""
        rows: float = self.capacity
        if self.capacity < 1:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = max(1, round(self.capacity * len(data.encoded[task])))
        shard = (int(rows) + self._world - 1 - self._rank) // self._world
        if self.policy == "ring" and self.capacity >= 1:
            shard //= current + 1
        return max(1, shard)

    def _group(self, task: int) -> int:
        return -1 if self.policy == "reservoir" and self.capacity >= 1 else task

    def _offer(self, held: Held, quota: int) -> bool:
        """Decide about one row; True if it entered."""
        group = self._group(held.task)
        rows = self.rows[group]
        self.offered[group] += 1
        if len(rows) < quota:
            rows.append(held)
        elif self.policy == "ring":
            self._keys.discard(rows.pop(0).key)
            rows.append(held)
        else:  # algorithm R: the n-th row replaces one of the quota with chance quota / n
            place = int(torch.randint(self.offered[group], (), generator=self._generator))
            if place >= quota:
                return False
            self._keys.discard(rows[place].key)
            rows[place] = held
        self._keys.add(held.key)
        return True

    def _settle(self, entered: list[Held]) -> None:
        """Store the rows that entered and were not replaced within the same window."""
        kept = [held for held in entered if held.key in self._keys]
        answers = self.annotate([Encoded(held.handle.numpy(), held.n_prompt) for held in kept]) if self.annotate else []
        for i, held in enumerate(kept):
            words = [held.handle]
            if answers:
                logits, tokens = answers[i]
                held.top = logits.shape[1]
                words += [logits.float().contiguous().view(torch.int32).flatten(), tokens.to(torch.int32).flatten()]
            held.handle = self._store.put(torch.cat(words))

    # ----------------------------------------------------------------- drawing

    def draw(self, number: int, before: int, generator: torch.Generator) -> list[Sample]:
        """Rows of the tasks before task ``before``, without repetition as long as there are enough.

        Args:
            number: How many.
            before: Number of the current task.
            generator: CPU generator of the strategy that asks.

        Returns:
            ``number`` rows; none where no row of an earlier task is held.
        """
        past = self._by_task(before)
        groups = list(past.values()) if self.balanced else [[row for rows in past.values() for row in rows]]
        if not any(groups):
            return []
        turns = _shuffled(range(len(groups)), number, generator)
        found: list[Held] = []
        for i, rows in enumerate(groups):
            found += _shuffled(rows, turns.count(i), generator)
        return [self._read(held) for held in found]

    def tasks(self) -> dict[int, int]:
        """Rows held on this rank, by task."""
        return {task: len(rows) for task, rows in self._by_task(None).items()}

    def _by_task(self, before: int | None) -> dict[int, list[Held]]:
        found: dict[int, list[Held]] = defaultdict(list)
        for rows in self.rows.values():
            for held in rows:
                if before is None or held.task < before:
                    found[held.task].append(held)
        return dict(sorted(found.items()))

    def _read(self, held: Held) -> Sample:
        words = self._store.get(held.handle, held.n_words)
        ids = words[: held.length].numpy()
        if not held.top:
            return Sample(ids, held.n_prompt, 0, held.task, held.row)
        logits, tokens = words[held.length :].view(2, held.n_trained, held.top)
        return Sample(ids, held.n_prompt, 0, held.task, held.row, logits.view(torch.float32), tokens.long())


def _shuffled(items: Iterable[Any], number: int, generator: torch.Generator) -> list[Any]:
    """``number`` of ``items``: all of them in random order, then all of them anew, and so on."""
    items = list(items)
    found: list[Any] = []
    while len(found) < number:
        found += [items[i] for i in torch.randperm(len(items), generator=generator)[: number - len(found)].tolist()]
    return found
