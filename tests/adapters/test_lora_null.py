"""LoRA-Null's own promises: METHODS section 3, one test each."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters import inject
from secura_lightning.adapters.lora_null import LoRANullConfig, NullLayer, null_bases, null_start
from secura_lightning.errors import ConfigError
from tests.adapters.toy import numpy_norm

OUT, IN, RANK = 24, 32, 6
VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])
BASES = pytest.mark.parametrize("basis", ["weight", "orthonormal"])


def text() -> Tensor:
    """[n, in] inputs that fill all but 8 directions, as strongly as those of a language model differ."""
    generator = torch.Generator().manual_seed(5)
    frame = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    size = torch.cat([torch.logspace(1, -1, IN - 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)])
    return (torch.randn(200, IN, generator=generator, dtype=torch.float64) * size) @ frame.t()


def layer_of(dtype: torch.dtype = torch.float64, calibrated: bool = True, **settings: object) -> NullLayer:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT).to(dtype).requires_grad_(False)
    config = LoRANullConfig(**{"rank": RANK, **settings})  # type: ignore[arg-type]
    layer = config.build("q_proj", base, torch.Generator().manual_seed(4))
    if calibrated:
        layer.calibrate(text().t() @ text())
    return layer


def learn(layer: NullLayer, x: Tensor, steps: int = 30) -> None:
    target = torch.randn(len(x), OUT, generator=torch.Generator().manual_seed(8)).to(x.dtype)
    optimizer = torch.optim.AdamW([p for _, p in layer.adapter_tensors() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()


def null_basis(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return null_bases(gram, [rank])[0]


def test_basis_is_orthonormal_and_least_of_all() -> None:
    gram = text().t() @ text()
    null, leakage = null_basis(gram, RANK)
    torch.testing.assert_close(null.t() @ null, torch.eye(RANK, dtype=torch.float64))
    values = torch.linalg.eigvalsh(gram)
    torch.testing.assert_close(torch.trace(null.t() @ gram @ null), values[:RANK].sum(), rtol=0, atol=1e-9)
    assert leakage < 1e-7
    assert null_basis(gram, 12)[1] > 1e-4  # only 8 directions are empty
    torch.testing.assert_close(
        null_basis(gram, 12)[1], (text() @ null_basis(gram, 12)[0]).norm() / text().norm(), rtol=1e-6, atol=0
    )


@BASES
def test_inputs_like_the_calibration_hardly_pass_a0(basis: str) -> None:
    layer, random = layer_of(basis=basis), torch.randn(RANK, IN, dtype=torch.float64)
    passed = (text() @ layer.lora_A.t()).norm() / (layer.lora_A.norm() * text().norm())
    assert passed < 1e-6 * (text() @ random.t()).norm() / (random.norm() * text().norm())


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float64, 0, 1e-7), (torch.float32, 1e-8, 1e-3), (torch.float16, 1e-3, 1e-1)]
)
def test_half_precision_moments_let_a_thousandth_of_the_inputs_through(
    dtype: torch.dtype, least: float, most: float
) -> None:
    x = text() / text().abs().max()
    null, _ = null_basis((x.to(dtype).t() @ x.to(dtype)).double(), RANK)
    assert least <= (x @ null).norm() / x.norm() < most


def test_start_is_that_of_two_svds() -> None:
    weight = layer_of().base.weight
    u, _, _ = torch.linalg.svd(text().t())  # the authors: null space by SVD of X, then SVD of W0 projected
    null = u[:, -RANK:]
    left, s, right = torch.linalg.svd(weight @ null @ null.t(), full_matrices=False)
    root = s[:RANK].sqrt()
    a, b = root.unsqueeze(-1) * right[:RANK], left[:, :RANK] * root
    # Six of eight empty directions are any six: take the same ones.
    start_a, start_b = null_start(weight, null, "weight")
    torch.testing.assert_close(start_b @ start_a, b @ a)
    torch.testing.assert_close(start_a.t() @ start_a, a.t() @ a)
    torch.testing.assert_close(start_b @ start_b.t(), b @ b.t())


def test_both_bases_have_one_product() -> None:
    weight, null = layer_of().base.weight, null_basis(text().t() @ text(), RANK)[0]
    products = [b @ a for a, b in (null_start(weight, null, basis) for basis in ("weight", "orthonormal"))]  # type: ignore[arg-type]
    torch.testing.assert_close(*products)
    torch.testing.assert_close(products[0], weight @ null @ null.t())


@VERSIONS
@BASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_is_the_base_bit_for_bit(version: str, basis: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype, version=version, basis=basis), torch.randn(7, IN).to(dtype)
    assert torch.equal(layer(x), layer.base(x))


@BASES
def test_v2_never_touches_the_calibrated_outputs(basis: str) -> None:
    layer = layer_of(basis=basis, version="v2")
    x = text()
    before = layer.base(x)
    learn(layer, torch.randn(16, IN, dtype=torch.float64))
    assert layer.delta_weight().norm() / layer.base.weight.norm() > 0.05
    assert (layer(x) - before).norm() / before.norm() < 1e-7


def test_v1_starts_there_and_leaves() -> None:
    layer, x = layer_of(version="v1"), text()
    before = layer.base(x)
    learn(layer, torch.randn(16, IN, dtype=torch.float64))
    assert (layer(x) - before).norm() / before.norm() > 1e-3


def test_v2_is_lora_with_a_frozen_and_v1_the_difference() -> None:
    one, two = layer_of(version="v1"), layer_of(version="v2")
    torch.testing.assert_close(one.start_A, two.lora_A)
    assert [name for name, p in two.adapter_tensors() if p.requires_grad] == ["lora_B"]
    step = torch.randn(OUT, RANK, dtype=torch.float64)
    with torch.no_grad():
        one.lora_B += step
        two.lora_B += step
    torch.testing.assert_close(one.delta_weight(), two.delta_weight())
    torch.testing.assert_close(two.delta_weight(), step @ two.lora_A)


@VERSIONS
@pytest.mark.parametrize("norm", ["none", "row", "element"])
def test_forward_and_gradients_are_those_of_the_dense_build(version: str, norm: str) -> None:
    layer = layer_of(version=version, norm=norm)
    with torch.no_grad():
        for name, p in layer.adapter_tensors():
            if name.startswith("lora_") and p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    start = layer.start_B @ layer.start_A if version == "v1" else 0
    delta = (layer.lora_B @ layer.lora_A - start).detach()
    weight = layer.base.weight
    dense = weight + torch.from_numpy(numpy_norm(weight.numpy(), delta.numpy(), norm))
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.base.bias))
    trained = {n: p for n, p in layer.adapter_tensors() if p.requires_grad}

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *trained.values()), fast_mode=True)


@VERSIONS
def test_a_checkpoint_brings_the_start(version: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT))

    config = LoRANullConfig(rank=RANK, version=version)  # type: ignore[arg-type]
    model, other = build(), build()
    adapters, loaded = inject(model, config, seed=1), inject(other, config, seed=2)
    adapters.layers["0"].calibrate(text().t() @ text())
    learn(adapters.layers["0"], torch.randn(16, IN))  # type: ignore[arg-type]
    assert not loaded.layers["0"].calibrated
    loaded.load_state_dict(adapters.state_dict())
    assert loaded.layers["0"].calibrated
    x = torch.randn(3, IN)
    assert torch.equal(other(x), model(x))
    assert torch.equal(loaded.telemetry()["null_leakage"], adapters.telemetry()["null_leakage"])


def test_training_on_a_random_basis_warns_and_calibrated_training_does_not() -> None:
    layer, x = layer_of(calibrated=False), torch.randn(2, IN, dtype=torch.float64)
    with pytest.warns(UserWarning, match="random basis"):
        layer(x)
    layer.calibrate(text().t() @ text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        layer_of(calibrated=False).eval()(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model\.adapter\.rank is 0"),
        ({"rank": 25}, r"model\.adapter\.rank is 25, but q_proj is 24 x 32: use at most 24"),
        ({"version": "v3"}, r"model\.adapter\.version is 'v3': choose one of v1, v2"),
        ({"basis": "svd"}, r"model\.adapter\.basis is 'svd': choose one of weight, orthonormal"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_of(**settings)
