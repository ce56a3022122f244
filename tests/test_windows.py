"""A window's micro-batches: what is logged is the window's, and a run goes on where another split of it stopped."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from secura_lightning.schedule import Schedule
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.er import ER
from tests.strategies.tiny import fit, tensors

Settings = dict[str, Any]


class Save(Callback):
    """A checkpoint after some optimizer step, as the program's own are written."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and (args[-1] + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path)


def exact(root: Path, rows: int, micro_batches: int, callbacks: Any = (), ckpt: Path | None = None) -> Trainer:
    """A run in fp64 whose windows have 8 rows."""
    return fit(
        root,
        callbacks,
        None if ckpt is None else str(ckpt),
        model={
            "dtype": "float64",
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
            "schedule": Schedule(kind="cosine", warmup=0.5),
        },
        data={"batch_size": rows, "steps_per_task": [4, 3, 2]},
        accumulate_grad_batches=micro_batches,
        logger=CSVLogger(str(root), name="log", version=f"{rows}x{micro_batches}"),
    )


def logged(trainer: Trainer, name: str) -> list[float]:
    """The values of all optimizer steps."""
    with (Path(trainer.log_dir or "") / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("step", [2, 4, 6])  # within a task, at the end of one, within the next
@pytest.mark.parametrize(("then", "now"), [((8, 1), (4, 2)), ((2, 4), (8, 1)), ((4, 2), (2, 4))])
def test_a_run_goes_on_under_another_split_of_its_windows(
    tmp_path: Path, step: int, then: tuple[int, int], now: tuple[int, int]
) -> None:
    whole = exact(tmp_path, *then, [Save(step, tmp_path / "saved.ckpt")])
    resumed = exact(tmp_path, *now, ckpt=tmp_path / "saved.ckpt")
    assert resumed.global_step == whole.global_step == 9
    torch.testing.assert_close(tensors(resumed), tensors(whole), rtol=0, atol=1e-10)


def test_losses_are_logged_over_the_whole_window(tmp_path: Path) -> None:
    replay = lambda: [ReplayBuffer(capacity=6), ER(0.5)]  # noqa: E731
    whole, split = exact(tmp_path, 8, 1, replay()), exact(tmp_path, 2, 4, replay())
    torch.testing.assert_close(logged(split, "train/loss"), logged(whole, "train/loss"), rtol=1e-5, atol=0)
    assert len(logged(whole, "train/loss")) == 9
    values = logged(split, "train/replay_loss")
    torch.testing.assert_close(values, logged(whole, "train/replay_loss"), rtol=1e-5, atol=0)


def test_the_logged_rate_is_the_one_of_the_step(tmp_path: Path) -> None:
    trainer = exact(tmp_path, 8, 1)
    schedule = Schedule(kind="cosine", warmup=0.5)
    expected = [0.5 * schedule.multiplier(within, n) for n in (4, 3, 2) for within in range(n)]
    torch.testing.assert_close(logged(trainer, "train/lr"), expected, rtol=1e-6, atol=0)
