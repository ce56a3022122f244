"""Telemetry: what is logged, when, and that its figures are those of the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secura_lightning.adapters import LoRANullConfig, SECURAConfig
from secura_lightning.callbacks.telemetry import Telemetry, measure
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.ilora import ILoRA
from tests.adapters.toy import adapted
from tests.strategies.tiny import fit, lora


def scalars(root: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(root / "run" / "version_0"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_logs_every_so_many_steps_and_at_task_ends(tmp_path: Path) -> None:
    fit(tmp_path, [ILoRA(), Telemetry(every_n_steps=2)], monitored=True)
    found = scalars(tmp_path)
    for name in ("relative_change/median", "relative_change/max", "restraint", "slow_fast_distance"):
        assert found[f"telemetry/{name}"] == [2, 3, 4, 5, 6, 7]  # tasks end at 3, 5 and 7


def test_null_asks_for_task_ends_alone(tmp_path: Path) -> None:
    fit(tmp_path, [Telemetry(every_n_steps=None)], monitored=True, data={"steps_per_task": [1, 1]})
    found = scalars(tmp_path)
    assert found["telemetry/relative_change/q10"] == [1, 2]


def test_what_a_fusion_did_is_logged_once(tmp_path: Path) -> None:
    config = SECURAConfig(c=4, a=4, targets=["q_proj"])
    fit(tmp_path, [Telemetry(every_n_steps=None)], adapter=config, monitored=True, log_every_n_steps=1)
    found = scalars(tmp_path)
    for name in ("row_ratio", "moved_rows", "restrained_rows"):
        assert found[f"telemetry/{name}"] == [3, 5, 7]  # the tasks' ends, and at no step between
    assert found["train/task"] == list(range(7))


@pytest.mark.filterwarnings("ignore:LoRA-Null trains on a random basis")
@pytest.mark.parametrize("config", [lora(targets=["q_proj", "o_proj"]), SECURAConfig(), LoRANullConfig()])
def test_quantiles_are_those_of_the_layers(config: Any) -> None:
    _, adapters = adapted(config, torch.float64)
    found = measure(adapters)
    changes = [
        float(layer.delta_weight().norm() / layer.merged_weight().sub(_change(layer)).norm())
        for layer in adapters.layers.values()
    ]
    assert float(found["relative_change/max"]) == pytest.approx(max(changes), rel=1e-6)
    assert float(found["relative_change/median"]) == pytest.approx(sorted(changes)[len(changes) // 2], rel=0.5)
    assert float(found["restraint"]) >= 1
    assert ("null_leakage" in found) is isinstance(config, LoRANullConfig)


def _change(layer: Any) -> torch.Tensor:
    from secura_lightning.adapters.numerics import stored_layout

    return stored_layout(layer.base, layer.delta_weight())


def test_bad_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="every_n_steps is 0"):
        Telemetry(0)
