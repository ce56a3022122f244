"""LoRA-Null over a sequence: METHODS section 8, one test for each promise of the module's docstring."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters import AdapterSet, LoRANullConfig, LoRANullSequenceConfig, inject
from secura_lightning.adapters.lora_null import NullLayer
from secura_lightning.adapters.null_sequence import NullSequenceLayer, compress, pack, unpack
from secura_lightning.errors import ConfigError, SecuraError
from tests.adapters.test_lora_null import IN, OUT, learn
from tests.adapters.toy import numpy_norm

RANK = 5
NORMS = pytest.mark.parametrize("norm", ["none", "row", "element"])


def spans(*ranges: range) -> list[Tensor]:
    """Inputs [60, in] that fill some axes each, of one random frame."""
    generator = torch.Generator().manual_seed(3)
    frame = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    drawn = [torch.randn(60, len(axes), generator=generator, dtype=torch.float64) for axes in ranges]
    return [x @ frame[list(axes)] for x, axes in zip(drawn, ranges, strict=True)]


BASE, FIRST, SECOND = spans(range(12), range(8, 20), range(16, 26))


def layer_of(kind: type[LoRANullConfig] = LoRANullSequenceConfig, **settings: object) -> NullLayer:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT).double().requires_grad_(False)
    layer = kind(**{"rank": RANK, **settings}).build("q", base, torch.Generator().manual_seed(4))  # type: ignore[arg-type]
    layer.calibrate(BASE.t() @ BASE)
    return layer


def move_b(layer: NullLayer, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_B += size * torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)


def moved_by_the_second_task(layer: NullLayer, size: float) -> float:
    """How far the second task moves the outputs on the first task's inputs, against the first task's own change."""
    move_b(layer, size, seed=1)
    layer.end_task()
    if isinstance(layer, NullSequenceLayer):
        layer.calibrate(FIRST.t() @ FIRST)
    before = layer(FIRST).detach()
    move_b(layer, size, seed=2)
    return ((layer(FIRST).detach() - before).norm() / (before - layer.base(FIRST)).norm()).item()


def test_the_second_task_leaves_the_first_alone_which_plain_lora_null_does_not() -> None:
    assert moved_by_the_second_task(layer_of(), size=1.0) < 1e-7
    assert moved_by_the_second_task(layer_of(LoRANullConfig), size=1.0) > 0.5


@pytest.mark.parametrize("norm", ["row", "element"])
def test_under_a_norm_that_holds_nearly_where_the_change_is_small(norm: str) -> None:
    large, small = (moved_by_the_second_task(layer_of(norm=norm), size) for size in (1e-2, 1e-3))
    assert small < 0.5 * large
    assert small < 0.1 * moved_by_the_second_task(layer_of(LoRANullConfig, norm=norm), size=1e-3)


def test_a_norm_over_each_task_protects_finished_ones_as_no_norm_does() -> None:
    assert moved_by_the_second_task(layer_of(norm="row", norm_over="task"), size=1.0) < 1e-7
    assert moved_by_the_second_task(layer_of(norm="row"), size=1.0) > 1e-2


def test_a_norm_over_each_task_bounds_each_task() -> None:
    layer = layer_of(norm="row", norm_over="task", norm_s=5.0)
    bound = 2 / 5 * layer.base_norm
    for inputs in (FIRST, SECOND):
        before = layer.delta_weight()
        move_b(layer, size=1e3, seed=5)
        change = (layer.delta_weight() - before).norm(dim=1)
        torch.testing.assert_close(change, bound, rtol=1e-2, atol=0)
        assert (change <= bound * (1 + 1e-9)).all()
        layer.end_task()
        layer.calibrate(inputs.t() @ inputs)


@pytest.mark.parametrize("norm", ["none", "element"])
def test_a_norm_over_each_task_is_a_norm_of_rows(norm: str) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.adapter\.norm_over: task .* norm is .*: set model\.adapter\.norm: row"
    ):
        LoRANullSequenceConfig(norm=norm, norm_over="task")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.adapter\.norm_over is 'step': choose one of sequence, task"):
        LoRANullSequenceConfig(norm="row", norm_over="step")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"norm": "none"}, {"norm": "row"}, {"norm": "element"}, {"norm": "row", "norm_over": "task"}],
    ids=["none", "row", "element", "row of a task"],
)
def test_neither_the_end_of_a_task_nor_a_new_basis_changes_an_output(settings: dict[str, object]) -> None:
    layer = layer_of(bias=True, **settings)
    for inputs in (FIRST, SECOND, BASE):
        learn(layer, inputs)
        before, weight = layer(FIRST + SECOND), layer.delta_weight()
        fusion = layer.end_task()
        torch.testing.assert_close(layer(FIRST + SECOND), before, rtol=1e-12, atol=1e-12)
        assert fusion.reset == [layer.lora_B]
        assert not layer.lora_B.any()
        basis = layer.lora_A.clone()
        layer.calibrate(inputs.t() @ inputs)
        assert not torch.equal(layer.lora_A, basis)
        torch.testing.assert_close(layer(FIRST + SECOND), before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.delta_weight(), weight, rtol=1e-12, atol=1e-12)


@NORMS
def test_forward_and_gradients_are_those_of_the_dense_build(norm: str) -> None:
    layer, frozen = layer_of(norm=norm), torch.zeros(OUT, IN, dtype=torch.float64)
    for inputs in (FIRST, SECOND):
        learn(layer, inputs)
        frozen += (layer.lora_B @ layer.lora_A).detach()
        layer.end_task()
        layer.calibrate(inputs.t() @ inputs)
    learn(layer, FIRST)
    delta = frozen + (layer.lora_B @ layer.lora_A).detach()
    weight = layer.base.weight
    dense = weight + torch.from_numpy(numpy_norm(weight.numpy(), delta.numpy(), norm))
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.base.bias))

    def output(x: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_B": b}, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.lora_B), fast_mode=True)


def test_the_basis_is_that_of_the_sum_of_trace_normalised_moments() -> None:
    layer = layer_of(basis="orthonormal")
    layer.calibrate(1e6 * FIRST.t() @ FIRST)  # a task with many rows counts no more than the others
    total = sum(g / g.trace() for g in (x.t() @ x for x in (BASE, FIRST)))
    torch.testing.assert_close(unpack(layer.gram, IN), total, rtol=1e-9, atol=1e-12)
    assert layer.leakage < 1e-6
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.t(), torch.eye(RANK, dtype=torch.float64))
    for inputs in (BASE, FIRST):
        assert (inputs @ layer.lora_A.t()).norm() < 1e-6 * inputs.norm()


def test_the_sum_stays_exact_when_its_rank_reaches_the_matrix() -> None:
    layer, frozen = layer_of(), torch.zeros(OUT, IN, dtype=torch.float64)
    for round_ in range(7):
        inputs = (BASE, FIRST, SECOND)[round_ % 3]
        learn(layer, inputs, steps=3)
        frozen += (layer.lora_B @ layer.lora_A).detach()
        lost = layer.end_task().logs["frozen_truncation"]
        assert layer.frozen_left.shape == (OUT, min(OUT, RANK * (round_ + 1)))
        torch.testing.assert_close(layer.frozen_left @ layer.frozen_right, frozen, rtol=1e-9, atol=1e-11)
        assert lost < 1e-12


def test_a_bounded_rank_keeps_the_best_of_that_rank_and_says_what_it_lost() -> None:
    layer, free = layer_of(frozen_rank=7), layer_of()
    for one in (layer, free):
        for inputs in (FIRST, SECOND):
            learn(one, inputs)
            fusion = one.end_task()
            one.calibrate(inputs.t() @ inputs)
        if one is layer:
            lost = fusion.logs["frozen_truncation"]
    exact = free.frozen_left @ free.frozen_right
    u, s, vt = torch.linalg.svd(exact)
    best = (u[:, :7] * s[:7]) @ vt[:7]
    assert layer.frozen_left.shape == (OUT, 7)
    torch.testing.assert_close(layer.frozen_left @ layer.frozen_right, best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lost, s[7:].norm() / s.norm(), rtol=1e-9, atol=0)
    assert lost > 1e-3


def test_compressing_and_packing_lose_nothing() -> None:
    left, right = torch.randn(9, 20, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    small_left, small_right, lost = compress(left, right, 6)
    torch.testing.assert_close(small_left @ small_right, left @ right)
    assert lost == 0
    symmetric = left @ left.t()
    assert pack(symmetric).shape == (45,)
    assert torch.equal(unpack(pack(symmetric), 9), symmetric.tril() + symmetric.tril(-1).t())


def pair() -> tuple[nn.Module, AdapterSet]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    return model, inject(model, LoRANullSequenceConfig(rank=RANK), seed=int(torch.randint(99, ())))


@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_state_of_any_number_of_tasks_is_loaded_over_any_other(tasks: int) -> None:
    for done_before in (0, 2):
        (model, adapters), (other, loaded) = pair(), pair()
        for one, number in ((adapters, tasks), (loaded, done_before)):
            layer = one.layers["0"]
            layer.calibrate(BASE.t() @ BASE)
            for _ in range(number):
                learn(layer, FIRST.float(), steps=2)  # type: ignore[arg-type]
                one.end_task()
                layer.calibrate(SECOND.t() @ SECOND)
        loaded.load_state_dict({key: value.clone() for key, value in adapters.state_dict().items()})
        x = torch.randn(3, IN)
        assert torch.equal(other(x), model(x))
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapters.state_dict().items())
        for one in (adapters, loaded):  # and what follows is the same
            one.end_task()
            one.layers["0"].calibrate(FIRST.t() @ FIRST)
        assert torch.equal(adapters.layers["0"].lora_A, loaded.layers["0"].lora_A)


def test_state_of_another_shape_is_still_refused_and_changes_nothing() -> None:
    _, adapters = pair()
    adapters.layers["0"].calibrate(BASE.t() @ BASE)
    state = {key: value.clone() for key, value in adapters.state_dict().items()}
    for key, shape in (("0.gram", (7,)), ("0.frozen_left", (OUT + 1, 3)), ("0.frozen_right", (3, IN + 1))):
        with pytest.raises(SecuraError, match=rf"{key} has shape"):
            adapters.load_state_dict({**state, "0.lora_B": torch.ones(OUT, RANK), key: torch.zeros(shape)})
    assert all(torch.equal(value, state[key]) for key, value in adapters.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "v1"}, r"model\.adapter\.version: v1 trains A out of the null space.*set version: v2"),
        ({"moments": "float16"}, r"model\.adapter\.moments is 'float16': choose one of float64, float32"),
        ({"base_weight": 0.0}, r"model\.adapter\.base_weight is 0\.0: it must be above 0"),
        ({"frozen_rank": 0}, r"model\.adapter\.frozen_rank is 0: it must be at least 1"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**settings)


@pytest.mark.parametrize("weight", [0.25, 1.0, 8.0])
def test_calibration_text_weighs_what_the_setting_says(weight: float) -> None:
    layer = layer_of(base_weight=weight)
    layer.calibrate(SECOND.t() @ SECOND)
    grams = [rows.t() @ rows for rows in (BASE, SECOND)]
    first, second = (gram / gram.trace() for gram in grams)
    torch.testing.assert_close(unpack(layer.gram, IN), weight * first + second)


def test_change_of_all_tasks_and_of_the_present_one_can_be_scaled() -> None:
    layer = layer_of()
    learn(layer, FIRST)
    layer.end_task()
    layer.calibrate(SECOND.t() @ SECOND)
    learn(layer, SECOND)
    x, whole = torch.randn(3, IN, dtype=FIRST.dtype), layer.delta_weight()
    end = {name: value.detach().clone() for name, value in layer.anchors().items()}
    with layer.at({name: value / 2 for name, value in end.items()}):
        torch.testing.assert_close(layer.delta_weight(), whole / 2)
    assert torch.equal(layer.delta_weight(), whole)
    earlier = whole - layer.lora_B.detach() @ layer.lora_A
    layer.set_anchors({"lora_B": torch.zeros_like(end["lora_B"]), "frozen_left": end["frozen_left"]})
    torch.testing.assert_close(layer.delta_weight(), earlier)
    layer.set_anchors(layer.untouched())
    assert torch.equal(layer(x), layer.base(x))


def test_snapshot_leaves_the_moments_out_and_restores_the_rest() -> None:
    model, adapters = pair()
    layer = adapters.layers["0"]
    layer.calibrate(BASE.t() @ BASE)
    learn(layer, FIRST.float(), steps=2)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in adapters.state_dict().items()}
    snapshot = adapters.snapshot()
    assert before.keys() - snapshot.keys() == {"0.gram"}
    x = torch.randn(3, IN)
    y = model(x)
    moments = layer.gram.data_ptr()
    adapters.end_task()
    learn(layer, SECOND.float(), steps=2)  # type: ignore[arg-type]
    assert not torch.equal(model(x), y)
    adapters.restore(snapshot)
    assert torch.equal(model(x), y)
    assert all(torch.equal(value, before[name]) for name, value in adapters.state_dict().items())
    assert layer.gram.data_ptr() == moments


def test_layers_of_one_input_keep_one_matrix_between_them_and_take_the_same_basis() -> None:
    query, key, alone = layer_of(basis="orthonormal"), layer_of(basis="orthonormal", rank=3), layer_of()
    for inputs in (FIRST, SECOND):
        query.calibrate(inputs.t() @ inputs, [key])
        alone.calibrate(inputs.t() @ inputs)
    assert torch.equal(query.gram, alone.gram)
    assert key.gram.shape == (0,)
    assert torch.equal(key.lora_A, query.lora_A[:3])
    assert key.leakage < query.leakage
    with pytest.raises(SecuraError, match="kept by another module"):
        key.calibrate(FIRST.t() @ FIRST)


def test_the_matrix_stays_in_fp64_on_the_cpu_whatever_the_model_becomes() -> None:
    model, adapters = pair()
    adapters.layers["0"].calibrate(BASE.t() @ BASE)
    gram = adapters.state_dict()["0.gram"].clone()
    model.to(torch.bfloat16)
    model.to("meta")
    assert adapters.layers["0"].lora_A.is_meta
    assert torch.equal(adapters.state_dict()["0.gram"], gram)


def test_moments_in_fp32_take_half_the_space_and_protect_nearly_as_well() -> None:
    exact, rounded = layer_of(), layer_of(moments="float32")
    for layer in (exact, rounded):
        layer.calibrate(FIRST.t() @ FIRST)
        layer.calibrate(SECOND.t() @ SECOND)
    assert exact.gram.dtype == torch.float64
    assert rounded.gram.dtype == torch.float32
    for inputs in (BASE, FIRST):
        one, other = (
            (inputs @ layer.lora_A.t()).norm() / inputs.norm() / layer.lora_A.norm() for layer in (exact, rounded)
        )
        assert one < other < 1e-6
