"""The retention guard keeps its promise, exactly and on questions that never steered it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from secura_lightning.adapters import (
    AdapterConfig,
    CURLoRAConfig,
    DoRAConfig,
    FullConfig,
    LoRANullSequenceConfig,
    SECURAConfig,
)
from secura_lightning.data.rows import Row
from secura_lightning.data.sequence import SequenceDataModule
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.evaluate import ProbeScore, RowResult
from secura_lightning.modeling.calibrate import SelfCalibration
from secura_lightning.strategies.base import Strategy
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.guard import RetentionGuard, move
from secura_lightning.strategies.memory import Memory
from secura_lightning.strategies.watch import retention, retention_bound, split_probe
from tests.adapters.toy import IDS, adapted
from tests.adapters.toy import move as add_noise
from tests.evaluation.tiny import ListProbe
from tests.integration.test_resume import assert_same
from tests.strategies.tiny import fit, lora, tensors
from tests.tiny import TinyProbe, TinyTask

DATA: dict[str, Any] = {"steps_per_task": [4, 4], "probe": None}


def moved(state: dict[str, Tensor]) -> float:
    """How far the model is from its base, in the eyes of these tests."""
    return sum(float(value.norm()) for name, value in state.items() if name.endswith("lora_B"))


class ByDistance(RetentionGuard):
    """Retention that falls with every step away from the base."""

    slope = 1.0

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> ProbeScore:
        enabled = next(iter(pl_module.adapters.layers.values())).enabled  # type: ignore[union-attr, operator]
        kept = 1 - self.slope * moved(pl_module.state_dict()) if enabled else 1.0
        return ProbeScore("facts", {"kind": kept}, kept, None, 1, 0, None)


class ByChange(ByDistance):
    """Retention that falls with the change of the weights, whatever the adapter keeps it in."""

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> ProbeScore:
        layers: list[Any] = list(pl_module.adapters.layers.values())  # type: ignore[union-attr, operator]
        change = sum(float(layer.delta_weight().norm()) for layer in layers) if layers[0].enabled else 0.0
        kept = 1 - self.slope * change
        return ProbeScore("facts", {"kind": kept}, kept, None, 1, 0, None)


class Trace(Callback):
    """The adapters after every step and, once strategies acted, after every task."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.tasks: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(tensors(trainer))

    def on_task_end(self, trainer: Trainer, *_: Any) -> None:
        self.tasks.append(tensors(trainer))


def run(root: Path, guard: RetentionGuard | None, *others: Strategy, **settings: Any) -> tuple[Trace, Trainer]:
    trace = Trace()
    data = {**DATA, "probe": TinyProbe() if guard else None}
    listed = [*([guard] if guard else []), *others, trace]
    return trace, fit(root, listed, data=data, **settings)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def slope_for(trace: Trace, step: int) -> float:
    """Retention falls below 0.9 between this step of the first task and the next."""
    return 0.1 / ((moved(trace.steps[step - 1]) + moved(trace.steps[step])) / 2)


def test_stop_returns_to_the_last_good_state_and_lets_the_rest_pass(tmp_path: Path) -> None:
    free, _ = run(tmp_path, None)
    guard = ByDistance(0.9, every_n_steps=1)
    guard.slope = slope_for(free, 2)
    held, trainer = run(tmp_path, guard)
    assert same(held.steps[1], free.steps[1])
    for state in (held.steps[2], held.steps[3], held.tasks[0]):
        assert same(state, free.steps[1])
    assert trainer.global_step == 8
    assert guard.rows[0]["steps"] == 2
    assert all(row["retention"] >= 0.9 for row in guard.rows)
    assert not guard.skipping
    # The second task is learned again, as far as the floor lets it.
    assert guard.outcome()["guard"]["tasks"] == guard.rows


