"""LoRA-Null inside `secura fit`: calibrated once, before training, and never again for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from secura_lightning.cli.checkpoints import rebuild
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling import calibrate as module
from secura_lightning.modeling.calibrate import Calibration, SelfCalibration
from secura_lightning.module import ContinualModule
from secura_lightning.resumed import check_identity
from tests.integration.conftest import Fit, fit_into

CHANGES = {
    "model.adapter": {"class_path": "LoRANullConfig", "init_args": {"rank": 4, "targets": ["q_proj", "down_proj"]}},
    "model.calibration": {
        "class_path": "SelfCalibration",
        "init_args": {"samples": 4, "max_length": 12, "cache": None},
    },
    "data.steps_per_task": 2,
    "checkpoint.every_n_steps": 1,
    "forgetting.limit": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fit_into(tmp_path_factory.mktemp("null"), CHANGES)


def test_the_checkpoint_holds_a_calibrated_start(finished: Fit) -> None:
    state = finished.checkpoint["state_dict"]
    leakages = torch.stack([value for key, value in state.items() if key.endswith("leakage")])
    assert len(leakages) == 8
    assert leakages.ge(0).all()
    assert leakages.lt(0.1).all()  # 4 of 160 random directions would leak 0.16
    assert any(value.any() for key, value in state.items() if key.endswith("lora_B"))


def test_a_checkpoint_is_rebuilt_without_calibrating(finished: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stream_grams", lambda *_: pytest.fail("calibrated again"))
    _, model, adapters = rebuild(finished.folder / "checkpoints" / "last.ckpt")
    assert all(layer.calibrated for layer in adapters.layers.values())
    for key, value in finished.checkpoint["state_dict"].items():
        assert torch.equal(value, adapters.state_dict()[key])
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_a_checkpoint_of_another_calibration_is_refused(finished: Fit) -> None:
    then = finished.checkpoint["secura"]
    check_identity(then, then)
    for key in ("samples", "max_length", "temperature"):
        with pytest.raises(SecuraError, match=rf"the checkpoint has model\.calibration\.{key}="):
            check_identity(then, {**then, "calibration": {**then["calibration"], key: 99}})


@pytest.mark.parametrize(
    "entry",
    [
        {"class_path": "SelfCalibration", "init_args": {"temperature": 0.7}},
        {"class_path": "TextCalibration", "init_args": {"path": "text.txt", "cache": None}},
        {"class_path": "TaskCalibration", "init_args": {"task": {"class_path": "tests.tiny.TinyTask"}, "samples": 3}},
    ],
    ids=lambda entry: entry["class_path"],
)
def test_yaml_names_the_source_by_its_class_alone(entry: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--calibration", type=Calibration | None)
    made = parser.instantiate(parser.parse_object({"calibration": entry})).calibration
    assert type(made).__name__ == entry["class_path"]
    for key, value in entry["init_args"].items():
        assert key == "task" or getattr(made, key) == value


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(finished: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    step = ContinualModule.on_step_end

    def interrupt(self: ContinualModule) -> None:
        step(self)
        if self.trainer.global_step == 4:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(ContinualModule, "on_step_end", interrupt)
        with pytest.raises(Interrupted):
            fit_into(tmp_path, CHANGES)
    monkeypatch.setattr(module, "stream_grams", lambda *_: pytest.fail("calibrated again"))
    resumed = fit_into(tmp_path, CHANGES, ("--ckpt_path", "last"))
    assert resumed.report == finished.report
    for key, value in finished.checkpoint["state_dict"].items():
        assert torch.equal(value, resumed.checkpoint["state_dict"][key]), key


def test_calibration_of_an_adapter_that_takes_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.calibration: SECURAConfig starts without calibration: remove it"):
        ContinualModule(calibration=SelfCalibration())
