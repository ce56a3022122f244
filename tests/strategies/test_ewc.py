"""EWC: a quadratic penalty whose gradient, added late, is that of the loss."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from secura_lightning.adapters import AdapterSet, LoRAConfig, SECURAConfig
from secura_lightning.adapters.null_sequence import LoRANullSequenceConfig
from secura_lightning.errors import ConfigError
from secura_lightning.modeling.calibrate import TaskCalibration, TextCalibration
from secura_lightning.strategies.ewc import EWC, normalize
from tests.adapters.toy import VARIANTS, adapted, move
from tests.integration.test_resume import assert_same
from tests.strategies.tiny import build, fit, tensors
from tests.tiny import TinyTask

pytestmark = pytest.mark.filterwarnings("ignore:LoRA-Null trains on a random basis")


HELD = [name for name in VARIANTS if not name.startswith("LoRANullSequence")]  # which has no lasting coordinates


def random_weights(adapters: AdapterSet) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.rand(value.shape, generator=generator, dtype=value.dtype)
        for name, value in adapters.anchors().items()
    }


def add(strategy: EWC, adapters: AdapterSet) -> None:
    trainer: Any = SimpleNamespace(log_every_n_steps=0, global_step=0)
    module: Any = SimpleNamespace(adapters=adapters)
    strategy.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "detached" in name else name for name in HELD]
)
def test_added_gradient_is_that_of_the_penalty(name: str) -> None:
    _, adapters = adapted(VARIANTS[name], torch.float64)
    strategy = EWC(ewc_lambda=3.0)
    strategy.hold(adapters, random_weights(adapters))
    move(adapters, seed=8)
    parameters = adapters.trainable_parameters()
    expected = torch.autograd.grad(strategy.penalty(adapters), parameters, allow_unused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    add(strategy, adapters)
    assert sum(float(value.abs().sum()) for value in expected if value is not None) > 0
    for parameter, value in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad - 1, torch.zeros_like(parameter) if value is None else value)


@pytest.mark.parametrize(
    "config", [SECURAConfig(), SECURAConfig(fusion="base"), SECURAConfig(fusion="base", norm="row")]
)
def test_fusion_does_not_move_what_is_held(config: SECURAConfig) -> None:
    _, adapters = adapted(config, torch.float64)
    strategy = EWC(ewc_lambda=2.0)
    strategy.hold(adapters, random_weights(adapters))
    assert strategy.penalty(adapters) == 0
    adapters.end_task()
    assert strategy.penalty(adapters) < 1e-20
    move(adapters, seed=8)
    assert strategy.penalty(adapters) > 1e-3


def test_adapter_without_lasting_coordinates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="new coordinates for every task"):
        fit(tmp_path, [EWC(samples=4)], adapter=LoRANullSequenceConfig(rank=2, targets=["q_proj"]))


def test_step_without_gradients_stays_one() -> None:
    _, adapters = adapted(LoRAConfig())
    strategy = EWC()
    strategy.hold(adapters, random_weights(adapters))
    move(adapters, seed=8)
    add(strategy, adapters)
    assert all(parameter.grad is None for parameter in adapters.trainable_parameters())


def test_normalized_fisher_has_mean_one_and_zeros_stay() -> None:
    fisher = {"a": torch.rand(3, 4), "b": 7 * torch.rand(5)}
    normalize(fisher)
    assert torch.cat([value.flatten() for value in fisher.values()]).mean() == pytest.approx(1)
    zeros = {"a": torch.zeros(3)}
    normalize(zeros)
    assert not zeros["a"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"ewc_lambda": -1.0}, "ewc_lambda"), ({"gamma": 2.0}, "gamma"), ({"samples": 0}, "samples")],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EWC(**arguments)


class PenaltyInLoss(EWC):
    """The same penalty where textbooks have it: in the loss of every micro-batch."""

    def shape_loss(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor, batch: dict[str, Any], batch_idx: int
    ) -> Tensor:
        return loss + self.penalty(pl_module.adapters) if self.anchor else loss  # type: ignore[arg-type]

    def on_before_optimizer_step(self, *_: Any) -> None:
        pass


STEPS = {"steps_per_task": [2, 3, 2], "batch_size": 2}


def fit_ewc(root: Path, *callbacks: Callback) -> Trainer:
    clipped = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    return fit(root, callbacks, data=STEPS, **clipped)


class Snapshots(Callback):
    """The adapters as each task ends."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_task_end(self, trainer: Trainer, *_: Any) -> None:
        self.states.append(tensors(trainer))