def test_guard_that_never_acts_changes_nothing(tmp_path: Path) -> None:
    free, _ = run(tmp_path, None)
    for policy in ("stop", "dial"):
        guard = ByDistance(0.9, policy, every_n_steps=1)  # type: ignore[arg-type]
        guard.slope = 0.0
        held, _ = run(tmp_path, guard)
        assert same(held.tasks[-1], free.tasks[-1])
        assert [row["scale"] for row in guard.rows] == [1.0, 1.0]


def test_dial_takes_the_largest_scale_that_keeps_the_floor(tmp_path: Path) -> None:
    free, _ = run(tmp_path, None)
    guard = ByDistance(0.9, "dial", every_n_steps=1, bisections=8)
    guard.slope = 0.1 / (0.3 * moved(free.steps[3]))  # the first task may keep 0.3 of its change
    held, _ = run(tmp_path, guard)
    first, second = guard.rows
    assert 0.3 - 2**-8 <= first["scale"] <= 0.3
    assert second["retention"] >= 0.9
    for name, value in held.tasks[0].items():
        if name.endswith("lora_B"):  # which starts at zero
            torch.testing.assert_close(value, first["scale"] * free.steps[3][name], rtol=1e-4, atol=1e-7)


def test_dial_scales_a_task_of_a_null_sequence_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "adapter": LoRANullSequenceConfig(rank=4, norm="row", norm_over="task", targets=["q_proj", "down_proj"]),
        "model": {"calibration": SelfCalibration(samples=4, max_length=12, cache=None)},
    }
    free, _ = run(tmp_path, None, **settings)
    guard = ByChange(0.9, "dial", every_n_steps=1, bisections=8)
    guard.slope = 0.1 / (0.3 * moved(free.steps[3]))
    held, _ = run(tmp_path, guard, **settings)
    assert 0 < guard.rows[0]["scale"] < 1
    assert all(row["retention"] >= 0.9 for row in guard.rows)
    for name, value in held.tasks[0].items():
        if name.endswith("frozen_left"):  # to which B was moved as the task ended, its rows limited by the norm
            kept = float(value.norm() / free.tasks[0][name].norm())
            assert kept == pytest.approx(guard.rows[0]["scale"], rel=0.05)


def test_later_strategies_see_the_dialled_state(tmp_path: Path) -> None:
    guard, ewc = ByDistance(0.99, "dial"), EWC(samples=4)
    guard.slope = 1.0
    held, _ = run(tmp_path, guard, ewc)
    assert guard.rows[-1]["scale"] < 1
    assert same(ewc.anchor, held.tasks[-1])


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize(("policy", "step"), [("stop", 3), pytest.param("dial", 5, marks=pytest.mark.slow)])
def test_resumed_run_keeps_the_same_promise(tmp_path: Path, policy: Any, step: int) -> None:
    free, _ = run(tmp_path, None)

    def guard() -> ByDistance:
        made = ByDistance(0.9, policy, every_n_steps=1)
        made.slope = slope_for(free, 1)
        return made

    probe = {**DATA, "probe": TinyProbe()}
    whole = fit(tmp_path / "whole", [first := guard()], data=probe, monitored=True)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "cut", [guard(), Kill(step)], data=probe, monitored=True)
    last = tmp_path / "cut/run/version_0/checkpoints/last.ckpt"
    resumed = fit(tmp_path / "cut", [again := guard()], str(last), data={**probe, "probe": TinyProbe()}, monitored=True)
    assert same(tensors(resumed), tensors(whole))
    assert again.rows == first.rows
    assert_same(again.state_dict(), first.state_dict())


