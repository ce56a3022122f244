"""The configuration beside a run's results: the one that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

RESUMED = "config.resumed.yaml"


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` where a run begins.

    Where it resumes, that file stays: its results are read with it. What the resumed run has otherwise, such as other
    devices, goes to ``config.resumed.yaml``, once the checkpoint has been accepted.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, from the first process."""
        folder = trainer.log_dir  # a collective call
        assert folder is not None
        self._file = Path(folder) / self.config_filename
        self.save_to_log_dir = False  # as save_config does
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file unless the run has one."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            self._save(self._file)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down what a resumed run has otherwise."""
        now = _settings(self.parser.dump(self.config, skip_none=False))
        if trainer.is_global_zero and now != _settings(self._file.read_text()):
            self._save(self._file.with_name(RESUMED))

    def _save(self, file: Path) -> None:
        self.parser.save(self.config, str(file), skip_none=False, overwrite=True, multifile=self.multifile)


def _settings(text: str) -> dict[str, Any]:
    return {key: value for key, value in yaml.safe_load(text).items() if key != "ckpt_path"}
