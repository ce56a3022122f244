"""LoRA and rsLoRA: scale, start, dropout, refusals, and parity with peft where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secura_lightning.adapters import DoRAConfig, LoRAConfig, inject
from secura_lightning.adapters.lora import LoRALayer
from secura_lightning.errors import ConfigError


def layer_of(seed: int = 0, **settings: object) -> LoRALayer:
    torch.manual_seed(0)
    base = nn.Linear(20, 12).requires_grad_(False)
    config = LoRAConfig(**{"rank": 4, **settings})  # type: ignore[arg-type]
    return config.build("q_proj", base, torch.Generator().manual_seed(seed))  # type: ignore[return-value]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / math.sqrt(4))])
def test_delta_is_scale_times_b_a(rslora: bool, scale: float) -> None:
    layer = layer_of(rslora=rslora)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer.delta_weight(), scale * layer.lora_B @ layer.lora_A)


def test_start_is_kaiming_uniform_and_zero() -> None:
    layer = LoRAConfig(rank=64).build("x", nn.Linear(400, 300), torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_B.any()


def test_gaussian_start_has_the_deviation_of_one_over_rank() -> None:
    layer = LoRAConfig(rank=64, init="gaussian").build("x", nn.Linear(400, 300), torch.Generator().manual_seed(0))
    assert layer.lora_A.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert layer.lora_A.abs().max() > 3 / 64
    assert not layer.lora_B.any()


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig])
def test_orthogonal_start_has_orthonormal_rows(config: type[LoRAConfig | DoRAConfig]) -> None:
    base = nn.Linear(40, 30)
    layer = config(rank=8, init="orthogonal").build("x", base, torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.t(), torch.eye(8))
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), base(x))


def test_start_can_be_taken_again() -> None:
    layer = layer_of(seed=1)
    nn.init.ones_(layer.lora_A)
    nn.init.ones_(layer.lora_B)
    layer.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(layer.lora_A, layer_of(seed=1).lora_A)
    assert not layer.lora_B.any()


def test_start_depends_on_the_seed() -> None:
    assert torch.equal(layer_of(1).lora_A, layer_of(1).lora_A)
    assert not torch.equal(layer_of(1).lora_A, layer_of(2).lora_A)


@pytest.mark.parametrize("norm", ["none", "row"])
def test_dropout_acts_on_the_change_alone_and_in_training_alone(norm: str) -> None:
    layer = layer_of(dropout=0.5, norm=norm)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 20)
    exact = F.linear(x, layer.base.weight + layer.delta_weight(), layer.base.bias)
    torch.testing.assert_close(layer.eval()(x), exact)
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5)
    expected = F.linear(x, layer.base.weight, layer.base.bias) + (x * mask) @ layer.delta_weight().t()
    torch.testing.assert_close(dropped, expected)
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model\.adapter\.rank is 0"),
        ({"rank": 13}, r"model\.adapter\.rank is 13, but q_proj is 12 x 20: use at most 12"),
        ({"alpha": 0}, r"model\.adapter\.alpha is 0"),
        ({"init": "pissa"}, r"model\.adapter\.init is 'pissa': choose one of kaiming, gaussian, orthogonal"),
        ({"dropout": 1.0}, r"model\.adapter\.dropout is 1\.0"),
        ({"dropout": 0.1, "norm": "element"}, r"model\.adapter\.dropout cannot go with model\.adapter\.norm: element"),
        ({"targets": []}, r"model\.adapter\.targets is empty"),
        ({"exclude": "("}, r"model\.adapter\.exclude is not a regular expression"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_parity_with_peft(rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(20, 12)), nn.Sequential(nn.Linear(20, 12))
    theirs.load_state_dict(ours.state_dict())
    adapters = inject(ours, LoRAConfig(rank=4, alpha=10, rslora=rslora))
    settings = peft.LoraConfig(r=4, lora_alpha=10, use_rslora=rslora, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(settings, theirs)
    layer, other = adapters.layers["0"], theirs[0]
    nn.init.normal_(layer.lora_B)
    other.lora_A["default"].weight.data.copy_(layer.lora_A)
    other.lora_B["default"].weight.data.copy_(layer.lora_B)
    x, pull = torch.randn(5, 20, requires_grad=True), torch.randn(5, 12)
    mine, their = ours(x), theirs(x)
    torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(mine, (x, layer.lora_A, layer.lora_B), pull)
    want = torch.autograd.grad(their, (x, other.lora_A["default"].weight, other.lora_B["default"].weight), pull)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