@pytest.mark.parametrize(
    "config",
    [
        lora(targets=["q_proj"]),
        CURLoRAConfig(),
        DoRAConfig(),
        FullConfig(),
        SECURAConfig(),
        SECURAConfig(fusion="base"),
    ],
    ids=lambda config: f"{type(config).__name__}-{getattr(config, 'fusion', '')}",
)
def test_path_has_both_states_at_its_ends(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.float64)
    adapters.end_task()
    add_noise(adapters, seed=5)
    model.eval()
    start, before = Memory(adapters).values, model(IDS)
    add_noise(adapters, seed=6)
    end, after = Memory(adapters).values, model(IDS)
    outputs = {}
    for scale in (0.0, 0.5, 1.0):
        move(adapters, start, end, scale)
        outputs[scale] = model(IDS)
        adapters.end_task()  # a fusion moves nothing here
        torch.testing.assert_close(model(IDS), outputs[scale])
    torch.testing.assert_close(outputs[0.0], before)
    torch.testing.assert_close(outputs[1.0], after)
    assert not torch.allclose(outputs[0.5], before, atol=1e-4)


@pytest.mark.parametrize(
    "config", [lora(targets=["q_proj"]), CURLoRAConfig(), DoRAConfig(), FullConfig(), SECURAConfig(norm="row")]
)
def test_untouched_anchors_are_the_base(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.float64)
    model.eval()
    with adapters.disabled():
        base = model(IDS)
    assert not torch.allclose(model(IDS), base)
    for layer in adapters.layers.values():
        layer.set_anchors(layer.untouched())
    torch.testing.assert_close(model(IDS), base)


def test_watched_and_reported_questions_are_disjoint_and_together_all() -> None:
    rows = [Row(f"{kind}{i}", f"{kind} {i}?", str(i), (), kind) for kind in ("a", "b") for i in range(7)]
    watched, rest = split_probe(ListProbe([*rows, Row("c0", "c?", "c", (), "c")], ["some text"]), 0.5)
    assert {row.id for row in watched.rows()}.isdisjoint(row.id for row in rest.rows())
    assert len(watched.rows()) + len(rest.rows()) == 15
    assert {row.kind for row in watched.rows()} == {"a", "b"}  # a single question stays with the report
    assert {row.kind for row in rest.rows()} == {"a", "b", "c"}
    assert watched.texts() == []
    assert rest.texts() == ["some text"]
    again, _ = split_probe(ListProbe(rows[::-1]), 0.5)
    assert {row.id for row in again.rows()} == {row.id for row in watched.rows()}


def test_its_own_probe_is_asked_as_the_run_asks() -> None:
    watch = ListProbe([Row("0", "0?", "yes", ("yes",), "kind")])
    data = SequenceDataModule([TinyTask()], chat=False)
    assert watch.prompt_format.chat == "auto"
    trainer: Any = SimpleNamespace(callbacks=[], datamodule=data)
    RetentionGuard(0.5, watch=watch).setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert watch.prompt_format.chat is False


def test_report_scores_the_rest_of_the_probe(tmp_path: Path) -> None:
    guard = RetentionGuard(0.5, every_n_steps=2, batch_size=8)
    known = [
        Row(f"{i}", f"{i}?", "yes", ("yes",), "kind") for i in range(8)
    ]  # one choice: even a random model is right
    trainer = fit(tmp_path, [guard], data={**DATA, "probe": ListProbe(known, ["text"])})
    assert [row["retention"] for row in guard.rows] == [1.0, 1.0]
    rest = {row.id for row in trainer.datamodule.probe.rows()}  # type: ignore[attr-defined]
    assert rest.isdisjoint(row.id for row in guard.watched.rows())  # type: ignore[union-attr]
    assert len(rest) == 4
    told = guard.outcome()["guard"]
    assert told["watched"] == {"probe": "facts (watched part)", "questions": 4, "texts": 0}
    assert told["held_out"] == {"probe": "facts (held-out part)", "questions": 4, "texts": 1}


