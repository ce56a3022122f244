"""A run with replay, interrupted anywhere and resumed, equals the uninterrupted one bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from secura_lightning.adapters import AdapterConfig, SECURAConfig
from secura_lightning.strategies.agem import AGEM
from secura_lightning.strategies.buffer import ReplayBuffer
from secura_lightning.strategies.derpp import DERPP
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.lwf import LwF
from tests.integration.test_resume import Interrupt, Interrupted, assert_same
from tests.strategies.tiny import fit, lora


def secura() -> AdapterConfig:
    return SECURAConfig(c=8, a=12, targets=["q_proj", "down_proj"], fusion_every=3)


RUNS: dict[str, tuple[Callable[[], list[Callback]], Callable[[], AdapterConfig]]] = {
    "er": (lambda: [ReplayBuffer(8), ER(replay_ratio=0.4)], lambda: lora(dropout=0.2)),
    "er-ring-on-disk": (lambda: [ReplayBuffer(8, "ring", on_disk=True), ER()], lora),
    "ilora": (lambda: [ReplayBuffer(0.5), ILoRA(decay=0.8)], lambda: lora(dropout=0.2)),
    "ilora-secura": (lambda: [ILoRA(decay=0.8)], secura),
    "derpp": (lambda: [ReplayBuffer(8), DERPP(top_k=4)], lambda: lora(dropout=0.2)),
    "agem": (lambda: [AGEM()], lambda: lora(dropout=0.2)),
    "lwf": (lambda: [LwF()], lambda: lora(dropout=0.2)),
    "lwf-secura": (lambda: [LwF()], secura),
    "er-ewc": (lambda: [ER(), EWC(samples=4, batch_size=4)], lora),
    "derpp-lwf-agem": (lambda: [DERPP(top_k=4), LwF(), AGEM()], lora),
}
# Tasks take steps 1-4, 5-7 and 8-10; every second step is saved.
STEPS = [4, 3, 3]
MOMENTS = [
    (3, "after the step"),
    (4, "during the evaluation"),
    (4, "as a task begins"),
    (5, "before the step"),
    (7, "during the evaluation"),
    (9, "after the step"),
]
QUICK = [("er", *MOMENTS[3]), ("ilora-secura", *MOMENTS[5])]


def go(root: Path, name: str, extra: list[Callback], ckpt_path: str | None = None) -> Trainer:
    strategies, adapter = RUNS[name]
    settings: dict[str, Any] = {"adapter": adapter(), "data": {"steps_per_task": STEPS}, "accumulate_grad_batches": 2}
    return fit(root, [*strategies(), *extra], ckpt_path, monitored=True, **settings)


def outcome(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last checkpoint and the report, without what differs between two equal runs."""
    checkpoint = torch.load(next(root.rglob("last.ckpt")), weights_only=True)
    report = json.loads(next(root.rglob("continual.json")).read_text())
    for key in ("wall_time", "git_commit"):
        report["meta"].pop(key)
    checkpoint["callbacks"]["ForgettingMonitor"].pop("elapsed")
    return checkpoint, report


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """What a whole run leaves, fitted once."""

    @cache
    def whole(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        root = tmp_path_factory.mktemp(name)
        go(root, name, [])
        return outcome(root)

    return whole


def check(uninterrupted: Callable[[str], Any], root: Path, name: str, step: int, moment: str) -> None:
    with pytest.raises(Interrupted):
        go(root, name, [Interrupt(step, moment)])
    go(root, name, [], str(next(root.rglob("last.ckpt"))))
    (checkpoint, report), (expected, expected_report) = outcome(root), uninterrupted(name)
    for part in ("state_dict", "optimizer_states", "callbacks", "rng", "strategies"):
        assert_same(checkpoint[part], expected[part], part)
    assert report == expected_report


@pytest.mark.parametrize(("name", "step", "moment"), QUICK)
def test_resumed_run_equals_uninterrupted_run(
    uninterrupted: Callable[[str], Any], tmp_path: Path, name: str, step: int, moment: str
) -> None:
    check(uninterrupted, tmp_path, name, step, moment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "moment"), [(name, *moment) for name in RUNS for moment in MOMENTS if (name, *moment) not in QUICK]
)
def test_resumed_run_equals_uninterrupted_run_from_everywhere(
    uninterrupted: Callable[[str], Any], tmp_path: Path, name: str, step: int, moment: str
) -> None:
    check(uninterrupted, tmp_path, name, step, moment)
