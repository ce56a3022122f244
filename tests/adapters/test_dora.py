"""DoRA: the norm without a dense change, its detachment, dead rows, refusals, and parity with peft."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters import inject
from secura_lightning.adapters.dora import DoRAConfig, DoRALayer
from secura_lightning.adapters.numerics import dense_weight
from secura_lightning.errors import ConfigError

OUT, IN, RANK = 12, 20, 4


def layer_of(dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0, **settings: object) -> DoRALayer:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    config = DoRAConfig(**{"rank": RANK, **settings})  # type: ignore[arg-type]
    return config.build("q_proj", base, torch.Generator().manual_seed(seed))  # type: ignore[return-value]


def push(layer: DoRALayer) -> DoRALayer:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B, layer.magnitude):
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return layer


def plain(layer: DoRALayer, detach: bool) -> Tensor:
    """m (W0 + s B A) / ||W0 + s B A||, as the paper writes it."""
    direction = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    norm = direction.norm(dim=1, keepdim=True)
    return layer.magnitude.unsqueeze(-1) * direction / (norm.detach() if detach else norm)


def test_norm_is_exact_without_a_dense_change() -> None:
    layer = push(layer_of())
    exact = (layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A).square().sum(1)
    got = layer.norm_change() + layer.base.weight.square().sum(1)
    torch.testing.assert_close(got, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_weight_is_that_of_the_paper(rslora: bool) -> None:
    layer = push(layer_of(rslora=rslora, alpha=6))
    assert layer.scale == (6 / RANK**0.5 if rslora else 6 / RANK)
    torch.testing.assert_close(layer.base.weight + layer.delta_weight(), plain(layer, True).detach())


def test_start_is_the_magnitude_of_the_base() -> None:
    layer = layer_of()
    torch.testing.assert_close(layer.magnitude.detach(), layer.base.weight.norm(dim=1))
    assert torch.equal(layer.gain(), torch.ones(OUT, dtype=torch.float64))
    assert not layer.delta_weight().any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_those_of_plain_autograd(detach: bool, bias: bool) -> None:
    layer = push(layer_of(bias=bias, detach_norm=detach))
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    pull, wanted = torch.randn(5, OUT, dtype=torch.float64), (x, layer.lora_A, layer.lora_B, layer.magnitude)
    expected = torch.autograd.grad(F.linear(x, plain(layer, detach), layer.base.bias), wanted, pull)
    for got, want in zip(torch.autograd.grad(layer(x), wanted, pull), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_detached_norm_keeps_nothing_dense_for_backward() -> None:
    layer = push(layer_of())
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, IN, dtype=torch.float64))
    assert shapes
    assert all(OUT not in shape or IN not in shape for shape in shapes)


def test_a_small_change_of_magnitude_survives_bf16() -> None:
    layer, x = layer_of(torch.bfloat16), torch.randn(64, IN).bfloat16()
    with torch.no_grad():
        layer.magnitude.mul_(1 + 2**-10)  # below the resolution of bf16 at 1
    assert not torch.equal(layer(x), layer.base(x))


def test_a_bias_is_not_scaled() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.magnitude.mul_(3)
    torch.testing.assert_close(layer(torch.zeros(1, IN, dtype=torch.float64))[0], layer.base.bias)


def test_a_row_of_zeros_stays_finite_and_can_learn() -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=False)
    base.weight.data[3] = 0
    layer = DoRAConfig(rank=RANK).build("q_proj", base, torch.Generator().manual_seed(0))
    x = torch.randn(5, IN)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    assert layer.lora_B.grad[3].any()


def test_dropout_acts_on_the_low_rank_path_alone() -> None:
    layer, x = push(layer_of(dropout=0.5)), torch.randn(64, IN, dtype=torch.float64)
    weight = layer.base.weight + layer.delta_weight()
    torch.testing.assert_close(layer.eval()(x), F.linear(x, weight, layer.base.bias))
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    mask, gain = F.dropout(torch.ones_like(x), 0.5), layer.gain().unsqueeze(-1)
    low_rank = layer.scale * gain * layer.lora_B @ layer.lora_A
    expected = F.linear(x, gain * layer.base.weight, layer.base.bias) + (x * mask) @ low_rank.t()
    torch.testing.assert_close(dropped, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model\.adapter\.rank is 0"),
        ({"rank": 13}, r"model\.adapter\.rank is 13, but q_proj is 12 x 20: use at most 12"),
        ({"alpha": 0}, r"model\.adapter\.alpha is 0"),
        ({"dropout": -0.1}, r"model\.adapter\.dropout is -0\.1"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_parity_with_peft(bias: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(IN, OUT, bias=bias)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    layer = inject(ours, DoRAConfig(rank=RANK, alpha=10)).layers["0"]
    settings = peft.LoraConfig(r=RANK, lora_alpha=10, use_dora=True, target_modules=["0"])
    other = peft.inject_adapter_in_model(settings, theirs)[0]
    their_m = other.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(their_m, layer.magnitude)  # both start at ||W0||
    assert torch.equal(dense_weight(layer.base), other.base_layer.weight)
    push(layer)
    parameters = (other.lora_A["default"].weight, other.lora_B["default"].weight, their_m)
    for theirs_p, ours_p in zip(parameters, (layer.lora_A, layer.lora_B, layer.magnitude), strict=True):
        theirs_p.data.copy_(ours_p)
    x, pull = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    mine, their = layer(x), other(x)
    torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(mine, (x, layer.lora_A, layer.lora_B, layer.magnitude), pull)
    for a, b in zip(got, torch.autograd.grad(their, (x, *parameters), pull), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
