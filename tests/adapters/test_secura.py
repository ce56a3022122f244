"""SECURA's own promises: METHODS section 1, one test each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters import AdapterSet, SECURAConfig, inject
from secura_lightning.adapters.gather import add_gathered
from secura_lightning.adapters.secura import SECURALayer, restraint_edge
from secura_lightning.errors import ConfigError
from tests.adapters.toy import numpy_norm

OUT, IN, C, A = 30, 26, 6, 9
NORMS = ("none", "row", "element")


def layer_of(dtype: torch.dtype = torch.float64, bias: bool = False, **settings: object) -> SECURALayer:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    config = SECURAConfig(**{"c": C, "a": A, **settings})  # type: ignore[arg-type]
    return config.build("q_proj", base, torch.Generator().manual_seed(4))  # type: ignore[return-value]


def push(layer: SECURALayer, size: float = 1.0, seed: int = 1) -> SECURALayer:
    """Give B a value as if trained; at size 1 rows move by something like their own size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.B.copy_(size * 8 * torch.randn(layer.B.shape, generator=generator, dtype=torch.float64))
    return layer


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def raw_delta(layer: SECURALayer) -> np.ndarray:
    """C K R from the base weight and the state alone."""
    weight = layer.base.weight.double().numpy()
    core = layer.A.detach().numpy() @ layer.B.detach().numpy()
    core = core if layer.core is None else core + layer.core.numpy()
    return weight[:, layer.columns.numpy()] @ core @ weight[layer.rows.numpy()]


def test_ids_are_the_rows_and_columns_of_smallest_norm() -> None:
    layer = layer_of()
    weight = layer.base.weight.numpy()
    assert set(layer.rows.tolist()) == set(np.argsort(np.linalg.norm(weight, axis=1))[:C].tolist())
    assert set(layer.columns.tolist()) == set(np.argsort(np.linalg.norm(weight, axis=0))[:C].tolist())
    assert torch.equal(layer.left_basis, layer.base.weight[:, layer.columns])
    assert torch.equal(layer.right(), layer.base.weight[layer.rows])


def test_rows_of_equal_norm_are_taken_in_order() -> None:
    base = nn.Linear(IN, OUT, bias=False)
    nn.init.ones_(base.weight)
    layer = SECURAConfig(c=C, a=A).build("x", base, torch.Generator())
    assert layer.rows.tolist() == layer.columns.tolist() == list(range(C))


def test_a_starts_as_the_corner_of_the_weight_and_b_as_zero() -> None:
    layer = layer_of()
    assert torch.equal(layer.A, layer.base.weight[:C, :A])
    assert layer.A.data_ptr() != layer.base.weight.data_ptr()
    assert not layer.B.any()
    assert sum(p.numel() for _, p in layer.adapter_tensors() if p.requires_grad) == 2 * C * A


