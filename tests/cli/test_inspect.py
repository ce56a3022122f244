"""What `secura inspect` shows is what `secura fit` trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from secura_lightning.cli.inspect import describe_task, world_size
from secura_lightning.cli.main import main
from secura_lightning.data.rows import Row
from secura_lightning.data.sequence import SequenceDataModule
from tests.data.chat_templates import chat_tokenizer
from tests.evaluation.tiny import ListTask
from tests.integration.conftest import TINY, merged


def inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], *args: str, **changes: Any) -> str:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(merged(TINY, changes)))
    assert main(["inspect", "--config", str(config), *args]) == 0
    return capsys.readouterr().out


def test_examples_lengths_and_plan_are_shown_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model's weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuse)
    shown = inspect(tmp_path, capsys, "--examples", "1")
    for name, rows, steps in (("first", 24, 6), ("second", 10, 3), ("third", 30, 5)):
        assert f": {name}\nrows        {rows} training, 6 validation, 6 test; scored by exact" in shown
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert line.split()[1:4] == [str(rows), str(steps), f"{4 * steps / rows:.2f}"]
    assert "plan: 14 optimizer steps of 4 rows" in shown
    assert shown.count("[[") == shown.count("<eos>]]") == 3
    assert "of a batch's positions hold tokens" in shown


def test_an_overlay_and_keys_change_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"batch_size": 3}, "trainer": {"accumulate_grad_batches": 2}}))
    shown = inspect(
        tmp_path, capsys, "--config", str(overlay), "--trainer.devices", "2", "--only", "second",
        "--data.group_by_length", "true", "--data.steps_per_task", "2",
    )  # fmt: skip
    assert "plan: 6 optimizer steps of 12 rows = data.batch_size 3 x 2 accumulated x 2 devices; 12 batches" in shown
    assert "grouped by length" in shown
    assert ": second" in shown
    assert ": first" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "secnd"], "--only: no task 'secnd'; did you mean 'second'?"),
        (["--examples", "-1"], "--examples is -1; it must be at least 0"),
        (["--trainer.max_epochs", "2"], "trainer.max_epochs: the length of a run is set by its tasks"),
        (["--data.group_by_length", "true", "--data.packing", "true"], "keep one"),
        (["--data.streaming", "true"], "data.streaming: task 'first' is not read from files"),
        (["--data.streaming", "true", "--data.cache", "null"], "give data.cache a folder"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    assert main(["inspect", "--config", str(config), *args]) > 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("secura inspect: ")]
    assert len(told) == 1
    assert message in told[0]


class SplitTask(ListTask):
    """Classes out of balance, and one test row that is a training row."""

    def load(self, split: str) -> list[Row]:  # type: ignore[override]
        labels = ("yes", "no")
        train = [Row(f"t{i}", f"Is {i} small?", labels[i > 5], labels) for i in range(8)]
        return train if split == "train" else [train[0], Row("x", "is  1 SMALL?", "no", labels)]


def test_classes_overlap_and_truncation_are_counted(tokenizer: Any) -> None:
    data = SequenceDataModule([SplitTask("labels", [])], batch_size=2, max_length=5)
    with pytest.warns(UserWarning, match="8 of 8 prompts of 'labels' lost tokens"):
        data.lay_out(tokenizer)
    shown = list(describe_task(data, 0, tokenizer, examples=8, colour=True))
    lost = int(data.encoded[0].truncated.sum())
    assert f"truncated   8 of 8 prompts, {lost} tokens in all; answers are never cut" in shown
    assert any(line.split()[:4] == ["classes", "yes", "6", "75.0%"] for line in shown)
    assert (
        "overlap     1 of 2 test rows are training rows, answer included; 1 share a prompt, "
        "2 where case and white space do not count" in shown
    )
    trained = [line for line in shown if "\033[30;42m" in line]
    assert [" yes" in line for line in trained] == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"), [(1, 1, 1), ("2", 2, 4), ([0, 3], 1, 2), ("0,1,2", 1, 3), ("auto", 1, 1)]
)
def test_devices_are_counted_as_the_trainer_does(devices: Any, nodes: int, expected: int) -> None:
    assert world_size("cpu", devices, nodes) == expected


def test_the_chat_template_and_its_neglect_are_shown() -> None:
    tokenizer = chat_tokenizer("gemma")
    task = ListTask("talk", [Row(str(i), "How are you?", "well") for i in range(3)])
    shown = {}
    for chat in ("auto", False):
        data = SequenceDataModule(tasks=[task], batch_size=1, max_length=256, chat=chat, cache=None)
        data.lay_out(tokenizer)
        shown[chat] = "\n".join(describe_task(data, 0, tokenizer, 1))
    rendered = r"'<s><start_of_turn>user\nPROMPT<end_of_turn>\n<start_of_turn>model\nANSWER<end_of_turn>'"
    assert f"format      chat template: {rendered}\n" in shown["auto"]
    assert "<start_of_turn>model\n  | [[well<end_of_turn>]]" in shown["auto"]
    assert "(the tokenizer has a chat template, which data.chat leaves unused)" in shown[False]
    assert "[[ well</s>]]" in shown[False]
