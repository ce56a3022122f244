"""CURLoRA's own promises: METHODS section 2, one test each."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from secura_lightning.adapters import AdapterSet, inject
from secura_lightning.adapters.curlora import CURLoRAConfig, CURLoRALayer, draw, selection_probabilities
from secura_lightning.errors import ConfigError

OUT, IN, RANK = 24, 30, 5


def layer_of(bias: bool = False, seed: int = 4, **settings: object) -> CURLoRALayer:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).double().requires_grad_(False)
    config = CURLoRAConfig(**{"rank": RANK, **settings})  # type: ignore[arg-type]
    return config.build("q_proj", base, torch.Generator().manual_seed(seed))  # type: ignore[return-value]


def inputs() -> Tensor:
    return torch.randn(4, 3, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_probabilities_of_columns_with_norms_2_3_5() -> None:
    weight = torch.tensor([[2.0, 0.0, 3.0], [0.0, 3.0, 4.0]])
    norms = weight.norm(dim=0)
    p = torch.tensor([4 / 38, 9 / 38, 25 / 38], dtype=torch.float64)
    torch.testing.assert_close(selection_probabilities(norms, "inverse"), (1 / p) / (1 / p).sum())
    smoothed = 1 / (p + 1e-3)
    torch.testing.assert_close(selection_probabilities(norms, "inverse_smoothed"), smoothed / smoothed.sum())
    torch.testing.assert_close(selection_probabilities(norms, "uniform"), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_smoothed_form_is_almost_uniform_at_4096_columns() -> None:
    norms = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.5
    smoothed = selection_probabilities(norms, "inverse_smoothed")
    assert smoothed.max() / smoothed.min() < 1.6
    inverse = selection_probabilities(norms, "inverse")
    assert inverse.max() / inverse.min() > 8


@pytest.mark.parametrize("replacement", [False, True])
def test_first_draw_follows_the_probabilities(replacement: bool) -> None:
    norms, generator = torch.tensor([2.0, 3.0, 5.0]), torch.Generator().manual_seed(0)
    counts = Counter(draw(norms, 1, "inverse", replacement, generator).item() for _ in range(4000))
    for i, p in enumerate(selection_probabilities(norms, "inverse").tolist()):
        assert counts[i] / 4000 == pytest.approx(p, abs=0.03)


def test_pairs_are_distributed_as_draws_one_after_another_without_putting_back() -> None:
    norms, generator = torch.tensor([2.0, 3.0, 5.0]), torch.Generator().manual_seed(1)
    p = selection_probabilities(norms, "inverse").tolist()
    counts = Counter(tuple(draw(norms, 2, "inverse", False, generator).tolist()) for _ in range(4000))
    for first in range(3):
        for second in range(3):
            expected = 0 if first == second else p[first] * p[second] / (1 - p[first])
            assert counts[first, second] / 4000 == pytest.approx(expected, abs=0.03)


def test_draws_with_replacement_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(torch.ones(8), 8, "uniform", True, generator).tolist() for _ in range(5)]
    assert all(len(set(ids)) < 8 for ids in drawn)


def test_columns_of_zeros_are_drawn_first_and_break_nothing() -> None:
    norms = torch.tensor([1.0, 0.0, 2.0, 0.0])
    for seed in range(20):
        drawn = draw(norms, 3, "inverse", False, torch.Generator().manual_seed(seed))
        assert set(drawn[:2].tolist()) == {1, 3}
    assert selection_probabilities(torch.zeros(4), "inverse").tolist() == [0.25] * 4


def test_smallest_takes_the_smallest_columns_and_rows() -> None:
    layer = layer_of(selection="smallest")
    weight = layer.base.weight
    assert layer.columns.tolist() == weight.norm(dim=0).argsort()[:RANK].tolist()
    assert layer.rows.tolist() == weight.norm(dim=1).argsort()[:RANK].tolist()


@pytest.mark.parametrize("selection", ["inverse", "inverse_smoothed", "uniform"])
def test_draws_depend_on_the_seed_and_on_nothing_else(selection: str) -> None:
    one, same, other = (layer_of(seed=seed, selection=selection) for seed in (1, 1, 2))
    assert torch.equal(one.columns, same.columns)
    assert torch.equal(one.rows, same.rows)
    assert not (torch.equal(one.columns, other.columns) and torch.equal(one.rows, other.rows))
    assert len(set(one.columns.tolist())) == len(set(one.rows.tolist())) == RANK


def test_change_is_alpha_c_u_r() -> None:
    layer = layer_of(alpha=2.5)
    nn.init.normal_(layer.U)
    weight = layer.base.weight
    expected = 2.5 * weight[:, layer.columns] @ layer.U @ weight[layer.rows]
    torch.testing.assert_close(layer.delta_weight(), expected.detach())


@pytest.mark.parametrize("bias", [False, True])
def test_gathered_form_is_the_explicit_product(bias: bool) -> None:
    layer, x = layer_of(bias=bias), inputs()
    nn.init.normal_(layer.U)
    explicit = layer.base(x) + x @ layer.delta_weight().t()
    torch.testing.assert_close(layer(x).detach(), explicit, rtol=1e-13, atol=1e-13)


def test_gradient_is_c_g_r() -> None:
    layer, x = layer_of(), inputs()
    nn.init.normal_(layer.U)
    pull = torch.randn(4, 3, OUT, dtype=torch.float64)
    (got,) = torch.autograd.grad(layer(x), layer.U, pull)
    dense = pull.flatten(0, 1).t() @ x.flatten(0, 1)  # [out, in]
    weight = layer.base.weight
    torch.testing.assert_close(got, weight[:, layer.columns].t() @ dense @ weight[layer.rows].t())


def test_row_norm_uses_the_exact_row_norms() -> None:
    layer = layer_of(norm="row")
    nn.init.normal_(layer.U)
    left, right = layer.factors()
    torch.testing.assert_close(layer.delta_row_square(), (left @ right).square().sum(1))


def test_mistral_7b_trains_24576_parameters() -> None:
    blocks = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 16), "v_proj": nn.Linear(32, 16)})
        for _ in range(32)
    )
    adapters: AdapterSet = inject(blocks, CURLoRAConfig(rank=16, targets=["q_proj", "k_proj", "v_proj"]))
    assert sum(p.numel() for p in adapters.trainable_parameters()) == 24_576


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model\.adapter\.rank is 0"),
        ({"rank": 25}, r"model\.adapter\.rank is 25, but q_proj is 24 x 30: use at most 24"),
        ({"alpha": 0}, r"model\.adapter\.alpha is 0"),
        ({"selection": "largest"}, r"model\.adapter\.selection is 'largest': choose one of inverse, inverse_smoothed"),
        ({"selection": "smallest", "replacement": True}, r"model\.adapter\.replacement: true does nothing"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**settings)
