"""The front door is quick, and a wrong turn is answered in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from secura_lightning import __version__
from secura_lightning.cli.main import COMMANDS, main
from tests.integration.conftest import TINY


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys; from secura_lightning.cli.main import main; "
        "codes = [main(['--help']), main(['--version'])]; "
        "assert codes == [0, 0]; assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"secura_lightning {__version__}" in done.stdout
    assert all(name in done.stdout for name in COMMANDS)


def test_a_reader_that_left_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as after `secura configs ls | head -1`
    try:
        command = [sys.executable, "-m", "secura_lightning", "configs", "ls"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "did you mean 'fit'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model.adaptr.rank", "3"], 2, "no key 'model.adaptr.rank'; did you mean 'model.adapter"),
        (["--model.adapter.rnk", "3"], 2, "model.adapter: no setting 'rnk'; did you mean 'rank'?"),
        (["--model.adapter", "LoRAConfg"], 2, "model.adapter: no class 'LoRAConfg'; did you mean 'LoRAConfig'?"),
        (["--trainer.callbacks", "[{class_path: EWCC}]"], 2, "trainer.callbacks: no class 'EWCC'; did you mean 'EWC'?"),
        (["--data.tasks", "[TinyTsk]"], 2, "data.tasks: no class 'TinyTsk'; did you mean '"),
        (["--model.optimizer", "torch.optim.AdamX"], 2, "model.optimizer: no class 'AdamX' in torch.optim"),
        (["--model.adapter.rank", "3000"], 2, "model.adapter.rank is 3000"),
        (["--model.adapter.rank", "0"], 2, "model.adapter.rank is 0: it must be at least 1"),
        (["--trainer.callbacks", "ER", "--trainer.callbacks.replay_ratio", "1"], 2, "ER.replay_ratio is 1.0; it must"),
        (["--model.calibration", "SelfCalibration", "--model.calibration.samples", "0"], 2, "calibration.samples is 0"),
        (["--model.adapter.targets", "[q_prj]"], 2, "did you mean q_proj"),
        (["--model.base", "./nowhere"], 1, "model.base: no folder ./nowhere"),
        (["--model.quantization", "nf5"], 2, "model.quantization: expected one of"),
        (["--model.schedule.warmup", "2"], 2, "model.schedule.warmup is 2.0"),
        (["--model.optimizer.lr", "fast"], 2, "lr: cannot be 'fast'"),
        (["--data.tasks", "[]"], 2, "data.tasks is empty"),
        (["--data.batch_size", "0"], 2, "data.batch_size is 0"),
        (["--data.batch_size", "many"], 2, "data.batch_size: expected int, got many"),
        (["--data.epochs_per_task", "2"], 2, "data.epochs_per_task and data.steps_per_task are both set"),
        (["--data.steps_per_task", "[1, 2]"], 2, "data.steps_per_task has 2 entries for 3 tasks"),
        (["--data.max_length", "4"], 1, "raise data.max_length"),
        (["--trainer.max_epochs", "5"], 2, "trainer.max_epochs: the length of a run is set by its tasks"),
        (["--trainer.callbacks", "Nope"], 2, "trainer.callbacks: no class 'Nope'"),
        (["--seed_everything", "true"], 2, "seed_everything: give a number"),
        (["--config", "absent.yaml"], 2, "absent.yaml"),
        (["--ckpt_path", "absent.ckpt"], 1, "--ckpt_path: no file absent.ckpt"),
        (["--ckpt_path", "last"], 1, "--ckpt_path last: no checkpoint under"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    assert main(["fit", "--config", str(config), "--save_dir", str(tmp_path), *arguments]) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("secura fit: ")]
    assert len(told) == 1
    assert message in told[0]
    assert not list(tmp_path.rglob("*.ckpt"))
