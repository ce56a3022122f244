"""The authors' norm of outputs: its oddities, as the docstring lists them, and that it goes nowhere by mistake."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secura_lightning.adapters import LoRAConfig, SECURAConfig, inject
from secura_lightning.adapters.official import official_output
from secura_lightning.errors import ConfigError, SecuraError
from tests.adapters.test_secura import inputs, layer_of, push
from tests.adapters.toy import IDS, ToyModel, adapted, train

BOTH = pytest.mark.parametrize("norm", ["official", "official_max"])


def y0() -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def change() -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_change_it_is_the_base_bit_for_bit_and_can_learn(norm: str, bias: bool) -> None:
    layer, x = layer_of(torch.float32, bias=bias, norm=norm), inputs(torch.float32)
    assert torch.equal(layer(x), layer.base(x))
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.B)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12])
def test_any_change_jumps_to_four_thirds_of_the_base(size: float) -> None:
    jumped = official_output(y0(), size * change(), s=6.0)
    torch.testing.assert_close(jumped, y0() * 4 / 3, rtol=0, atol=100 * size)
    assert (jumped - y0()).norm() / y0().norm() > 0.3


def test_a_layer_jumps_too() -> None:
    layer = push(layer_of(norm="official"), size=1e-9)
    torch.testing.assert_close(layer(inputs()), layer.base(inputs()) * 4 / 3, rtol=1e-6, atol=1e-6)


def test_a_large_change_is_added_to_twice_the_base() -> None:
    delta = 1e3 * change().sign()
    torch.testing.assert_close(official_output(y0(), delta, s=6.0), 2 * y0() + delta, rtol=1e-9, atol=0)


def test_the_divisor_is_the_edge_where_the_restraint_has_it() -> None:
    edge = 0.2310490602  # r_edge of edge = 1.2
    got = official_output(torch.ones(1, dtype=torch.float64), torch.full((1,), edge, dtype=torch.float64), s=6.0)
    assert (2 + edge) / got.item() == pytest.approx(1.2, abs=1e-9)


def test_by_max_jumps_by_as_much_however_small_the_change() -> None:
    jumps = [official_output(y0(), size * change(), s=6.0, by_max=True) for size in (1e-6, 1e-9)]
    torch.testing.assert_close(*jumps, rtol=1e-5, atol=1e-5)
    share = jumps[1] / y0()
    assert share.min() > 4 / 3 - 1e-6
    assert share.max() == pytest.approx(2 / (2 - torch.sigmoid(torch.tensor(6.0)).item()), abs=1e-5)


def test_by_max_a_token_depends_on_its_neighbours() -> None:
    alone = official_output(y0()[:1], change()[:1], s=6.0, by_max=True)
    loud = change()
    loud[1:] *= 1e3
    together = official_output(y0(), loud, s=6.0, by_max=True)[:1]
    assert (alone - together).abs().max() > 0.1
    plain = [official_output(y0()[:1], change()[:1], 6.0), official_output(y0(), loud, 6.0)[:1]]
    assert torch.equal(*plain)


@BOTH
@pytest.mark.parametrize("detach", [False, True])
def test_gradients(norm: str, detach: bool) -> None:
    layer = push(layer_of(norm=norm, detach_norm=detach), 0.1)
    x = inputs().requires_grad_()
    if not detach:
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
        return
    base, raw = layer.base(x.detach()), x.detach() @ (layer.factors()[0] @ layer.factors()[1]).t()
    ratio = raw.abs() / base.abs()
    divisor = (2 - torch.sigmoid(6 * (ratio / ratio.max() if norm == "official_max" else ratio))).detach()
    wanted = torch.autograd.grad(((2 * base + raw) / divisor).square().sum(), layer.B)[0]
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), layer.B)[0], wanted)


@BOTH
def test_it_trains_fuses_and_reports_but_is_not_merged(norm: str) -> None:
    model, adapters = adapted(SECURAConfig(norm=norm), moved=False)  # type: ignore[arg-type]
    train(model, adapters)
    before = model(IDS)
    adapters.end_task()
    torch.testing.assert_close(model(IDS), before)
    assert adapters.telemetry()["relative_change"] > 0
    with pytest.raises(SecuraError, match=rf"norm: {norm} changes outputs.* cannot be merged or exported"):
        adapters.merge_()
    with pytest.raises(SecuraError, match="cannot be merged or exported"):
        adapters.layers["layers.0.o_proj"].low_rank_delta()  # type: ignore[operator]
    assert torch.equal(model(IDS), model(IDS))
    with adapters.disabled():
        assert torch.equal(model(IDS), ToyModel()(IDS))


def test_only_secura_knows_it_and_only_with_frozen_fusion() -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter\.norm is 'official': choose one of none, row, element$"):
        LoRAConfig(norm="official")
    with pytest.raises(ConfigError, match=r"norm: official acts on outputs.*set fusion: frozen"):
        SECURAConfig(norm="official", fusion="base")
    inject(nn.Sequential(nn.Linear(64, 64)), SECURAConfig(norm="official_max", fusion="none"))
