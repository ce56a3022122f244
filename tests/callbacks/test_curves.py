"""Runs log no curve that is not explained, and the documentation explains the same ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secura_lightning.adapters import AdapterConfig, LoRANullSequenceConfig, SECURAConfig
from secura_lightning.callbacks.curves import CURVES, curve, describe
from secura_lightning.callbacks.telemetry import Telemetry
from secura_lightning.callbacks.tensorboard import RunLogger
from secura_lightning.callbacks.throughput import Throughput
from secura_lightning.strategies.agem import AGEM
from secura_lightning.strategies.derpp import DERPP
from secura_lightning.strategies.er import ER
from secura_lightning.strategies.ewc import EWC
from secura_lightning.strategies.ilora import ILoRA
from secura_lightning.strategies.l2sp import L2SP
from secura_lightning.strategies.lwf import LwF
from tests.strategies.tiny import fit

PAGE = Path(__file__).parents[2] / "docs" / "tensorboard.md"
NARROW: dict[str, Any] = {"targets": ["q_proj"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "adapter"),
    [
        ([ER(), EWC(samples=4)], SECURAConfig(c=4, a=4, **NARROW)),
        ([DERPP(), L2SP(alpha=0.1)], None),
        ([ILoRA(), LwF()], None),
        ([AGEM()], LoRANullSequenceConfig(rank=2, **NARROW)),
    ],
    ids=["secura-er-ewc", "derpp-l2sp", "ilora-lwf", "null-agem"],
)
def test_every_curve_of_a_run_is_explained(
    strategies: list[Any], adapter: AdapterConfig | None, tmp_path: Path
) -> None:
    watched = [*strategies, Telemetry(every_n_steps=1), Throughput()]
    fit(tmp_path, watched, adapter=adapter, monitored=True, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("epoch", "hp_metric")]  # of Lightning's own logger
    for strategy in strategies:  # each did log something of its own, or on the replayed rows
        name = type(strategy).__name__.lower()
        assert "train/replay_loss" in tags or any(tag.startswith(f"{name}/") for tag in tags)
    assert not [tag for tag in tags if curve(tag) is None]


def test_names_go_before_patterns() -> None:
    assert describe("base/perplexity") != describe("base/capital") == describe("base/*")
    assert curve("someone/elses") is None
    assert describe("someone/elses") == ""


def test_the_page_lists_the_same_curves() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]*) \| (.*) \|$", PAGE.read_text(), re.M)
    assert rows == [(tag, shown.unit, shown.meaning.replace("|", r"\|")) for tag, shown in CURVES.items()]


def test_the_runs_logger_has_no_epochs(tmp_path: Path) -> None:
    for kind in (TensorBoardLogger, RunLogger):
        logger = kind(str(tmp_path), kind.__name__)
        logger.log_metrics({"train/loss": 1.5, "epoch": 0}, 3)
        logger.save()
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5)]
        assert ("epoch" in events.Tags()["scalars"]) is (kind is TensorBoardLogger)
