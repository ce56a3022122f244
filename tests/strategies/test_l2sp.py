"""L2-SP pulls back to the start that it names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from secura_lightning.adapters import CURLoRAConfig, LoRAConfig, SECURAConfig
from secura_lightning.errors import ConfigError
from secura_lightning.strategies.l2sp import L2SP
from tests.adapters.toy import adapted, move


@pytest.mark.parametrize("config", [LoRAConfig(), CURLoRAConfig(), SECURAConfig()])
@pytest.mark.parametrize("start", ["base", "task"])
def test_holds_the_start_that_it_names(config: Any, start: Literal["base", "task"]) -> None:
    _, adapters = adapted(config, torch.float64, moved=False)
    strategy, module = L2SP(alpha=2.0, start=start), SimpleNamespace(adapters=adapters)
    trainer = SimpleNamespace(log_every_n_steps=0, global_step=0)
    origin = {name: value.detach().clone() for name, value in adapters.anchors().items()}
    strategy.on_task_start(trainer, module, 0, None)  # type: ignore[arg-type]
    move(adapters)
    strategy.on_task_start(trainer, module, 1, None)  # type: ignore[arg-type]
    now = adapters.anchors()
    distance = sum((now[name] - origin[name]).square().sum() for name in now)
    expected = distance if start == "base" else torch.zeros(())  # alpha / 2 = 1
    torch.testing.assert_close(strategy.penalty(adapters), expected.double())
    move(adapters, seed=8)
    for parameter in adapters.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected_gradients = torch.autograd.grad(strategy.penalty(adapters), adapters.trainable_parameters())
    strategy.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]
    for parameter, gradient in zip(adapters.trainable_parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="alpha is -1"):
        L2SP(alpha=-1)
    with pytest.raises(ConfigError, match="choose base or task"):
        L2SP(start="end")  # type: ignore[arg-type]
