"""ER: past rows beside the fresh ones, weighted, the same however a window is split, and nothing before task 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning.data.encode import Encoded, collate
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.replay import Replayed, rows_of_step
from tests.strategies.tiny import build, fit, tensors


class AtTaskEnd(Callback):
    """Keeps the adapters' tensors of every task's end."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Any) -> None:
        self.kept.append(tensors(trainer))


class Spied(ER):
    """Keeps what went in and out of every loss."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.losses: list[tuple[Tensor, Tensor]] = []
        self.replayed: list[Tensor] = []
        self.rows: list[tuple[int, int]] = []

    def shape_loss(self, *arguments: Any) -> Tensor:
        loss = super().shape_loss(*arguments)
        self.losses.append((arguments[2].detach(), loss.detach()))
        return loss

    def cross_entropy(self, pl_module: LightningModule, replayed: Replayed) -> Tensor:
        self.rows += [(row.task, row.row) for row in replayed.rows]
        self.replayed.append(super().cross_entropy(pl_module, replayed))
        return self.replayed[-1]


SHORT: dict[str, Any] = {"data": {"steps_per_task": [3, 2]}}


def test_first_task_is_untouched_and_the_second_is_not(tmp_path: Path) -> None:
    free, replayed = AtTaskEnd(), AtTaskEnd()
    fit(tmp_path, [free], **SHORT)
    fit(tmp_path, [ER(), replayed], **SHORT)
    for name, value in free.kept[0].items():
        assert torch.equal(value, replayed.kept[0][name])
    assert any(not torch.equal(value, replayed.kept[1][name]) for name, value in free.kept[1].items())


def test_loss_is_the_weighted_sum_and_rows_are_of_earlier_tasks(tmp_path: Path) -> None:
    spy = Spied(replay_ratio=0.25, weight=0.4)
    trainer = fit(tmp_path, [spy], data={"steps_per_task": [3, 3, 2]})
    assert [torch.equal(before, after) for before, after in spy.losses] == [True] * 3 + [False] * 5
    for (before, after), replayed in zip(spy.losses[3:], spy.replayed, strict=True):
        torch.testing.assert_close(after, 0.6 * before + 0.4 * replayed)
    assert len(spy.rows) == 6  # a third of 5 x 4 fresh rows
    assert {task for task, _ in spy.rows[:3]} == {0}  # 4 of the 12 fresh rows of task 2
    buffer = next(callback for callback in trainer.callbacks if isinstance(callback, ReplayBuffer))
    assert all(task < 2 for task, _ in spy.rows)
    assert buffer.tasks() == {0: 12, 1: 8, 2: 8}


def test_buffer_holds_training_rows_alone(tmp_path: Path) -> None:
    trainer = fit(tmp_path, [ReplayBuffer(), ER()], data={"steps_per_task": [4, 3, 1]})
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    buffer = next(callback for callback in trainer.callbacks if isinstance(callback, ReplayBuffer))
    tokenizer = trainer.lightning_module.tokenizer
    evaluated = {row.prompt for task in data.tasks for split in ("test", "validation") for row in task.rows(split)}
    trained = {row.prompt for task in data.tasks for row in task.rows("train")}
    assert evaluated - trained
    samples = buffer.draw(sum(buffer.tasks().values()), 3, torch.Generator())
    for sample in samples:
        assert list(sample.ids) == list(data.encoded[sample.task][sample.row].ids)
        prompt = tokenizer.decode(sample.ids[1 : sample.n_prompt])
        assert prompt in trained
        assert prompt not in evaluated - trained
    assert {sample.task for sample in samples} == {0, 1, 2}


def test_padding_does_not_change_the_replay_loss(tmp_path: Path) -> None:
    _, module, _ = build(tmp_path)
    module.configure_model()
    rows = [Encoded(list(range(5, 5 + length)), 3) for length in (6, 9, 14)]
    together = module.answer_loss(collate(rows, 2))
    alone = sum(module.answer_loss(collate([row], 2)) for row in rows)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, module.answer_loss(collate(rows, 7)))


def test_splitting_a_window_changes_nothing(tmp_path: Path) -> None:
    whole = tensors(fit(tmp_path, [ER()], model={"dtype": "float64"}, **SHORT))
    split = fit(
        tmp_path,
        [ER()],
        model={"dtype": "float64"},
        data={"steps_per_task": [3, 2], "batch_size": 1},
        accumulate_grad_batches=4,
    )
    for name, value in tensors(split).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-7, atol=1e-10)


def test_a_ratio_that_is_no_whole_number_of_rows_is_kept_over_the_steps() -> None:
    counts = [rows_of_step(step, 0.4) for step in range(10)]
    assert sum(counts) == 4
    assert set(counts) == {0, 1}
    assert [rows_of_step(step, 8 * 0.2 / 0.8) for step in range(50)] == [2] * 50


@pytest.mark.parametrize("settings", [{"replay_ratio": 0.0}, {"replay_ratio": 1.0}, {"weight": 1.5}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks\.ER\.{next(iter(settings))}"):
        ER(**settings)
