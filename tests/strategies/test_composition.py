"""Strategies combine in their order, share one buffer, are described in the report, and are refused where senseless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.strategies.agem import AGEM
from secura_lightning.strategies.base import check_resumed, complete, describe, strategies_of
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.derpp import DERPP
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.lwf import LwF
from tests.integration.conftest import fit_into
from tests.strategies.tiny import fit, tensors


def ewc() -> EWC:
    return EWC(ewc_lambda=10.0, samples=4, batch_size=4)


def test_strategies_act_in_their_order_and_share_one_buffer(tmp_path: Path) -> None:
    trainer = fit(tmp_path, [AGEM(), LwF(), ewc(), ER()], data={"steps_per_task": [2, 2]})
    names = [type(strategy).__name__ for strategy in strategies_of(trainer)]
    assert names == ["ReplayBuffer", "ER", "LwF", "EWC", "AGEM"]
    listed = [type(callback).__name__ for callback in trainer.callbacks]
    assert [name for name in listed if name in names] == names  # hooks too run in this order
    er, agem = (next(c for c in trainer.callbacks if isinstance(c, kind)) for kind in (ER, AGEM))
    assert er.buffer is agem.buffer is next(c for c in trainer.callbacks if isinstance(c, ReplayBuffer))
    assert all(torch.isfinite(value).all() for value in tensors(trainer).values())


def test_order_in_the_list_changes_nothing(tmp_path: Path) -> None:
    one, other = (
        tensors(fit(tmp_path, strategies, data={"steps_per_task": [2, 3]}))
        for strategies in ([ER(), AGEM(), LwF()], [LwF(), AGEM(), ReplayBuffer(), ER()])
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("pair", [(ER, ILoRA), (DERPP, ER), (ILoRA, DERPP)])
def test_two_replays_are_refused(pair: tuple[type, type], tmp_path: Path) -> None:
    names = " and ".join(kind.__name__ for kind in pair)
    message = rf"trainer\.callbacks: {names} both replay rows of the buffer beside the fresh ones; keep one"
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, [kind() for kind in pair])


def test_a_buffer_that_nobody_uses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: no strategy of this run uses ReplayBuffer"):
        fit(tmp_path, [ReplayBuffer()])


def test_the_same_strategy_twice_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: ER is listed twice"):
        complete([ER(), ER()])
    callbacks = [{"class_path": "ER"}, {"class_path": "ER", "init_args": {"weight": 0.2}}]
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: ER is listed twice"):
        fit_into(tmp_path, {"trainer.callbacks": callbacks})


def test_report_holds_the_settings(tmp_path: Path) -> None:
    fit(tmp_path, [ER(weight=0.3)], data={"steps_per_task": [2, 2]}, monitored=True)
    meta = json.loads(next(tmp_path.rglob("continual.json")).read_text())["meta"]
    assert meta["strategy"] == {
        "ReplayBuffer": {"capacity": 1000, "policy": "reservoir", "balanced": True, "on_disk": False},
        "ER": {"replay_ratio": 0.5, "weight": 0.3},
    }


def test_checkpoint_of_other_strategies_is_refused() -> None:
    then = describe([ER(), LwF()])
    check_resumed(then, describe([ER(), LwF()]))
    with pytest.raises(
        SecuraError, match=r"the checkpoint has LwF in trainer\.callbacks and the configuration has not"
    ):
        check_resumed(then, describe([ER()]))
    with pytest.raises(
        SecuraError, match=r"the configuration has AGEM in trainer\.callbacks and the checkpoint has not"
    ):
        check_resumed(then, describe([ER(), LwF(), AGEM()]))
    with pytest.raises(SecuraError, match=r"weight=None in trainer\.callbacks' ER, this configuration has 0\.2"):
        check_resumed(then, describe([ER(weight=0.2), LwF()]))


def test_every_documented_combination_runs(tmp_path: Path) -> None:
    found: list[list[Callback]] = [[ILoRA(), ewc()], [DERPP(), LwF(), AGEM()]]
    for strategies in found:
        trainer: Any = fit(tmp_path, strategies, data={"steps_per_task": [2, 2]})
        assert all(torch.isfinite(value).all() for value in tensors(trainer).values())