def test_the_authors_svd_expression_is_the_corner_of_the_weight() -> None:
    layer = layer_of()
    weight = layer.base.weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expression = left[:C] @ torch.diag(values) @ right[:, :A]
    torch.testing.assert_close(layer.A.detach(), expression.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_zero_b_is_the_base_bit_for_bit(norm: str, bias: bool) -> None:
    layer = layer_of(torch.float32, bias=bias, norm=norm)
    x = inputs(torch.float32)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_a_numpy_build_from_the_state_alone(norm: str, bias: bool) -> None:
    layer = push(layer_of(bias=bias, norm=norm))
    weight = layer.base.weight.numpy()
    final = weight + numpy_norm(weight, raw_delta(layer), norm)
    expected = inputs().numpy() @ final.T + (layer.base.bias.numpy() if bias else 0)
    torch.testing.assert_close(layer(inputs()).detach(), torch.from_numpy(expected), rtol=1e-11, atol=1e-11)


def test_gathering_is_the_explicit_product_in_value_and_gradient() -> None:
    layer = push(layer_of(norm="none"))
    core = (torch.randn(C, C, dtype=torch.float64) * 3).requires_grad_()
    left = layer.left_basis.clone().requires_grad_()
    x = inputs().requires_grad_()
    pull = torch.randn(4, 3, OUT, dtype=torch.float64)
    explicit = F.linear(x, layer.base.weight) + x @ layer.right().t() @ core.t() @ left.t()
    gathered = add_gathered(F.linear(x, layer.base.weight), layer.rows, core, left)
    assert (gathered - explicit).abs().max() < 1e-13 * explicit.abs().max() * 10
    wanted = torch.autograd.grad(explicit, (x, core, left), pull)
    for got, want in zip(torch.autograd.grad(gathered, (x, core, left), pull), wanted, strict=True):
        assert (got - want).abs().max() <= 1e-13 * want.abs().max() * 10


def test_gathering_keeps_no_copy_of_r_where_it_needs_none() -> None:
    assert layer_of(norm="row").right_basis is None
    assert layer_of(norm="element").right_basis is not None


def test_a_large_bias_does_not_blur_the_features() -> None:
    layer, x = push(layer_of(torch.float32, bias=True, norm="none")), inputs(torch.float32)
    wanted = []
    for size in (0.0, 1e6):  # gathered from y0, x R^T would be rounded to steps of 0.06 here
        with torch.no_grad():
            layer.base.bias.fill_(size)
        wanted.append(torch.autograd.grad(layer(x).sum(), layer.B)[0])
    torch.testing.assert_close(wanted[1], wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_output_leaves_the_base_continuously(norm: str) -> None:
    layer, x = push(layer_of(norm=norm)), inputs()
    direction, rates = layer.B.detach().clone(), []
    for size in (1e-6, 1e-5, 1e-4, 1e-3):
        with torch.no_grad():
            layer.B.copy_(size * direction)
        rates.append(((layer(x) - layer.base(x)).norm() / size).item())
    assert max(rates) / min(rates) < 1.05


@pytest.mark.parametrize("norm", ["row", "element"])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_weight_moves_by_more_than_a_third(norm: str, size: float, dtype: torch.dtype) -> None:
    layer = push(layer_of(dtype, norm=norm), size)
    change, weight = layer.delta_weight(), layer.base.weight
    if norm == "row":
        assert (change.norm(dim=1) <= weight.norm(dim=1) / 3 * (1 + 1e-5)).all()
    else:
        rho = (weight.square() + 1e-6 * weight.square().mean()).sqrt()
        assert (change.abs() <= rho / 3 * (1 + 1e-5)).all()
    x = inputs(dtype)
    torch.testing.assert_close(layer(x), F.linear(x, weight + change), rtol=1e-3, atol=1e-4)


def test_r_edge() -> None:
    assert restraint_edge(1.2, 6.0) == pytest.approx(0.2310490602, abs=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_fusion_changes_no_output_and_sums_the_products(norm: str) -> None:
    layer, x, total = layer_of(norm=norm), inputs(), torch.zeros(C, C, dtype=torch.float64)
    for round_ in range(3):
        push(layer, 0.4, seed=round_)
        with torch.no_grad():
            layer.A += 0.01 * round_
        total += (layer.A @ layer.B).detach()
        before, a = layer(x), layer.A.detach().clone()
        fusion = layer.end_task()
        assert torch.equal(layer(x), before)
        assert fusion.reset == [layer.B]
        assert not layer.B.any()
        assert torch.equal(layer.A, a)
    torch.testing.assert_close(layer.core, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["row", "element"])
def test_bound_of_frozen_fusion_holds_for_ever(norm: str) -> None:
    layer = layer_of(norm=norm)
    for round_ in range(8):
        push(layer, 2.0, seed=round_).end_task()
    change, weight = layer.delta_weight(), layer.base.weight
    assert (change.norm(dim=1) <= weight.norm(dim=1) / 3 * (1 + 1e-4)).all()
    assert layer.telemetry()["relative_change"] < 1 / 3 + 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_base_fusion_accumulates_the_limited_change(norm: str) -> None:
    layer, x = layer_of(norm=norm, fusion="base"), inputs()
    pretrained = layer.base.weight.clone()
    moved, bound = pretrained.numpy().copy(), 1.0
    for round_ in range(3):
        push(layer, 0.7, seed=round_)
        moved = moved + numpy_norm(moved, raw_delta(layer), norm)
        if norm == "element":  # the floor stays that of the pretrained weight, a 1e-6 of difference
            torch.testing.assert_close(pretrained + layer.delta_weight(), torch.from_numpy(moved), rtol=1e-4, atol=1e-5)
            moved = (pretrained + layer.delta_weight()).numpy()
        before = layer(x)
        layer.end_task()
        bound *= 4 / 3
        torch.testing.assert_close(layer(x), before, rtol=1e-11, atol=1e-11)
        fused = layer.fused_dense if norm == "element" else layer.fused_left @ layer.right()
        torch.testing.assert_close(fused, torch.from_numpy(moved) - pretrained, rtol=1e-10, atol=1e-11)
        if norm == "row":
            norms = torch.from_numpy(moved).norm(dim=1)
            torch.testing.assert_close(layer.reference_norm, norms, rtol=1e-11, atol=0)
            e, r = layer.fused_left, layer.right()
            by_parts = (
                pretrained.square().sum(1) + 2 * (e * (pretrained @ r.t())).sum(1) + ((e @ (r @ r.t())) * e).sum(1)
            )
            torch.testing.assert_close(norms.square(), by_parts, rtol=1e-11, atol=0)
            assert (fused.norm(dim=1) <= (bound - 1) * pretrained.norm(dim=1) * (1 + 1e-9)).all()
    assert torch.equal(layer.base.weight, pretrained)
    layer.enabled = False
    assert torch.equal(layer(x), F.linear(x, pretrained))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_training_goes_on_exactly_after_base_fusion(norm: str, bias: bool) -> None:
    layer = push(layer_of(norm=norm, fusion="base", bias=bias), 0.5)
    layer.end_task()
    push(layer, 0.5, seed=8)
    x = inputs().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    weight = layer.base.weight + layer.delta_weight()
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base.bias), rtol=1e-11, atol=1e-11)


def test_fusion_none_and_fusion_by_steps() -> None:
    layer = push(layer_of(fusion="none"))
    assert layer.end_task().reset == layer.after_step(5).reset == []
    assert layer.B.any()
    layer = push(layer_of(fusion_every=5))
    assert layer.end_task().reset == layer.after_step(4).reset == []
    assert layer.after_step(10).reset == [layer.B]
    assert not layer.B.any()


def restrained(fusion: str, norm: str, percent: float = 0.9, size: float = 10.0) -> SECURALayer:
    settings = {"restraint": True, "restraint_percent": percent, "restraint_decay": 0.5}
    return push(layer_of(fusion=fusion, norm=norm, **settings), size)


@pytest.mark.parametrize("fusion", ["frozen", "base"])
@pytest.mark.parametrize("norm", NORMS)
def test_restraint_shrinks_the_change_of_the_rows_it_draws(fusion: str, norm: str) -> None:
    layer = restrained(fusion, norm)
    plain = push(layer_of(fusion=fusion, norm=norm), 10.0)
    logs = layer.end_task().logs
    plain.end_task()
    assert logs["moved_rows"] > 0.9
    if fusion == "frozen":  # the factor acts on the change before the norm
        before, after = (one.left_basis @ one.total_core() @ one.right() for one in (plain, layer))
    else:
        before, after = plain.delta_weight(), layer.delta_weight()
    share = after.norm(dim=1) / before.norm(dim=1)
    drawn = share < 0.75
    torch.testing.assert_close(share, torch.where(drawn, 0.5, 1.0).double(), rtol=1e-9, atol=0)
    assert drawn.sum() == max((OUT - C) // 2, OUT // 4)
    expected_rows = restrained(fusion, norm)._draw_rows(torch.tensor(1.0))
    assert drawn.nonzero().flatten().tolist() == sorted(expected_rows.tolist())
    assert logs["restrained_rows"].item() == pytest.approx(drawn.sum().item() / OUT)
    x = inputs()
    expected = F.linear(x, layer.base.weight + layer.delta_weight())
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_restraint_waits_until_most_rows_moved() -> None:
    layer = restrained("frozen", "row", size=1e-3)
    logs = layer.end_task().logs
    assert logs["moved_rows"] == 0
    assert logs["restrained_rows"] == 0
    assert torch.equal(layer.row_decay, torch.ones(OUT, dtype=torch.float64))


def test_restraint_draws_heavy_rows_more_often_and_anew_each_time() -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=False).double()
    with torch.no_grad():
        base.weight[: OUT // 2] *= 20
    layer = SECURAConfig(c=C, a=A, restraint=True, restraint_percent=0.5).build("x", base, torch.Generator())
    draws = [layer._draw_rows(torch.tensor(1.0)) for _ in range(40)]
    assert len({tuple(sorted(d.tolist())) for d in draws}) > 30
    assert all(len(set(d.tolist())) == len(d) for d in draws)
    assert torch.cat(draws).lt(OUT // 2).double().mean() > 0.9


def test_restraint_goes_on_the_same_after_a_round_trip() -> None:
    layer = restrained("frozen", "row")
    layer.end_task()
    state = {name: tensor.detach().clone() for name, tensor in layer.adapter_tensors()}
    push(layer, 10.0, seed=5).end_task()
    other = restrained("frozen", "row")
    for name, tensor in other.adapter_tensors():
        tensor.detach().copy_(state[name])
    other.refresh()
    push(other, 10.0, seed=5).end_task()
    for (name, got), (_, want) in zip(other.adapter_tensors(), layer.adapter_tensors(), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("fusion", ["frozen", "base"])
@pytest.mark.parametrize("norm", NORMS)
def test_state_of_a_fused_and_restrained_layer_carries_over(fusion: str, norm: str) -> None:
    def build() -> tuple[nn.Module, AdapterSet]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, OUT)).double()
        config = SECURAConfig(c=C, a=A, fusion=fusion, norm=norm, restraint=True, restraint_percent=0.1)  # type: ignore[arg-type]
        return model, inject(model, config)

    (model, adapters), (other, loaded) = build(), build()
    layer, x = adapters.layers["0"], inputs()
    push(layer).end_task()
    push(layer, seed=3)
    loaded.load_state_dict({key: value.clone() for key, value in adapters.state_dict().items()})
    assert torch.equal(other(x), model(x))
    assert torch.equal(loaded.layers["0"].delta_weight(), layer.delta_weight())


def test_weight_level_maths_is_fp32_under_bf16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = push(layer_of(torch.float32, norm="row"))
    seen: list[Tensor] = []
    original = SECURALayer.row_scale

    def spy(self: SECURALayer) -> Tensor | None:
        scale = original(self)
        seen.extend(t for t in (scale, self.total_core()) if t is not None)
        return scale

    expected = [original(layer), layer.total_core()]
    monkeypatch.setattr(SECURALayer, "row_scale", spy)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs(torch.float32)).dtype == torch.bfloat16
    assert all(torch.equal(got, want) for got, want in zip(seen, expected, strict=True))


def test_trained_bias_adds_out_parameters_and_merges() -> None:
    config = SECURAConfig(c=C, a=A, bias=True, norm="row")
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    adapters = inject(model, config)
    assert sum(p.numel() for p in adapters.trainable_parameters()) == 2 * C * A + OUT
    with torch.no_grad():
        adapters.layers["0"].bias_change += 1.5
    x = inputs(torch.float32)
    expected = model(x)
    adapters.merge_()
    assert torch.equal(model[0].bias, torch.full((OUT,), 1.5))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c": 27}, r"model\.adapter\.c is 27, but q_proj is 30 x 26: use at most 26"),
        ({"a": 27}, r"model\.adapter\.a is 27, but q_proj is 30 x 26: use at most 26"),
        ({"c": 0}, r"model\.adapter\.c is 0"),
        ({"fusion_every": 0}, r"model\.adapter\.fusion_every is 0"),
        ({"fusion": "none", "restraint": True}, r"model\.adapter\.fusion: none never fuses"),
        ({"fusion": "both"}, r"model\.adapter\.fusion is 'both': choose one of frozen, base, none"),
        ({"norm": "col"}, r"model\.adapter\.norm is 'col': choose one of none, row, element, official, official_max"),
        ({"norm_s": 0}, r"model\.adapter\.norm_s is 0"),
        ({"norm_eps": 0}, r"model\.adapter\.norm_eps is 0"),
        ({"restraint_edge": 2.5}, r"model\.adapter\.restraint_edge is 2\.5: it must lie between 1 and 2"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**settings)


def test_dense_fusion_on_a_quantised_base_is_refused() -> None:
    class Linear4bit(nn.Linear):
        """Known by its name, as bitsandbytes' is."""

    with pytest.raises(ConfigError, match=r"model\.adapter\.fusion: base with norm: element keeps a dense change"):
        SECURAConfig(c=C, a=A, fusion="base").build("q_proj", Linear4bit(IN, OUT), torch.Generator())