def test_is_logged_beside_its_floor(tmp_path: Path) -> None:
    guard = ByDistance(0.9, "dial", every_n_steps=2)
    fit(tmp_path, [guard], data={**DATA, "probe": TinyProbe()}, monitored=True)
    events = EventAccumulator(str(tmp_path / "run/version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("guard/retention")] == [2, 4, 6, 8]
    assert [event.value for event in events.Scalars("guard/floor")] == pytest.approx([0.9] * 4)
    assert [event.value for event in events.Scalars("guard/scale")] == pytest.approx([r["scale"] for r in guard.rows])
    report = json.loads((tmp_path / "run/version_0/continual.json").read_text())
    assert report["meta"]["guard"]["tasks"] == guard.rows


class ByAnswers(ByDistance):
    """The same with forty questions, of which the first ones are still known."""

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> ProbeScore:
        kept = super()._score(trainer, pl_module).accuracy
        rows = [RowResult(str(i), "kind", "", "", "", float(i < 40 * kept)) for i in range(40)]
        known = sum(row.score for row in rows) / 40
        return ProbeScore("facts", {"kind": known}, known, None, 40, 0, None, None, rows)


def test_a_confidence_asks_for_more_than_the_watched_questions(tmp_path: Path) -> None:
    plain, sure = ByAnswers(0.8, "dial"), ByAnswers(0.8, "dial", confidence=0.95)
    for guard in (plain, sure):
        fit(tmp_path, [guard], data={"steps_per_task": [4], "probe": TinyProbe()})
    assert plain.rows[0]["undialled"] == sure.rows[0]["undialled"] < 0.8
    assert plain.rows[0]["sure"] == plain.rows[0]["retention"] == pytest.approx(0.8, abs=0.05)
    assert sure.rows[0]["retention"] > sure.rows[0]["sure"] >= 0.8
    assert 0 < sure.rows[0]["scale"] < plain.rows[0]["scale"]
    assert sure.outcome()["guard"]["confidence"] == 0.95


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Questions drawn from a world in which a fifth of what the base knew is forgotten."""
    draws = np.random.default_rng(3)
    above = 0
    for _ in range(300):
        base = {kind: (draws.random(40) < 0.9).astype(float).tolist() for kind in "abc"}
        now = {kind: [x * float(draws.random() < 0.8) for x in scores] for kind, scores in base.items()}
        above += retention_bound(now, base, 0.95, resamples=400) > 0.8
    assert 0.01 <= above / 300 <= 0.08  # about one in twenty promises too much
    same = {"a": [1.0, 0.0, 1.0], "unknown": [0.0, 0.0]}
    assert retention_bound(same, same, 0.99) == 1.0


def test_a_confidence_over_text_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RetentionGuard\.confidence: the probe 'facts .*' is text alone"):
        fit(tmp_path, [RetentionGuard(confidence=0.9)], data={**DATA, "probe": ListProbe([], ["one", "two", "three"])})


def test_retention_is_relative_to_the_base_and_bounded() -> None:
    def score(perplexity: float | None = None, **kinds: float) -> ProbeScore:
        return ProbeScore("p", kinds, 0.0, perplexity, 1, 1, None)

    assert retention(score(a=0.4, b=0.9), score(a=0.8, b=0.6)) == pytest.approx(0.75)
    assert retention(score(a=0.4, b=0.9), score(a=0.8, b=0.0)) == pytest.approx(0.5)
    assert retention(score(20.0), score(10.0)) == pytest.approx(0.5)
    assert retention(score(5.0), score(10.0)) == 1.0
    with pytest.raises(ConfigError, match="nothing to retain"):
        retention(score(a=0.4), score(a=0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floor": 1.2}, "floor is 1.2"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"policy": "pray"}, "choose stop or dial"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetentionGuard(**arguments)


def test_run_without_a_probe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.probe, or its own watch"):
        fit(tmp_path, [RetentionGuard()], data=DATA)


def test_another_judge_of_the_weights_is_refused(tmp_path: Path) -> None:
    class Judge(Strategy):
        evaluate_with = "long_term"

    with pytest.raises(ConfigError, match="evaluate_with: working"):
        fit(tmp_path, [RetentionGuard(), Judge()], data={**DATA, "probe": TinyProbe()})
