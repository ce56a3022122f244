"""The sequence form of LoRA-Null inside `secura fit`: a basis for every task, and resumed runs bit for bit the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secura_lightning.cli.checkpoints import rebuild
from secura_lightning.module import ContinualModule
from tests.integration.conftest import Fit, fit_into

RANK = 4
CHANGES = {
    "model.adapter": {
        "class_path": "LoRANullSequenceConfig",
        "init_args": {"rank": RANK, "targets": ["q_proj", "down_proj"]},
    },
    "model.calibration": {
        "class_path": "SelfCalibration",
        "init_args": {"samples": 4, "max_length": 12, "cache": None},
    },
    "data.steps_per_task": 2,
    "data.probe": None,
    "checkpoint.every_n_steps": 1,
    "forgetting.limit": 1,
}


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fit_into(tmp_path_factory.mktemp("sequence"), CHANGES)


def state_after(run: Fit, task: int) -> dict[str, torch.Tensor]:
    (file,) = (run.folder / "checkpoints").glob(f"task{task}-*.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]


def test_every_task_but_the_last_brings_a_new_basis_and_a_larger_frozen_change(finished: Fit) -> None:
    states = [state_after(finished, task) for task in (1, 2, 3)]
    keys = [key.removesuffix("lora_A") for key in states[0] if key.endswith("lora_A")]
    assert len(keys) == 8
    for key in keys:
        first, second, third = states
        assert [state[f"{key}frozen_left"].shape[1] for state in states] == [RANK, 2 * RANK, 3 * RANK]
        assert all(state[f"{key}frozen_left"].any() for state in states)
        assert not torch.equal(first[f"{key}lora_A"], second[f"{key}lora_A"])
        assert torch.equal(second[f"{key}lora_A"], third[f"{key}lora_A"])  # no task follows
        assert torch.equal(third[f"{key}frozen_right"][2 * RANK :], second[f"{key}lora_A"])
        assert torch.equal(second[f"{key}gram"], third[f"{key}gram"])
        width = first[f"{key}lora_A"].shape[1]
        diagonal = torch.arange(1, width + 1).cumsum(0) - 1
        for state, tasks in ((first, 2), (second, 3)):  # the calibration and the finished tasks, one trace each
            torch.testing.assert_close(state[f"{key}gram"][diagonal].sum(), torch.tensor(float(tasks)).double())


def test_a_checkpoint_of_three_tasks_is_rebuilt(finished: Fit) -> None:
    _, model, adapters = rebuild(finished.folder / "checkpoints" / "last.ckpt")
    for key, value in finished.checkpoint["state_dict"].items():
        assert torch.equal(value, adapters.state_dict()[key])
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(
    finished: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    take_step = ContinualModule.on_step_end

    def interrupt(self: ContinualModule) -> None:
        take_step(self)
        if self.trainer.global_step == step:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(ContinualModule, "on_step_end", interrupt)
        with pytest.raises(Interrupted):
            fit_into(tmp_path, CHANGES)
    resumed = fit_into(tmp_path, CHANGES, ("--ckpt_path", "last"))
    assert resumed.report == finished.report
    for key, value in finished.checkpoint["state_dict"].items():
        assert torch.equal(value, resumed.checkpoint["state_dict"][key]), key


def test_tasks_with_longer_rows_than_the_calibration_text_are_measured_whole(tmp_path: Path) -> None:
    """Their inputs are those that were trained on, whatever length the text before training has."""
    short = {**CHANGES["model.calibration"]["init_args"], "max_length": 2}
    changes = {**CHANGES, "model.calibration": {"class_path": "SelfCalibration", "init_args": short}}
    run = fit_into(tmp_path, {**changes, "data.steps_per_task": 1})
    tokens = run.report["meta"]["data"]["max_length"]
    assert tokens > 2
    first, second = state_after(run, 1), state_after(run, 2)
    assert not torch.equal(
        first["model.layers.0.self_attn.q_proj.lora_A"], second["model.layers.0.self_attn.q_proj.lora_A"]
    )
