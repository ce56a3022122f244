"""Every shipped configuration is accepted by the command line, down to each task's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from secura_lightning.cli import fit
from secura_lightning.data.benchmark import BenchmarkTask
from secura_lightning.errors import ConfigError
from secura_lightning.metrics.text import METRICS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_accepted(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[Any, Any]] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, data, **options: started.append((model, data)))
    assert fit.main(["--config", str(config), "--save_dir", str(tmp_path)]) == 0
    ((model, data),) = started
    assert f"configs/{config.name}" in config.read_text()  # the header says how to run it
    for task in data.tasks:
        assert task.metric in METRICS or task.is_text
        if isinstance(task, BenchmarkTask) and task.path is None:
            assert len(task.dataset.revision) == 40  # type: ignore[union-attr]
    if model.spec.base.count("/") == 1 and not model.spec.base.startswith("models/"):
        assert len(model.spec.revision) == 40
        assert [task.name for task in data.tasks] == ["gsm8k", "cnn_dailymail", "news_de", "logiqa"]


def test_wrong_key_of_a_task_gets_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {tasks: [{class_path: GSM8K, init_args: {n_trian: 5}}]}")
    with pytest.raises(ConfigError, match=r"n_trian") as caught:
        fit.main(["--config", str(config)])
    assert "\n" not in str(caught.value)
