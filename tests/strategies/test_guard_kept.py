"""What the guard checks is what the run keeps: with fusion, restraint and truncation, at a task's end or stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning.adapters import AdapterConfig, LoRANullSequenceConfig, SECURAConfig
from secura_lightning.adapters.base import AdapterLayer
from secura_lightning.callbacks.forgetting import ForgettingMonitor
from secura_lightning.data.rows import Row
from secura_lightning.evaluation.evaluate import ProbeScore
from secura_lightning.modeling.calibrate import SelfCalibration
from secura_lightning.strategies import guard as guard_module
from secura_lightning.strategies.guard import RetentionGuard
from secura_lightning.strategies.memory import as_if_ended
from secura_lightning.strategies.watch import split_probe
from tests.adapters.toy import IDS, adapted
from tests.adapters.toy import move as add_noise
from tests.evaluation.tiny import ListProbe
from tests.strategies.tiny import fit, lora, tensors
from tests.tiny import TinyProbe

ALWAYS: dict[str, Any] = {  # the restraint shrinks rows by half at every fusion
    "restraint": True,
    "restraint_edge": 1.999,
    "restraint_percent": 0.001,
    "restraint_decay": 0.5,
}
TARGETS: dict[str, Any] = {"targets": ["q_proj", "down_proj"]}
MOVING: dict[str, AdapterConfig] = {
    "secura": SECURAConfig(c=8, a=12, **ALWAYS, **TARGETS),
    "secura-base": SECURAConfig(c=8, a=12, fusion="base", norm="row", **ALWAYS, **TARGETS),
    "null-sequence": LoRANullSequenceConfig(rank=4, frozen_rank=1, **TARGETS),
}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.filterwarnings("ignore:LoRA-Null trains on a random basis")
@pytest.mark.parametrize(
    "config",
    [
        SECURAConfig(**ALWAYS),
        SECURAConfig(fusion="base", **ALWAYS),
        SECURAConfig(fusion="base", norm="row", **ALWAYS),
        LoRANullSequenceConfig(rank=4, frozen_rank=1),
    ],
    ids=["frozen", "base-element", "base-row", "null-sequence"],
)
def test_trial_end_is_the_end_and_leaves_no_trace(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.float64)
    add_noise(adapters, seed=3)
    state = {name: value.clone() for name, value in adapters.state_dict().items()}
    before = model(IDS)
    with as_if_ended(adapters):
        inside = model(IDS)
    assert same(adapters.state_dict(), state)
    assert torch.equal(model(IDS), before)
    adapters.end_task()
    assert torch.equal(model(IDS), inside)
    assert not torch.allclose(inside, before)


def test_trial_end_costs_nothing_where_a_task_ends_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapters = adapted(lora(targets=["q_proj"]))
    assert all(type(layer).end_task is AdapterLayer.end_task for layer in adapters.layers.values())
    monkeypatch.setattr(adapters, "state_dict", lambda: pytest.fail("copied"))
    with as_if_ended(adapters):
        pass


def change(pl_module: LightningModule) -> float:
    layers = pl_module.adapters.layers.values()  # type: ignore[union-attr]
    return sum(float(layer.delta_weight().norm()) for layer in layers)


class ByChange(RetentionGuard):
    """Retention that falls with the change of the weights, as it is at the moment of the check."""

    slope = 1.0

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> ProbeScore:
        enabled = next(iter(pl_module.adapters.layers.values())).enabled  # type: ignore[union-attr, operator]
        kept = 1 - self.slope * change(pl_module) if enabled else 1.0
        return ProbeScore("facts", {"kind": kept}, kept, None, 1, 0, None)


class Kept(Callback):
    """The change of the weights after every task's end, fusion and all, and the tensors after every step."""

    def __init__(self) -> None:
        self.changes: list[float] = []
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(tensors(trainer))

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.changes.append(change(pl_module))


def run(root: Path, config: AdapterConfig, guard: RetentionGuard | None, steps: list[int]) -> Kept:
    kept = Kept()
    calibration = SelfCalibration(samples=4, max_length=12, cache=None) if config.needs_calibration else None
    fit(
        root,
        [*([guard] if guard else []), kept],
        adapter=config,
        model={"calibration": calibration},
        data={"steps_per_task": steps, "probe": TinyProbe()},
    )
    return kept


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("secura", "dial"),
        pytest.param("secura", "stop", marks=pytest.mark.slow),
        pytest.param("secura-base", "dial", marks=pytest.mark.slow),
        ("null-sequence", "stop"),
    ],
)
def test_recorded_retention_is_that_of_what_is_kept(name: str, policy: Any, tmp_path: Path) -> None:
    free = run(tmp_path, MOVING[name], None, [3, 3])
    guard = ByChange(0.9, policy, every_n_steps=1, bisections=4)
    guard.slope = 0.15 / max(free.changes)  # the whole change of one task or of both is too much
    kept = run(tmp_path, MOVING[name], guard, [3, 3])
    assert [row["retention"] for row in guard.rows] == [1 - guard.slope * value for value in kept.changes]
    assert all(row["retention"] >= 0.9 for row in guard.rows)
    acted = [row["scale"] < 1 if policy == "dial" else row["steps"] < 3 for row in guard.rows]
    assert any(acted)


def test_a_stopped_task_is_held_through_fusions_by_steps(tmp_path: Path) -> None:
    config = SECURAConfig(c=8, a=12, fusion_every=1, **ALWAYS, **TARGETS)
    guard = ByChange(0.9, "stop", every_n_steps=1)
    guard.slope = 1e6  # nothing but the start keeps the floor
    kept = run(tmp_path, config, guard, [3, 2])
    assert [row["steps"] for row in guard.rows] == [0, 0]
    assert all(same(state, kept.steps[0]) for state in kept.steps[1:])


def test_the_guard_scores_as_the_report_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def score(*arguments: Any) -> ProbeScore:
        seen.append(arguments[5])
        return ProbeScore("p", {"kind": 1.0}, 1.0, None, 1, 0, None)

    monkeypatch.setattr(guard_module, "evaluate_probe", score)
    for normalise in (True, False):
        monitor = ForgettingMonitor(limit=2, normalise=normalise)
        fit(tmp_path, [RetentionGuard(), monitor], data={"steps_per_task": [1], "probe": TinyProbe()})
        assert seen == [normalise] * 2
        seen.clear()


def test_parts_are_named_and_scored_as_the_whole_is() -> None:
    class Strange(ListProbe):
        stop = ("\n",)
        window = 7

        def metric(self, row: Row) -> str:
            return "rouge_l"

    whole = Strange([Row(str(i), f"{i}?", "yes", (), "kind") for i in range(4)])
    for part, name in zip(split_probe(whole, 0.5), ("watched", "held-out"), strict=True):
        assert part.part == name
        assert part.name == f"{whole.name} ({name} part)"
        assert part.metric(whole.rows()[0]) == "rouge_l"
        assert (part.stop, part.window, part.stride) == (("\n",), 7, None)
