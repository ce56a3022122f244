"""Run `secura fit` inside the test's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from secura_lightning.cli import fit

TINY: dict[str, Any] = {
    "seed_everything": 7,
    "name": "tiny",
    "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 2},
    "model": {
        "base": "pocket",
        "init": "random",
        "adapter": {
            "class_path": "LoRAConfig",
            "init_args": {"rank": 2, "dropout": 0.1, "targets": ["q_proj", "down_proj"]},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {
        "tasks": [
            {"class_path": "tests.tiny.TinyTask", "init_args": {"name": "first"}},
            {"class_path": "tests.tiny.TinyTask", "init_args": {"name": "second", "rows": 10}},
            {"class_path": "tests.tiny.TinyTask", "init_args": {"name": "third", "rows": 30}},
        ],
        "probe": "tests.tiny.TinyProbe",
        "batch_size": 4,
        "max_length": 48,
        "steps_per_task": [6, 3, 5],
    },
    "checkpoint": {"every_n_steps": 2},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the dotted keys of ``changes`` replaced."""
    result = json.loads(json.dumps(base))
    for dotted, value in changes.items():
        place = result
        *parents, last = dotted.split(".")
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return result


class Fit:
    """A finished run: where it wrote, and what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def report(self) -> dict[str, Any]:
        report = json.loads((self.folder / "continual.json").read_text())
        report["meta"].pop("wall_time")
        report["meta"].pop("git_commit")
        return report

    @property
    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)


def fit_into(
    root: Path, changes: dict[str, Any] | None = None, args: tuple[str, ...] = (), folder: str = "runs"
) -> Fit:
    """Fit the tiny configuration with the dotted keys of ``changes`` replaced and ``args`` behind it."""
    config = root / f"{folder}.yaml"
    config.write_text(yaml.safe_dump(merged(TINY, changes or {})))
    fit.main(["--config", str(config), "--save_dir", str(root / folder), *args])
    return Fit(max((root / folder / "tiny").glob("version_*")))


@pytest.fixture
def run_fit(tmp_path: Path) -> Callable[..., Fit]:
    """:func:`fit_into` the test's own folder."""
    return partial(fit_into, tmp_path)
