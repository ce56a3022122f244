"""Which rows are in which batch: a pure function of (seed, task, position), so that any run can be continued exactly.

    sequence   = task 0 | task 1 | ...              a task spans `steps` optimizer steps
    step       = one window of rows                 window = batch_size x accumulate x world_size
    micro-batch k of rank r = its slice of the window

The rows of a window do not depend on how it is split, so any split into micro-batches and ranks of the same product
trains on the same rows, and each micro-batch carries the token count of its whole window to normalise by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from secura_lightning.data.encode import Encoded, collate
from secura_lightning.seeds import derive_seed


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
    ) -> None:
        self.rows = rows
        self.plan = plan
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.pad = pad
        self._order = lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The collated micro-batch, with ``window_tokens`` (float), ``task`` (int) and ``rows`` (row indices)."""
        position = self.plan.locate(index)
        window = self.window(position.task, position.step)
        first = (position.micro * self.world_size + self.rank) * self.batch_size
        mine = window[first : first + self.batch_size]
        rows = self.rows[position.task]
        batch: dict[str, Any] = dict(collate([rows[i] for i in mine], self.pad))
        batch["window_tokens"] = float(sum(rows[i].n_trained for i in window))
        batch["task"] = position.task
        batch["rows"] = mine
        return batch

    def window(self, task: int, step: int) -> list[int]:
        """Row indices of one optimizer step, over all ranks and micro-batches."""
        size = self.batch_size * self.world_size * self.plan.accumulate
        n = len(self.rows[task])
        stream = range(step * size, (step + 1) * size)
        return [self._order(task, place // n)[place % n] for place in stream]

    def _permutation(self, task: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "rows", task, epoch))
        return torch.randperm(len(self.rows[task]), generator=generator).tolist()


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