def test_equals_the_penalty_in_the_loss_and_leaves_the_first_task_alone(tmp_path: Path) -> None:
    """With accumulated micro-batches and clipping."""
    seen, unheld = Snapshots(), Snapshots()
    settings: dict[str, Any] = {"samples": 6, "batch_size": 4}
    late = fit_ewc(tmp_path, EWC(40.0, **settings), seen)
    early = fit_ewc(tmp_path, PenaltyInLoss(40.0, **settings))
    torch.testing.assert_close(tensors(late), tensors(early), rtol=1e-4, atol=1e-6)
    fit_ewc(tmp_path, EWC(0.0, **settings), unheld)
    for task, same in ((0, True), (1, False)):
        pairs = zip(seen.states[task].values(), unheld.states[task].values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) is same


def test_base_text_holds_the_first_task_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one day\n\na dog and a cat\n\nthe end of it")
    text = TextCalibration(path=str(tmp_path / "text.txt"), samples=3, max_length=12, cache=None)
    moved = {}
    for strength in (0.0, 1e4):
        trainer, module, data = build(
            tmp_path, [EWC(strength, samples=4, base_text=text)], data={"steps_per_task": [3]}
        )
        trainer.fit(module, data)
        moved[strength] = sum(float(v.norm()) for k, v in tensors(trainer).items() if k.endswith("lora_B"))
    assert moved[1e4] < 0.9 * moved[0.0]
    assert EWC(base_text=text).settings()["base_text"]["class"] == "TextCalibration"


def test_a_task_as_base_text_is_asked_as_the_run_asks(tmp_path: Path) -> None:
    text = TaskCalibration(task=TinyTask("base"), samples=2, max_length=24, cache=None)
    assert text.task.prompt_format.chat == "auto"
    fit(tmp_path, [EWC(1.0, samples=2, base_text=text)], data={"steps_per_task": [1], "chat": False})
    assert text.task.prompt_format.chat is False


def test_fisher_accumulates_and_the_anchor_follows(tmp_path: Path) -> None:
    strategy = EWC(samples=6, gamma=0.5)
    trainer = fit(tmp_path, [strategy], data={"steps_per_task": [1, 1, 1]})
    # Each task's F has mean 1: F3 + F2/2 + F1/4.
    assert torch.cat([value.flatten() for value in strategy.weights.values()]).mean() == pytest.approx(1.75, rel=1e-4)
    for name, value in tensors(trainer).items():
        assert torch.equal(strategy.anchor[name], value)


def test_logs_the_penalty_and_its_share(tmp_path: Path) -> None:
    trainer = fit(tmp_path, [EWC(5.0, samples=4)], data={"steps_per_task": [1, 3]})
    logged = trainer.logged_metrics
    assert logged["ewc/penalty"] > 0
    assert 0 < logged["ewc/share"] < 1


class Kill(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise InterruptedError


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    """Killed in the second task, after its last checkpoint and before its end."""
    data = {"steps_per_task": [3, 3, 2]}
    whole = fit(tmp_path / "whole", [first := EWC(20.0, samples=5)], data=data, monitored=True)
    with pytest.raises(InterruptedError):
        fit(tmp_path / "cut", [EWC(20.0, samples=5), Kill()], data=data, monitored=True)
    last = tmp_path / "cut/run/version_0/checkpoints/last.ckpt"
    resumed = fit(tmp_path / "cut", [again := EWC(20.0, samples=5)], str(last), data=data, monitored=True)
    assert_same(tensors(resumed), tensors(whole))
    assert_same(again.state_dict(), first.state_dict())


def test_state_is_what_a_checkpoint_needs(tmp_path: Path) -> None:
    strategy, again = EWC(samples=4), EWC(samples=4)
    fit(tmp_path, [strategy], data={"steps_per_task": [1]})
    torch.save(strategy.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(again.weights, strategy.weights, rtol=0, atol=0)
    torch.testing.assert_close(again.anchor, strategy.anchor, rtol=0, atol=0)
