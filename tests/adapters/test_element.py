"""Weights that `norm: element` keeps while a model is evaluated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secura_lightning import LoRAConfig, SECURAConfig, inject
from secura_lightning.adapters import AdapterConfig
from secura_lightning.adapters.delta import DeltaLayer
from secura_lightning.adapters.element import Limiter


def layer_of(config: AdapterConfig, dtype: torch.dtype = torch.float32) -> DeltaLayer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20)).to(dtype)
    layer = next(iter(inject(model, config).layers.values()))
    assert isinstance(layer, DeltaLayer)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return layer


CONFIGS = [
    LoRAConfig(rank=3, norm="element", targets=["0"]),
    SECURAConfig(c=4, a=5, norm="element", targets=["0"]),
    SECURAConfig(c=4, a=5, norm="element", fusion="base", targets=["0"]),
    LoRAConfig(rank=3, norm="element", bias=True, targets=["0"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_held_outputs_are_the_same_bits(config: AdapterConfig, autocast: bool, dtype: torch.dtype) -> None:
    layer = layer_of(config, dtype)
    layer.end_task()
    x = torch.randn(6, 12, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = layer(x)
        with layer.holding():
            assert torch.equal(layer(x), plain)
            assert torch.equal(layer(x), plain)


def test_the_weight_is_built_once_and_no_longer_than_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(CONFIGS[0]), torch.randn(6, 12)
    built = []
    whole = Limiter.weight
    monkeypatch.setattr(Limiter, "weight", lambda *args: built.append(1) or whole(*args))
    with torch.no_grad(), layer.holding():
        before = layer(x)
        layer(x)
    assert len(built) == 1
    with torch.no_grad():
        layer.lora_B.mul_(2)
        assert not torch.equal(layer(x), before)
    assert len(built) == 2


def test_a_gradient_goes_past_what_is_held() -> None:
    layer, x = layer_of(CONFIGS[1]), torch.randn(6, 12)
    with layer.holding():
        layer(x).sum().backward()
    assert layer.B.grad is not None
    assert layer.B.grad.abs().sum() > 0


def test_it_counts_what_it_keeps() -> None:
    assert layer_of(CONFIGS[0]).held_bytes() == 12 * 20 * 4
    row = layer_of(LoRAConfig(rank=3, norm="row", targets=["0"]))
    assert row.held_bytes() == 0
    with row.holding(), torch.no_grad():
        row(torch.randn(2, 12))
