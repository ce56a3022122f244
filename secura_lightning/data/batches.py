"""Which rows are in which batch: a pure function of (seed, task, position), so that any run can be continued exactly.

    sequence   = task 0 | task 1 | ...              a task spans `steps` optimizer steps
    step       = one window of rows                 window = batch_size x accumulate x world_size
    micro-batch k of rank r = its slice of the window

The rows of a window do not depend on how it is split, so any split into micro-batches and ranks of the same product
trains on the same rows, and each micro-batch carries the token count of its whole window to normalise by.

Padding is work for nothing. Two ways around it, both pure functions of the position too: windows of rows of similar
length (each row still once a pass), or rows packed into the lines of a batch (the same rows at the same step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from secura_lightning.data.encode import Encoded, collate, collate_packed
from secura_lightning.data.store import lengths_of
from secura_lightning.seeds import derive_seed

GROUPED_WINDOWS = 50  # windows whose rows are sorted by length together: enough to be alike, few enough to stay mixed


@dataclass(frozen=True, slots=True)
class Position:
    """Where a micro-batch stands: task, optimizer step within the task, micro-batch within the step."""

    task: int
    step: int
    micro: int


class SequencePlan:
    """The arithmetic of one run: tasks, optimizer steps and micro-batches.

    Args:
        steps: Optimizer steps of each task.
        accumulate: Micro-batches per optimizer step.
    """

    def __init__(self, steps: Sequence[int], accumulate: int = 1) -> None:
        self.steps = list(steps)
        self.accumulate = accumulate
        self.starts = [sum(self.steps[:i]) for i in range(len(self.steps))]  # first optimizer step of each task

    def __len__(self) -> int:
        """Micro-batches in the whole run."""
        return sum(self.steps) * self.accumulate

    def locate(self, micro_batch: int) -> Position:
        """The position of the run's n-th micro-batch."""
        step, micro = divmod(micro_batch, self.accumulate)
        task, within = self.locate_step(step)
        return Position(task, within, micro)

    def locate_step(self, step: int) -> tuple[int, int]:
        """Task and step within it of the run's n-th optimizer step; past the end, the last task's end."""
        for task in reversed(range(len(self.steps))):
            if step >= self.starts[task]:
                return task, step - self.starts[task]
        raise ValueError(f"step {step} is negative")

    def starts_task(self, micro_batch: int) -> bool:
        """Whether this micro-batch is the first of its task."""
        position = self.locate(micro_batch)
        return position.step == 0 and position.micro == 0

    def ends_task(self, micro_batch: int) -> bool:
        """Whether this micro-batch is the last of its task."""
        position = self.locate(micro_batch)
        return position.step == self.steps[position.task] - 1 and position.micro == self.accumulate - 1


