"""The buffer holds fresh training rows, by its policy, on every rank its own, through any interruption."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from secura_lightning.data.batches import SequencePlan
from secura_lightning.data.encode import Encoded
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.strategies.buffer import ReplayBuffer, Sample

LENGTHS = (5, 9, 3, 7)


class Stream:
    """Feeds a buffer as a trainer would, without a model.

    Args:
        buffer: The buffer.
        rows: Rows of each task.
        size: Rows of a micro-batch.
        accumulate: Micro-batches of a step.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        rows: tuple[int, ...] = (40, 40, 40),
        size: int = 4,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        folder: Path | None = None,
        ckpt_path: Path | None = None,
    ) -> None:
        self.buffer, self.size = buffer, size
        encoded = [[row_of(task, i) for i in range(n)] for task, n in enumerate(rows)]
        plan = SequencePlan([2 * n // (size * accumulate * world) for n in rows], accumulate)
        self.trainer: Any = SimpleNamespace(
            global_rank=rank,
            world_size=world,
            log_dir=str(folder),
            ckpt_path=ckpt_path,
            callbacks=[buffer],
            datamodule=SimpleNamespace(plan=plan, encoded=encoded, batch_size=size),
        )
        self.module: Any = SimpleNamespace(seed=seed)
        self.at = 0
        buffer.setup(self.trainer, self.module, "fit")

    def step(self, number: int = 1) -> None:
        """The next micro-batches, rows in order."""
        data, world = self.trainer.datamodule, self.trainer.world_size
        for _ in range(number):
            position = data.plan.locate(self.at)
            if data.plan.starts_task(self.at):
                self.buffer.on_task_start(self.trainer, self.module, position.task, None)
            place = (position.step * data.plan.accumulate + position.micro) * world + self.trainer.global_rank
            n = len(data.encoded[position.task])
            rows = [(place * self.size + i) % n for i in range(self.size)]
            self.buffer.on_train_batch_end(self.trainer, self.module, None, {"rows": rows}, self.at)
            self.at += 1

    def task(self) -> None:
        """All micro-batches up to the end of the task."""
        plan = self.trainer.datamodule.plan
        while True:
            self.step()
            if plan.ends_task(self.at - 1):
                return

    def held(self) -> list[tuple[int, int]]:
        return [held.key for group in self.buffer.rows.values() for held in group]


def row_of(task: int, row: int) -> Encoded:
    length = LENGTHS[row % len(LENGTHS)]
    return Encoded(np.arange(length, dtype=np.int32) + 100 * row + 10_000 * task, 2)


def draws(buffer: ReplayBuffer, number: int, before: int, seed: int = 0) -> list[tuple[int, int]]:
    return [(s.task, s.row) for s in buffer.draw(number, before, torch.Generator().manual_seed(seed))]


def chi_square(policy: Any, runs: int = 400, rows: int = 60, capacity: int = 12) -> float:
    """How far the inclusion of each row is from capacity / rows; chi-square of rows - 1 degrees where it is right."""
    counts: Counter[int] = Counter()
    for seed in range(runs):
        stream = Stream(ReplayBuffer(capacity, policy), (rows, 4), size=6, seed=seed)
        stream.task()
        counts.update(row for _, row in stream.held())
    chance = capacity / rows
    variance = runs * chance * (1 - chance) * rows / (rows - 1)
    return sum((counts[row] - runs * chance) ** 2 / variance for row in range(rows))


def test_reservoir_holds_every_row_with_equal_chance() -> None:
    assert chi_square("reservoir") < 98.3  # the 99.9 % quantile at 59 degrees of freedom
    assert chi_square("ring", runs=20) > 98.3  # which the statistic tells from a policy that does not


def test_reservoir_fills_up_and_stays_at_its_capacity() -> None:
    stream = Stream(ReplayBuffer(10))
    stream.step(2)
    assert stream.held() == [(0, i) for i in range(8)]
    stream.task()
    assert len(stream.held()) == len(set(stream.held())) == 10
    stream.task()
    stream.task()
    assert len(stream.held()) == 10
    assert stream.buffer.offered == {-1: 120}  # every row once, though each was trained on twice


def test_ring_holds_the_latest_rows_of_every_task_equally() -> None:
    stream = Stream(ReplayBuffer(12, "ring"))
    stream.task()
    assert stream.held() == [(0, i) for i in range(28, 40)]
    stream.task()
    assert stream.held() == [(0, i) for i in range(34, 40)] + [(1, i) for i in range(34, 40)]
    stream.task()
    assert Counter(task for task, _ in stream.held()) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("policy", ["reservoir", "ring"])
def test_fraction_holds_its_part_of_every_task(policy: Any) -> None:
    stream = Stream(ReplayBuffer(0.1, policy), (40, 80, 20))
    for _ in range(3):
        stream.task()
    assert stream.buffer.tasks() == {0: 4, 1: 8, 2: 2}


def test_rows_enter_after_the_whole_step() -> None:
    stream = Stream(ReplayBuffer(100), accumulate=2)
    stream.step()
    assert stream.held() == []
    stream.step()
    assert len(stream.held()) == 8


def test_a_row_comes_back_as_it_was_trained_on() -> None:
    stream = Stream(ReplayBuffer(100))
    stream.task()
    for sample in stream.buffer.draw(40, 1, torch.Generator()):
        expected = row_of(sample.task, sample.row)
        assert np.array_equal(sample.ids, expected.ids)
        assert sample.n_prompt == 2


def test_draws_take_earlier_tasks_alone_and_equally_without_repetition() -> None:
    stream = Stream(ReplayBuffer(200), (40, 8, 40))
    stream.step(3)
    assert draws(stream.buffer, 4, 0) == draws(stream.buffer, 4, 0) == []
    stream.task()
    stream.step(1)
    assert {task for task, _ in draws(stream.buffer, 40, 1)} == {0}
    stream.task()
    stream.step(1)
    found = draws(stream.buffer, 12, 2)
    assert Counter(task for task, _ in found) == {0: 6, 1: 6}
    assert len(set(found)) == 12
    assert Counter(task for task, _ in draws(stream.buffer, 20, 2))[1] == 10  # of 8 rows: two come twice
    stream.buffer.balanced = False
    assert Counter(task for task, _ in draws(stream.buffer, 48, 2)) == {0: 40, 1: 8}
    assert draws(stream.buffer, 9, 2, seed=1) != draws(stream.buffer, 9, 2, seed=2)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("policy", ["reservoir", "ring"])
def test_interrupted_and_continued_is_the_uninterrupted_buffer(policy: Any, on_disk: bool, tmp_path: Path) -> None:
    def stream(ckpt_path: Path | None = None, folder: str = "run") -> Stream:
        buffer = ReplayBuffer(10, policy, on_disk=on_disk)
        return Stream(buffer, folder=tmp_path / folder, ckpt_path=ckpt_path)

    whole = stream(folder="whole")
    whole.step(25)
    killed = stream()
    killed.step(13)
    state = killed.buffer.state_dict()
    killed.step(5)  # whatever came after the checkpoint is lost
    for folder in ("run", "elsewhere"):
        resumed = stream(tmp_path / "run" / "checkpoints" / "last.ckpt", folder)
        resumed.buffer.load_state_dict(state)
        resumed.at = 13
        resumed.step(12)
        assert_equal(resumed.buffer.state_dict(), whole.buffer.state_dict())
        assert same_rows(resumed.buffer.draw(20, 2, torch.Generator()), whole.buffer.draw(20, 2, torch.Generator()))


def same_rows(left: list[Sample], right: list[Sample]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(np.array_equal(a.ids, b.ids) and (a.task, a.row) == (b.task, b.row) for a, b in pairs)


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    for one, other in zip(left["ranks"], right["ranks"], strict=True):
        assert one["offered"] == other["offered"]
        for key in ("table", "words", "generator"):
            assert torch.equal(one[key], other[key]), key


def test_rows_on_disk_take_no_memory_and_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    stream = Stream(ReplayBuffer(10, on_disk=True), folder=tmp_path / "run")
    stream.step(4)
    state = stream.buffer.state_dict()
    assert all(isinstance(held.handle, int) for group in stream.buffer.rows.values() for held in group)
    end, number = state["ranks"][0]["words"].tolist()
    assert number == 0
    path = tmp_path / "run" / "replay-buffer-rank0.bin"
    assert path.stat().st_size == 4 * end
    path.unlink()
    other = Stream(ReplayBuffer(10, on_disk=True), folder=tmp_path / "run", ckpt_path=tmp_path / "run/c/last.ckpt")
    with pytest.raises(SecuraError, match=r"--ckpt_path: .*replay-buffer-rank0\.bin is missing or too short"):
        other.buffer.load_state_dict(state)


def test_an_earlier_checkpoint_leaves_the_rows_of_later_ones_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)

    def stream(shift: int = 0) -> Stream:
        """Rows of another run where shifted."""
        made = Stream(ReplayBuffer(10, on_disk=True), folder=folder, ckpt_path=checkpoints / "last.ckpt")
        made.trainer.datamodule.encoded = [
            [Encoded(np.asarray(row.ids) + shift, row.n_prompt) for row in rows]
            for rows in made.trainer.datamodule.encoded
        ]
        return made

    def save(made: Stream, name: str) -> tuple[dict[str, Any], list[Sample]]:
        state = made.buffer.state_dict()
        torch.save({"callbacks": {"ReplayBuffer": state}}, checkpoints / name)
        return state, made.buffer.draw(10, 3, torch.Generator())

    def resumed(state: dict[str, Any], at: int, shift: int = 0) -> Stream:
        made = stream(shift)
        made.buffer.load_state_dict(state)
        made.at = at
        return made

    def files() -> set[str]:
        return {path.name for path in folder.glob("*.bin")}

    first = stream()
    first.step(2)
    early, early_rows = save(first, "task1.ckpt")
    first.step(8)
    late, late_rows = save(first, "task2.ckpt")

    # The same rows again: nothing is written twice, and the state is the same.
    again = resumed(early, 2)
    before = (folder / "replay-buffer-rank0.bin").read_bytes()
    again.step(8)
    assert_equal(again.buffer.state_dict(), late)
    assert (folder / "replay-buffer-rank0.bin").read_bytes() == before

    # Other rows: they go to a file of their own, at the same places.
    other = resumed(early, 2, shift=7)
    other.step(8)
    assert files() == {"replay-buffer-rank0.bin", "replay-buffer-rank0.1.bin"}
    other_state, other_rows = save(other, "last.ckpt")
    assert not same_rows(other_rows, late_rows)
    assert (folder / "replay-buffer-rank0.bin").read_bytes() == before
    for state, at, rows in ((early, 2, early_rows), (late, 10, late_rows), (other_state, 10, other_rows)):
        assert same_rows(resumed(state, at).buffer.draw(10, 3, torch.Generator()), rows)

    # A file that no checkpoint names any more goes when the run is resumed.
    for name in ("task1.ckpt", "task2.ckpt"):
        (checkpoints / name).unlink()
    assert same_rows(resumed(other_state, 10).buffer.draw(10, 3, torch.Generator()), other_rows)
    assert files() == {"replay-buffer-rank0.1.bin"}


def test_a_checkpoint_without_rows_leaves_those_of_later_ones_alone(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    stream = Stream(ReplayBuffer(10, on_disk=True), folder=tmp_path)
    none = stream.buffer.state_dict()
    stream.step(3)
    late, rows = stream.buffer.state_dict(), stream.buffer.draw(10, 3, torch.Generator())
    torch.save({"callbacks": {"ReplayBuffer": late}}, checkpoints / "last.ckpt")
    for state in (none, late):
        resumed = Stream(ReplayBuffer(10, on_disk=True), folder=tmp_path, ckpt_path=checkpoints / "last.ckpt")
        resumed.buffer.load_state_dict(state)
        resumed.buffer.state_dict()
    assert same_rows(resumed.buffer.draw(10, 3, torch.Generator()), rows)


def test_ranks_have_shards_and_draws_of_their_own() -> None:
    shards = [Stream(ReplayBuffer(11), rank=rank, world=2) for rank in range(2)]
    for shard in shards:
        shard.task()
    assert [len(shard.held()) for shard in shards] == [6, 5]
    assert not set(shards[0].held()) & set(shards[1].held())
    one, other = (shard.buffer.state_dict()["ranks"][0]["generator"] for shard in shards)
    assert not torch.equal(one, other)
    with pytest.raises(SecuraError, match=r"ReplayBuffer .* written by 1 of them: .*trainer\.devices"):
        shards[0].buffer.load_state_dict(shards[0].buffer.state_dict())


@pytest.mark.parametrize("capacity", [0, -1, 2.5])
def test_bad_capacities_are_refused(capacity: float) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.callbacks\.ReplayBuffer\.capacity"):
        ReplayBuffer(capacity)


def test_capacity_below_one_row_a_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 rows for 2 processes"):
        Stream(ReplayBuffer(1), world=2)
