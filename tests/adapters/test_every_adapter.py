"""What every adapter promises, for every adapter that the package has: a new one is picked up by being there."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secura_lightning.adapters import AdapterConfig, AdapterLayer, inject
from secura_lightning.adapters.delta import DeltaLayer
from secura_lightning.adapters.numerics import linear_shape
from secura_lightning.errors import SecuraError
from tests.adapters.toy import (
    IDS,
    VARIANTS,
    ToyModel,
    adapted,
    dense_weight_with_gradient,
    move,
    numpy_weight,
    train,
)

every_adapter = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def fingerprint(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gradients(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor = IDS) -> list[Tensor]:
    loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten().flip(0))
    return list(torch.autograd.grad(loss, parameters))


def test_the_three_adapters_of_the_spine_are_found() -> None:
    assert {name.split("-")[0] for name in VARIANTS} >= {"LoRA", "SECURA", "Full"}


@every_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_start_is_the_base_bit_for_bit(config: AdapterConfig, dtype: torch.dtype) -> None:
    expected = ToyModel().to(dtype)(IDS)
    model, _ = adapted(config, dtype, moved=False)
    assert torch.equal(model(IDS), expected)


@every_adapter
def test_training_moves_the_output_and_leaves_the_base_alone(config: AdapterConfig) -> None:
    model, adapters = adapted(config, moved=False)
    own = {id(p) for p in adapters.trainable_parameters()}
    base = [p for p in model.parameters() if id(p) not in own]
    before, output = fingerprint(base), model(IDS)
    assert not any(p.requires_grad for p in base)
    train(model, adapters)
    assert fingerprint(base) == before
    assert (model(IDS) - output).abs().max() > 1e-4


@every_adapter
def test_forward_is_the_dense_weight_built_in_numpy(config: AdapterConfig) -> None:
    _, adapters = adapted(config, torch.float64)
    for layer in adapters.layers.values():
        weight = numpy_weight(layer)
        x = torch.randn(3, 5, weight.shape[1], dtype=torch.float64)
        bias = layer.merged_bias()
        expected = x.numpy() @ weight.T + (0 if bias is None else bias.detach().numpy())
        torch.testing.assert_close(layer(x).detach(), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@every_adapter
def test_gradients_are_those_of_finite_differences(config: AdapterConfig) -> None:
    if getattr(config, "detach_norm", False):
        pytest.skip("a detached norm's gradient is not the derivative, on purpose")
    _, adapters = adapted(config, torch.float64)
    layers = adapters.layers
    for layer in (layers["layers.0.q_proj"], layers["layers.0.o_proj"], layers["layers.0.fc"]):
        x = torch.randn(2, 3, linear_shape(layer.base)[1], dtype=torch.float64, requires_grad=True)
        tensors = [p for _, p in layer.adapter_tensors() if p.requires_grad]
        names = [n for n, p in layer.adapter_tensors() if p.requires_grad]

        def output(x: Tensor, *values: Tensor, layer: AdapterLayer = layer, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(output, (x, *tensors), fast_mode=True)


@every_adapter
def test_gradients_are_those_of_plain_autograd_through_the_dense_weight(config: AdapterConfig) -> None:
    _, adapters = adapted(config, torch.float64)
    for layer in adapters.layers.values():
        if not isinstance(layer, DeltaLayer):
            continue
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
        bias = (
            layer.base.bias
            if layer.bias_change is None
            else layer.bias_change + (0 if layer.base.bias is None else layer.base.bias)
        )
        wanted = [x, *(p for _, p in layer.adapter_tensors() if p.requires_grad)]
        pull = torch.randn(2, 3, layer.out_features, dtype=torch.float64)
        expected = torch.autograd.grad(F.linear(x, dense_weight_with_gradient(layer), bias), wanted, pull)
        actual = torch.autograd.grad(layer(x), wanted, pull)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every_adapter
def test_merged_model_is_plain_and_computes_the_same(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.float64)
    expected, plain = model(IDS), ToyModel()
    adapters.merge_()
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    torch.testing.assert_close(model(IDS), expected.detach(), rtol=1e-10, atol=1e-10)


@every_adapter
def test_merge_rounds_once(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.bfloat16)
    layer = adapters.layers["layers.0.q_proj"]
    exact = layer.base.weight.detach().double() + layer.delta_weight().double()
    adapters.merge_()
    merged = model.layers[0].q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().le(exact.abs() * 2**-8 * 1.001 + 1e-9).all()


@every_adapter
def test_disabled_adapters_are_the_base_bit_for_bit(config: AdapterConfig) -> None:
    base_output = ToyModel()(IDS)
    model, adapters = adapted(config)
    moved = model(IDS)
    with adapters.disabled():
        assert torch.equal(model(IDS), base_output)
        with adapters.disabled():
            pass
        assert torch.equal(model(IDS), base_output)
    assert torch.equal(model(IDS), moved)
    with pytest.raises(ZeroDivisionError), adapters.disabled():
        raise ZeroDivisionError
    assert torch.equal(model(IDS), moved)


@every_adapter
def test_state_carries_everything(config: AdapterConfig) -> None:
    model, adapters = adapted(config)
    adapters.end_task()
    move(adapters, seed=9)
    expected = model(IDS)
    other = ToyModel()
    loaded = inject(other, config, seed=77)
    loaded.load_state_dict(copy.deepcopy(adapters.state_dict()))
    assert torch.equal(other(IDS), expected)
    assert loaded.state_dict().keys() == adapters.state_dict().keys()


@every_adapter
def test_state_that_does_not_fit_is_refused_and_changes_nothing(config: AdapterConfig) -> None:
    model, adapters = adapted(config)
    expected, state = model(IDS), {key: torch.zeros_like(value) for key, value in adapters.state_dict().items()}
    first, *rest = state
    cases = {
        "1 missing": {key: state[key] for key in rest},
        "1 unknown": {**state, "layers.9.q_proj.A": torch.zeros(1)},
        "has shape": {**state, first: torch.zeros(3, 3, 3)},
    }
    for message, wrong in cases.items():
        with pytest.raises(SecuraError, match=message):
            adapters.load_state_dict(wrong)
    assert torch.equal(model(IDS), expected)


@every_adapter
def test_state_holds_no_base_tensor(config: AdapterConfig) -> None:
    _, adapters = adapted(config)
    trained = {id(p) for p in adapters.trainable_parameters()}
    assert trained
    assert not any(".base." in key for key in adapters.state_dict())
    small = sum(t.numel() for t in adapters.state_dict().values())
    assert small <= sum(p.numel() for p in adapters.trainable_parameters()) * 2.5


@every_adapter
def test_bf16_autocast_stays_close_and_keeps_gradients_in_fp32(config: AdapterConfig) -> None:
    model, adapters = adapted(config, moved=False)
    move(adapters, size=0.05)
    parameters = adapters.trainable_parameters()
    exact, exact_gradients = model(IDS), gradients(model, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS)
        rounded_gradients = gradients(model, parameters)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 2e-2
    for got, wanted in zip(rounded_gradients, exact_gradients, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() <= 5e-2 * wanted.norm() + 1e-6


@every_adapter
def test_bf16_base_keeps_the_adapter_in_fp32(config: AdapterConfig) -> None:
    model, adapters = adapted(config, torch.bfloat16, moved=False)
    assert {p.dtype for p in adapters.trainable_parameters()} == {torch.float32}
    before = model(IDS)
    train(model, adapters)
    assert model(IDS).dtype == torch.bfloat16
    assert not torch.equal(model(IDS), before)


@every_adapter
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(config: AdapterConfig, reentrant: bool) -> None:
    model, adapters = adapted(config)
    expected = [g.clone() for g in _backward(model, adapters.trainable_parameters())]
    model.checkpointing = reentrant
    for got, wanted in zip(_backward(model, adapters.trainable_parameters()), expected, strict=True):
        assert torch.equal(got, wanted)


def _backward(model: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    for parameter in parameters:
        parameter.grad = None
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten().flip(0)).backward()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@every_adapter
def test_nothing_as_large_as_a_weight_is_kept_for_backward(config: AdapterConfig) -> None:
    _, adapters = adapted(config)
    for layer in adapters.layers.values():
        own = {layer.weight.data_ptr(), layer.base.weight.data_ptr()}
        sizes: list[int] = []

        def pack(tensor: Tensor, own: set[int] = own, sizes: list[int] = sizes) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(3, linear_shape(layer.base)[1], requires_grad=True))
        assert max(sizes, default=0) < layer.base.weight.numel()


@every_adapter
def test_only_the_adapter_trains(config: AdapterConfig) -> None:
    model, adapters = adapted(config)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters.trainable_parameters()}
    assert len(dict(adapters.named_parameters())) == len(adapters.trainable_parameters())


@every_adapter
def test_same_seed_same_start_wherever_it_is_injected(config: AdapterConfig) -> None:
    _, everywhere = adapted(config, moved=False)
    alone = inject(ToyModel(), _only(config, "q_proj"), seed=1)
    for key, value in alone.state_dict().items():
        assert torch.equal(value, everywhere.state_dict()[key])


def _only(config: AdapterConfig, target: str) -> AdapterConfig:
    narrowed = copy.copy(config)
    narrowed.targets = [target]
    return narrowed


@every_adapter
def test_telemetry_is_the_change_that_merging_adds(config: AdapterConfig) -> None:
    _, adapters = adapted(config, torch.float64)
    for name, ratio in adapters.delta_norms().items():
        layer = adapters.layers[name]
        expected = layer.delta_weight().norm() / layer.base.weight.norm()
        torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=0)
    assert adapters.telemetry().keys() == next(iter(adapters.layers.values())).telemetry().keys()


@every_adapter
def test_adapter_answers_for_the_module_that_it_wraps(config: AdapterConfig) -> None:
    model, _ = adapted(config)
    layer = model.layers[0].q_proj
    assert layer.weight.shape == (layer.out_features, layer.in_features)
    assert layer.weight.device.type == "cpu"
    assert layer.bias.shape == (layer.out_features,)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


@every_adapter
def test_a_copied_model_is_independent(config: AdapterConfig) -> None:
    model, adapters = adapted(config)
    expected, twin = model(IDS), copy.deepcopy(model)
    move(adapters, seed=11)
    assert torch.equal(twin(IDS), expected)
    assert not torch.equal(model(IDS), expected)


@every_adapter
def test_no_adapter_asks_the_host_for_a_value_in_forward_or_backward(config: AdapterConfig) -> None:
    model, adapters = adapted(config)
    with _NoSync():
        gradients(model, adapters.trainable_parameters())


class _NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return func(*args, **(kwargs or {}))