class SequenceBatches(Dataset[dict[str, Any]]):
    """Item k is the k-th micro-batch of this rank, collated.

    Args:
        rows: Encoded training rows of each task.
        plan: Steps of each task.
        batch_size: Rows per micro-batch and rank.
        rank: This process.
        world_size: Number of processes.
        seed: Seed of the order of rows.
        pad: Token id that fills short rows.
        group_by_length: Put rows of similar length into the same window.
        packing: Put rows behind one another into as few lines as the longest row of the micro-batch allows.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Encoded]],
        plan: SequencePlan,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        pad: int = 0,
        group_by_length: bool = False,
        packing: bool = False,
    ) -> None:
        self.rows = rows
        self.plan = plan
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.pad = pad
        self.group_by_length = group_by_length
        self.packing = packing
        self._order = lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The collated micro-batch, with ``window_tokens`` and ``padding_efficiency`` (floats), ``task`` (int) and
        ``rows`` (row indices)."""
        position = self.plan.locate(index)
        window = self.window(position.task, position.step)
        mine = self._share(window, position.micro)
        rows = self.rows[position.task]
        taken = [rows[i] for i in mine]
        lines = pack_lines([len(row.ids) for row in taken]) if self.packing else None
        batch: dict[str, Any] = (
            dict(collate(taken, self.pad))
            if lines is None
            else dict(collate_packed([[taken[i] for i in line] for line in lines], self.pad))
        )
        batch["window_tokens"] = float(sum(rows[i].n_trained for i in window))
        batch["padding_efficiency"] = sum(len(row.ids) for row in taken) / batch["input_ids"].numel()
        batch["task"] = position.task
        batch["rows"] = mine
        return batch

    def padding_efficiency(self, task: int, steps: int = 200) -> float:
        """Share of a task's batch positions that hold tokens, over its first ``steps`` windows and all ranks."""
        lengths = lengths_of(self.rows[task])
        tokens = places = 0
        for step in range(min(steps, self.plan.steps[task])):
            window = self.window(task, step)
            for first in range(0, len(window), self.batch_size):
                sizes = [int(lengths[i]) for i in window[first : first + self.batch_size]]
                lines = pack_lines(sizes) if self.packing else [[i] for i in range(len(sizes))]
                tokens += sum(sizes)
                places += len(lines) * max(sum(sizes[i] for i in line) for line in lines)
        return tokens / places

    def window(self, task: int, step: int) -> list[int]:
        """Row indices of one optimizer step, over all ranks and micro-batches."""
        n = len(self.rows[task])
        stream = range(step * self.window_size, (step + 1) * self.window_size)
        window = [int(self._order(task, place // n)[place % n]) for place in stream]
        if self.group_by_length:  # so that its micro-batches are alike too
            lengths = lengths_of(self.rows[task])
            window.sort(key=lambda i: (-lengths[i], i))
        return window

    @property
    def window_size(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.world_size * self.plan.accumulate

    def _share(self, window: list[int], micro: int) -> list[int]:
        """This rank's rows of a micro-batch."""
        first = (micro * self.world_size + self.rank) * self.batch_size
        return window[first : first + self.batch_size]

    def _permutation(self, task: int, epoch: int) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "rows", task, epoch))
        n = len(self.rows[task])
        order = torch.randperm(n, generator=generator).numpy()
        if not self.group_by_length:
            return order
        # The pass begins somewhere inside a window, unless the rows divide evenly: what is no whole window stays mixed.
        size = self.window_size
        first = -epoch * n % size
        whole = max(0, n - first) // size
        inner = order[first : first + whole * size]
        for start in range(0, len(inner), GROUPED_WINDOWS * size):
            part = inner[start : start + GROUPED_WINDOWS * size]
            part[:] = part[np.argsort(lengths_of(self.rows[task])[part], kind="stable")]
        shuffled = torch.randperm(whole, generator=generator).numpy()
        order[first : first + whole * size] = inner.reshape(whole, size)[shuffled].reshape(-1)
        return order


def pack_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Rows packed into lines no longer than the longest row: longest first, each into the first line with room.

    Returns:
        The indices of each line's rows.
    """
    room: list[int] = []
    lines: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((line for line, left in enumerate(room) if left >= lengths[i]), None)
        if place is None:
            place = len(lines)
            lines.append([])
            room.append(max(lengths))
        lines[place].append(i)
        room[place] -= lengths[i]
    return lines


class _From(Sampler[int]):
    """Positions from ``start`` to the end; its length stays that of the whole run, which Lightning counts against."""

    def __init__(self, length: int) -> None:
        self.start = 0
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))


class ResumableLoader(DataLoader[dict[str, Any]]):
    """A DataLoader over :class:`SequenceBatches` that continues after the last batch it handed out.

    Lightning stores and restores its state with the checkpoint because it has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, batches: SequenceBatches, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__(
            batches,
            batch_size=None,
            sampler=_From(len(batches)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(batches.seed),  # so that it draws nothing from the global one
        )
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        self.sampler.start = self.position  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.position += 1  # counts what was handed out, not what workers prefetched
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many micro-batches were handed out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after ``state["position"]`` micro-batches."""
        self.position = state["position"]
