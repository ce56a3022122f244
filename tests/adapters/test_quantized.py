"""On a 4-bit and an 8-bit base: identity at the start, the dense build of the dequantised weight, training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secura_lightning.adapters import AdapterConfig, FullConfig, inject
from secura_lightning.adapters.numerics import dense_weight
from tests.adapters.toy import VARIANTS, move

pytestmark = pytest.mark.slow
OUT, IN = 64, 128


def quantised(kind: str, bias: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type=kind, compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer.to("cpu")).requires_grad_(False)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_dense_weight_is_what_the_layer_multiplies_by(kind: str) -> None:
    model = quantised(kind, bias=False)
    dense = dense_weight(model[0])
    assert dense.shape == (OUT, IN)
    product = model(torch.eye(IN)).t()
    assert (product.float() - dense.float()).norm() / dense.float().norm() < 2e-2
    torch.testing.assert_close(dense_weight(model[0]), dense)  # also after the first forward


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [v for v in VARIANTS.values() if not isinstance(v, FullConfig)], ids=repr)
def test_adapter_on_a_quantised_base(config: AdapterConfig, kind: str, bias: bool) -> None:
    model = quantised(kind, bias)
    x = torch.randn(9, IN)
    base_output = model(x)
    codes = model[0].weight.data.clone()
    adapters = inject(model, config)
    assert torch.equal(model(x), base_output)
    move(adapters, size=0.1)
    layer = adapters.layers["0"]
    change = x @ layer.delta_weight().t() + (0 if layer.delta_bias() is None else layer.delta_bias())
    torch.testing.assert_close(model(x) - base_output, change, rtol=2e-3, atol=2e-3)
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].base.weight.data, codes)
