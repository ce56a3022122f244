"""Every adapter of the package with every strategy of the package: a new one of either is picked up by being there."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import secura_lightning.strategies
from secura_lightning.adapters import AdapterConfig
from secura_lightning.data.rows import Row
from secura_lightning.discover import subclasses
from secura_lightning.errors import ConfigError
from secura_lightning.modeling.calibrate import SelfCalibration
from secura_lightning.strategies.base import Strategy
from secura_lightning.strategies.buffer import ReplayBuffer
from tests.adapters.toy import all_config_classes
from tests.strategies.tiny import fit, tensors
from tests.tiny import TinyProbe

ADAPTER_SETTINGS: dict[str, dict[str, Any]] = {"SECURAConfig": {"c": 8, "a": 12}, "FullConfig": {}}
STRATEGY_SETTINGS: dict[str, dict[str, Any]] = {
    "EWC": {"samples": 4, "batch_size": 4},
    "RetentionGuard": {"every_n_steps": 1, "floor": 0.01},
}
NEW_COORDINATES = "takes new coordinates for every task"
REFUSED = {("LoRANullSequenceConfig", name): NEW_COORDINATES for name in ("EWC", "ILoRA", "L2SP")}
"""(adapter, strategy) -> the line that refuses what means nothing together."""


class TinyTexts(TinyProbe):
    """Texts alone: a random model answers no question, so that there is nothing to retain but perplexity."""

    def rows(self) -> list[Row]:
        return []


def strategies() -> dict[str, type[Strategy]]:
    """The strategies that a user may list: those that no other one of the package derives from."""
    package = secura_lightning.strategies.__name__
    found = [kind for kind in subclasses(Strategy) if kind.__module__.startswith(package)]
    parents = {parent for kind in found for parent in kind.__mro__[1:]}
    listed = {kind.__name__: kind for kind in found if kind not in parents and not inspect.isabstract(kind)}
    listed.pop(ReplayBuffer.__name__)  # comes with those that replay
    return dict(sorted(listed.items()))


def adapters() -> dict[str, type[AdapterConfig]]:
    return {kind.__name__: kind for kind in all_config_classes()}


def run(adapter: str, strategy: str, root: Path) -> dict[str, torch.Tensor]:
    kind = adapters()[adapter]
    settings = {"targets": ["q_proj", "down_proj"], **ADAPTER_SETTINGS.get(adapter, {"rank": 2})}
    calibration = SelfCalibration(samples=4, max_length=12, cache=None) if kind.needs_calibration else None
    trainer = fit(
        root,
        [strategies()[strategy](**STRATEGY_SETTINGS.get(strategy, {}))],
        adapter=kind(**settings),
        model={"calibration": calibration},
        data={"steps_per_task": [2, 2], "probe": TinyTexts()},
    )
    return tensors(trainer)


def check(adapter: str, strategy: str, root: Path) -> None:
    refusal = REFUSED.get((adapter, strategy))
    if refusal is not None:
        with pytest.raises(ConfigError, match=refusal):
            run(adapter, strategy, root)
        return
    found = run(adapter, strategy, root)
    assert found
    assert all(torch.isfinite(value).all() for value in found.values())


def test_the_strategies_of_the_methods_are_found() -> None:
    assert set(strategies()) >= {"ER", "EWC", "ILoRA", "LwF", "AGEM", "DERPP", "L2SP"}
    assert len(adapters()) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", strategies())
@pytest.mark.parametrize("adapter", adapters())
def test_adapter_with_strategy(adapter: str, strategy: str, tmp_path: Path) -> None:
    check(adapter, strategy, tmp_path)
