"""Interrupted and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.integration.conftest import Fit, fit_into


class Interrupted(Exception):
    """Stands for a kill: nothing that is only in memory survives it."""


class Interrupt(Callback):
    """Stop the run at one moment."""

    def __init__(self, step: int, moment: str) -> None:
        self.step = step
        self.moment = moment

    def _at(self, moment: str, trainer: Trainer) -> None:
        if moment == self.moment and trainer.global_step == self.step:
            raise Interrupted

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._at("before the step", trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._at("after the step", trainer)

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Any) -> None:
        self._at("during the evaluation", trainer)

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, index: int, task: Any) -> None:
        self._at("as a task begins", trainer)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"class_path": "LoRAConfig", "init_args": {"rank": 2, "dropout": 0.1, "targets": ["q_proj", "down_proj"]}},
    "full": {"class_path": "FullConfig", "init_args": {"targets": ["q_proj", "o_proj"]}},
    "secura": {"class_path": "SECURAConfig", "init_args": {"c": 8, "a": 12, "norm": "element", "fusion_every": 4}},
    "secura-row-base": {"class_path": "SECURAConfig", "init_args": {"c": 8, "a": 12, "norm": "row", "fusion": "base"}},
}
# Tasks take steps 1-6, 7-9 and 10-14; every second step is saved.
MOMENTS = [
    (4, "after the step"),
    (5, "before the step"),
    (6, "during the evaluation"),
    (6, "as a task begins"),
    (9, "during the evaluation"),
    (13, "after the step"),
]
QUICK = [("lora", *MOMENTS[0]), ("secura", *MOMENTS[2]), ("secura", *MOMENTS[3])]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Fit]:
    """The whole run of an adapter, fitted once."""

    @cache
    def go(adapter: str) -> Fit:
        return fit_into(tmp_path_factory.mktemp(adapter), {"model.adapter": ADAPTERS[adapter]})

    return go


def check(
    uninterrupted: Callable[[str], Fit], run_fit: Callable[..., Fit], adapter: str, step: int, moment: str
) -> None:
    whole = uninterrupted(adapter)
    changes = {"model.adapter": ADAPTERS[adapter]}
    stop = {
        "trainer.callbacks": [{"class_path": f"{__name__}.Interrupt", "init_args": {"step": step, "moment": moment}}]
    }
    with pytest.raises(Interrupted):
        run_fit(changes | stop)
    resumed = run_fit(changes, ("--ckpt_path", "last"))
    assert resumed.report == whole.report
    for part in ("state_dict", "optimizer_states", "rng"):
        assert_same(resumed.checkpoint[part], whole.checkpoint[part], part)


@pytest.mark.parametrize(("adapter", "step", "moment"), QUICK)
def test_resumed_run_equals_uninterrupted_run(
    uninterrupted: Callable[[str], Fit], run_fit: Callable[..., Fit], adapter: str, step: int, moment: str
) -> None:
    check(uninterrupted, run_fit, adapter, step, moment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "step", "moment"),
    [(adapter, *moment) for adapter in ADAPTERS for moment in MOMENTS if (adapter, *moment) not in QUICK],
)
def test_resumed_run_equals_uninterrupted_run_from_everywhere(
    uninterrupted: Callable[[str], Fit], run_fit: Callable[..., Fit], adapter: str, step: int, moment: str
) -> None:
    check(uninterrupted, run_fit, adapter, step, moment)


def test_resuming_a_finished_run_changes_nothing(run_fit: Callable[..., Fit]) -> None:
    whole = run_fit()
    before, tensors = whole.report, whole.checkpoint["state_dict"]
    again = run_fit(None, ("--ckpt_path", "last"))
    assert again.folder == whole.folder
    assert again.report == before
    assert_same(again.checkpoint["state_dict"], tensors)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal in structure and in every bit of every tensor."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert left == right, where
