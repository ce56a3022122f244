"""The front door is quick, and a wrong turn is answered in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from secura_lightning import __version__
from secura_lightning.cli.checkpoints import find_checkpoint
from secura_lightning.cli.config_files import check_config_files
from secura_lightning.cli.main import COMMANDS, CONFIGURED, main
from secura_lightning.errors import SecuraError
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


TABLE = "[{class_path: TableTask, init_args: {name: mail, path: x, template: '{q}', choices: [yes, no]}}]"


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
        (["--data.max_length", "0"], 2, "data.max_length is 0; it must be at least 2"),
        (["--data.steps_per_task", "null", "--data.epochs_per_task", ".nan"], 2, "data.epochs_per_task is nan;"),
        (["--data.steps_per_task", "null", "--data.epochs_per_task", ".inf"], 2, "data.epochs_per_task is inf;"),
        (["--data.tasks", TABLE], 2, "task 'mail': init_args.choices: YAML reads a label as the truth value True;"),
        (["--trainer.accumulate_grad_batches", "0"], 2, "trainer.accumulate_grad_batches is 0; it must be at least 1"),
        (["--seed_everything", "-3"], 2, "seed_everything is -3; it must be from 0"),
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


def one_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """What a failed command told, which must be one line."""
    told = capsys.readouterr().err.splitlines()
    (line,) = [line for line in told if line.startswith(f"secura {command}: ")]
    assert "Traceback" not in "".join(told)
    return line


@pytest.mark.parametrize("command", CONFIGURED)
@pytest.mark.parametrize("option", ["--config {}", "--config={}", "-c {}"])
def test_a_key_that_stands_twice_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    (tmp_path / "good.yaml").write_text("trainer: {devices: 1}\n")
    (tmp_path / "twice.yaml").write_text("trainer: {devices: 1}\ndata: {}\ntrainer: {devices: 2}\n")
    files = [part for name in ("good", "twice") for part in option.format(tmp_path / f"{name}.yaml").split()]
    assert main([command, *files]) == 2
    assert "twice.yaml: not valid YAML: key 'trainer' stands twice" in one_line(capsys, command)


@pytest.mark.parametrize("command", CONFIGURED)
def test_a_file_of_another_encoding_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "a.yaml").write_text("name: x\n", encoding="utf-16")
    assert main([command, "--config", str(tmp_path / "a.yaml")]) == 2
    assert "a.yaml: byte 0 is not UTF-8; save the file as UTF-8" in one_line(capsys, command)


def test_what_the_parser_of_fit_takes_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nname: 2020-13-45\n", encoding="utf-8-sig")
    check_config_files(["--config", str(path), "--config", "{inline: 1}", "--config", "absent.yaml", "-c"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "tiny.yaml", "--save_dir", "afile/x"],
        ["sweep", "-c", "grid.yaml", "--save_dir", "afile"],
        ["configs", "cp", "quickstart", "afile/q.yaml"],
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    Path("grid.yaml").write_text("base: tiny.yaml\naxes: {seed: [1]}\n")
    assert main(arguments) == 1
    assert "afile" in one_line(capsys, arguments[0])
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_last_is_the_newest_version_whatever_lies_beside_it(tmp_path: Path) -> None:
    for name in ("version_0_backup", "version_9", "version_10", "version_11"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    for name in ("version_0_backup", "version_9", "version_10"):
        torch.save({"secura": {}}, tmp_path / name / "checkpoints" / "last.ckpt")
    assert find_checkpoint("last", tmp_path) == tmp_path / "version_10" / "checkpoints" / "last.ckpt"
    assert find_checkpoint("auto", tmp_path / "nowhere") is None
    (tmp_path / "version_10" / "checkpoints" / "last.ckpt").write_bytes(b"PK half")
    with pytest.raises(SecuraError, match=r"^--ckpt_path: .*version_10.*last\.ckpt is damaged"):
        find_checkpoint("last", tmp_path)
