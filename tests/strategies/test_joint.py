"""Fresh and replayed rows in one forward give what two forwards give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import secura_lightning.module
from secura_lightning.callbacks.throughput import Throughput
from secura_lightning.data.encode import IGNORED, Encoded, collate
from secura_lightning.strategies.base import Strategy
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.joint import join
from secura_lightning.strategies.lwf import LwF
from tests.strategies.tiny import fit, tensors


class Forwards(Callback):
    """Counts the model's forwards in every step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        base: Any = pl_module.model.base_model  # type: ignore[union-attr]
        base.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        if self.counts:
            self.counts[-1] += 1

    def on_train_batch_start(self, *_: Any) -> None:
        self.counts.append(0)


def run(root: Path, strategies: list[Strategy], chunked: bool) -> tuple[dict[str, Tensor], list[int]]:
    forwards = Forwards()
    trainer = fit(
        root,
        [*strategies, forwards],
        model={"dtype": "float64", "chunked_loss": chunked},
        data={"steps_per_task": [2, 3]},
        accumulate_grad_batches=2,
    )
    return tensors(trainer), forwards.counts


MADE: dict[str, Any] = {
    "er": lambda: [ER(replay_ratio=0.4)],
    "er-lwf": lambda: [ER(), LwF()],
    "ilora": lambda: [ILoRA(decay=0.8, consistency=3.0)],
}


@pytest.mark.parametrize(
    ("name", "chunked", "joint", "apart"),
    [
        ("er", True, 1, 2),
        ("ilora", False, 2, 3),  # the long-term memory's is its own
        pytest.param("er", False, 1, 2, marks=pytest.mark.slow),
        pytest.param("ilora", True, 2, 3, marks=pytest.mark.slow),
        pytest.param("er-lwf", False, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_one_forward_equals_two(
    name: str, chunked: bool, joint: int, apart: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, counts = run(tmp_path, MADE[name](), chunked)
    assert counts == [1] * 4 + [joint] * 6
    monkeypatch.setattr(secura_lightning.module, "join", lambda *_: None)
    two, counts = run(tmp_path, MADE[name](), chunked)
    assert counts == [1] * 4 + [apart] * 6
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-7, atol=1e-10)


def rows(*lengths: int) -> dict[str, Tensor]:
    return collate([Encoded(list(range(5, 5 + length)), 2) for length in lengths], 1)


def test_parts_stand_one_after_another_padded_to_one_width() -> None:
    found = join(rows(6, 4), rows(9), pad=1)
    assert found is not None
    assert {name: tuple(value.shape) for name, value in found.items()} == dict.fromkeys(found, (3, 9))
    for fresh, part in ((found["input_ids"][:2, :6], "input_ids"), (found["labels"][:2, :6], "labels")):
        assert torch.equal(fresh, rows(6, 4)[part])
    assert found["input_ids"][0, 6:].tolist() == [1] * 3
    assert found["labels"][0, 6:].tolist() == [IGNORED] * 3
    assert found["attention_mask"].sum(1).tolist() == [6, 4, 9]
    assert torch.equal(found["labels"][2], rows(9)["labels"][0])


def test_parts_of_far_lengths_and_packed_rows_stay_apart() -> None:
    many = rows(*[20] * 8)
    assert join(many, rows(40), pad=1) is not None  # 160 positions of padding
    assert join(many, rows(60), pad=1) is None  # 320
    assert join(rows(*[120] * 20), rows(134), pad=1) is not None  # 280 of 2534
    assert join({**many, "position_ids": many["input_ids"]}, rows(20), pad=1) is None


class Tell(Callback):
    """Keeps what :class:`Throughput` counted, and what it should have."""

    def __init__(self, monitor: Throughput) -> None:
        self.monitor = monitor
        self.found: list[int] = []
        self.fresh: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.found.append(self.monitor._steps[-1][1])
        self.fresh.append(int(batch["attention_mask"].sum()))


def test_replayed_tokens_count_and_padding_does_not(tmp_path: Path) -> None:
    monitor, er = Throughput(), ER(replay_ratio=0.4)
    tell = Tell(monitor)
    fit(tmp_path, [er, monitor, tell], data={"steps_per_task": [2, 3]})
    assert tell.found[:2] == tell.fresh[:2]
    assert all(found > fresh for found, fresh in zip(tell.found[2:], tell.fresh[2:], strict=True))
    assert sum(tell.found) - sum(tell.fresh) == er.tokens_beside[0]


def test_time_aside_and_skipped_steps_are_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 15.0, 20.0, 21.0])
    monkeypatch.setattr("secura_lightning.callbacks.throughput.time.perf_counter", lambda: next(clock))
    strategy, monitor = Strategy(), Throughput()
    device = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(callbacks=[strategy], accumulate_grad_batches=1, world_size=1, strategy=device)
    module: Any = SimpleNamespace(log=lambda *_, **__: None)
    batch = {"input_ids": torch.zeros(2, 10), "padding_efficiency": 0.5}
    monitor.on_train_batch_start(trainer, module, batch, 0)
    strategy.seconds_aside += 3.0  # a guard's check
    monitor.on_train_batch_end(trainer, module, None, batch, 0)
    assert monitor.rates() == {"tokens_per_second": 5.0}
    strategy.skipping = True
    monitor.on_train_batch_start(trainer, module, batch, 1)
    monitor.on_train_batch_end(trainer, module, None, batch, 1)
    assert monitor.rates() == {"tokens_per_second": 5.0}
