"""PiSSA and MiLoRA: which triplets, a start that is subtracted exactly, refusals, and parity with peft."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secura_lightning.adapters import AdapterConfig, inject
from secura_lightning.adapters.svd_init import (
    MiLoRAConfig,
    PiSSAConfig,
    StartedLayer,
    bottom_triplets,
    top_triplets,
)
from secura_lightning.errors import ConfigError

OUT, IN, RANK = 24, 40, 5
SHAPES = [(OUT, IN), (IN, OUT), (OUT, OUT)]


def layer_of(config: AdapterConfig, dtype: torch.dtype = torch.float64, bias: bool = True) -> StartedLayer:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    return config.build("q_proj", base, torch.Generator().manual_seed(3))  # type: ignore[return-value]


def matrix(shape: tuple[int, int], decay: float = 0.8) -> Tensor:
    """A matrix whose singular values are powers of ``decay``, as spread as those of a trained weight."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u * decay ** torch.arange(min(shape), dtype=torch.float64)) @ vt


def truncated(weight: Tensor, part: slice) -> Tensor:
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, part] * s[part]) @ vt[part]


@pytest.mark.parametrize("shape", SHAPES)
def test_largest_triplets_are_those_of_the_full_svd(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    u, s, vt = top_triplets(weight, RANK, 4, torch.Generator().manual_seed(1))
    torch.testing.assert_close((u * s) @ vt, truncated(weight, slice(0, RANK)), rtol=0, atol=1e-8)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight)[:RANK])
    torch.testing.assert_close(u.t() @ u, torch.eye(RANK, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smallest_triplets_are_those_of_the_full_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape)
    u, s, vt = bottom_triplets(weight.to(dtype), RANK)
    assert u.dtype == dtype
    expected = truncated(weight, slice(min(shape) - RANK, None))
    error = ((u * s) @ vt - expected).norm() / expected.norm()
    assert error < (1e-9 if dtype == torch.float64 else 1e-4)
    torch.testing.assert_close(s.double(), torch.linalg.svdvals(weight)[-RANK:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [None, 15.0])
@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_pissa_starts_at_the_principal_part(svd: str, alpha: float | None) -> None:
    layer = layer_of(PiSSAConfig(rank=RANK, svd=svd, niter=30, alpha=alpha))  # type: ignore[arg-type]
    start = layer.scale * layer.start_B @ layer.start_A
    torch.testing.assert_close(start, truncated(layer.base.weight, slice(0, RANK)), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.start_B.norm(dim=0), layer.start_A.norm(dim=1))  # S is split evenly


def test_milora_starts_at_the_minor_part() -> None:
    layer = layer_of(MiLoRAConfig(rank=RANK))
    expected = truncated(layer.base.weight, slice(OUT - RANK, None))
    torch.testing.assert_close(layer.start_B @ layer.start_A, expected)


@pytest.mark.parametrize("config", [PiSSAConfig(rank=RANK), MiLoRAConfig(rank=RANK)], ids=["pissa", "milora"])
def test_training_is_that_of_the_papers_residual_form(config: AdapterConfig) -> None:
    layer = layer_of(config)
    residual = layer.base.weight - layer.scale * layer.start_B @ layer.start_A
    a, b = (nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B))
    x, target = torch.randn(9, IN, dtype=torch.float64), torch.randn(9, OUT, dtype=torch.float64)
    ours, theirs = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.05), torch.optim.AdamW([a, b], lr=0.05)
    for _ in range(5):
        for optimizer, output in (
            (ours, layer(x)),
            (theirs, x @ (residual + layer.scale * b @ a).t() + layer.base.bias),
        ):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.lora_A, a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.lora_B, b, rtol=1e-9, atol=1e-9)


def test_a_tiny_change_is_not_lost_in_the_start() -> None:
    layer = layer_of(PiSSAConfig(rank=RANK), torch.float32)
    exact = layer_of(PiSSAConfig(rank=RANK), torch.float64)
    exact.load_state_dict(layer.state_dict())
    step = 1e-6 * torch.randn(layer.lora_B.shape)
    with torch.no_grad():
        layer.lora_B += step
        exact.lora_B.copy_(layer.lora_B)
    got, want = layer.delta_weight().double(), exact.delta_weight()
    assert (got - want).norm() / want.norm() < 1e-5


def test_randomized_start_depends_on_its_generator_alone() -> None:
    torch.manual_seed(99)
    torch.rand(7)
    one = layer_of(PiSSAConfig(rank=RANK))
    assert torch.equal(one.start_A, layer_of(PiSSAConfig(rank=RANK)).start_A)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: PiSSAConfig(rank=0), r"model\.adapter\.rank is 0"),
        (lambda: MiLoRAConfig(rank=25), r"model\.adapter\.rank is 25, but q_proj is 24 x 40: use at most 24"),
        (lambda: PiSSAConfig(alpha=0.0), r"model\.adapter\.alpha is 0"),
        (lambda: PiSSAConfig(svd="fast"), r"model\.adapter\.svd is 'fast': choose one of randomized, exact"),
        (lambda: PiSSAConfig(niter=-1), r"model\.adapter\.niter is -1"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(config, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        layer_of(config())


@pytest.mark.slow
def test_parity_with_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(IN, OUT)), nn.Sequential(nn.Linear(IN, OUT))
    theirs.load_state_dict(ours.state_dict())
    layer = inject(ours, PiSSAConfig(rank=4, svd="exact", alpha=8)).layers["0"]
    settings = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["0"])
    other = peft.inject_adapter_in_model(settings, theirs)[0]
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    torch.testing.assert_close(b @ a, layer.lora_B @ layer.lora_A, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the same signs
        signs = torch.sign((layer.lora_A * a).sum(1))
        a.mul_(signs.unsqueeze(-1)), b.mul_(signs)
        torch.testing.assert_close(a, layer.lora_A, rtol=1e-4, atol=1e-5)
        for p, q in ((a, layer.lora_A), (b, layer.lora_B)):
            q += 0.1 * torch.randn_like(q)
            p.copy_(q)
    x, pull = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    mine, their = layer(x), other(x)
    torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(mine, (x, layer.lora_A, layer.lora_B), pull)
    for g, w in zip(got, torch.autograd.grad(their, (x, a, b), pull), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
