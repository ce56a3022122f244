"""S-MagNorm: exact at zero, smooth, bounded; and its blockwise form is the plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secura_lightning.adapters import element
from secura_lightning.adapters.element import element_linear
from secura_lightning.adapters.norm import _SERIES, SMagNorm, tanh_ratio
from tests.adapters.toy import numpy_norm

OUT, IN, RANK = 48, 40, 4


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT).to(dtype).requires_grad_(False)
    left = torch.randn(OUT, RANK, dtype=dtype, requires_grad=True)
    right = torch.randn(RANK, IN, dtype=dtype).mul_(0.03).requires_grad_()
    return base, torch.randn(2, 5, IN, dtype=dtype, requires_grad=True), left, right


def floor_of(base: nn.Linear, norm: SMagNorm) -> float:
    return norm.floor(base.weight.norm(dim=1), IN)


def test_tanh_ratio_is_exact_from_zero_to_huge() -> None:
    z = np.concatenate([np.zeros(1), np.logspace(-9, 3, 200)])
    expected = np.where(z == 0, 1.0, np.tanh(z) / np.where(z == 0, 1.0, z))
    torch.testing.assert_close(tanh_ratio(torch.from_numpy(z**2)), torch.from_numpy(expected), rtol=2e-15, atol=0)


def test_tanh_ratio_has_its_true_derivative_everywhere_and_at_zero() -> None:
    square = torch.tensor([0.0, 1e-12, 1e-4, 0.0099, 0.0101, 0.5, 30.0], dtype=torch.float64, requires_grad=True)
    tanh_ratio(square).sum().backward()
    assert square.grad is not None
    assert square.grad[0].item() == pytest.approx(-1 / 3, abs=1e-15)
    z = square.detach()[2:].sqrt()
    expected = ((1 - z.tanh() ** 2) * z - z.tanh()) / (2 * z**3)
    torch.testing.assert_close(square.grad[2:], expected, rtol=1e-9, atol=0)


def test_floor_is_eps_times_root_mean_square() -> None:
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    assert SMagNorm(eps=1e-3).floor(weight.norm(dim=1), IN) == pytest.approx(
        1e-3 * weight.square().mean().sqrt().item()
    )


@pytest.mark.parametrize("granularity", ["row", "element"])
@pytest.mark.parametrize("s", [2.0, 6.0])
def test_change_is_ratio_sigmoid_divisor(granularity: str, s: float) -> None:
    weight, delta = np.random.default_rng(0).normal(size=(2, OUT, IN))
    norm = SMagNorm(granularity, s)  # type: ignore[arg-type]
    base, change = torch.from_numpy(weight), torch.from_numpy(delta)
    if granularity == "row":
        actual = norm.row_scale(change.square().sum(1), base.norm(dim=1)).unsqueeze(-1) * change
    else:
        actual = norm.element_change(base, change, norm.floor(base.norm(dim=1), IN))
    expected = numpy_norm(weight, delta, granularity, s)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_change_stays_below_two_over_s(size: float, dtype: torch.dtype) -> None:
    base, x, left, right = problem(dtype)
    norm = SMagNorm("element")
    floor = floor_of(base, norm)
    left, slack = left.detach() * size, 1 + 1e-6
    change = norm.element_change(base.weight, left @ right, floor)
    assert (change.abs() <= (base.weight.square() + floor**2).sqrt() * slack / 3).all()
    y = element_linear(x, left, right, base, norm, floor)
    limit = (x.abs() @ (base.weight.square() + floor**2).sqrt().t()) / 3
    assert ((y - base(x)).abs() <= limit * slack + 1e-5).all()
    scale = norm.row_scale((left @ right).square().sum(1), base.weight.norm(dim=1))
    assert (scale * (left @ right).norm(dim=1) <= base.weight.norm(dim=1) * slack / 3).all()


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_small_changes_pass_unchanged_and_without_a_jump(granularity: str) -> None:
    base, _, left, right = problem()
    norm = SMagNorm(granularity)  # type: ignore[arg-type]
    floor, delta = floor_of(base, norm), (left @ right).detach()
    rates = []
    for size in (1e-6, 1e-5, 1e-4, 1e-3):
        if granularity == "row":
            change = norm.row_scale((size * delta).square().sum(1), base.weight.norm(dim=1)).unsqueeze(-1) * delta
        else:
            change = norm.element_change(base.weight, size * delta, floor) / size
        rates.append(change.norm().item())
    assert rates[0] == pytest.approx(delta.norm().item(), rel=1e-3)
    assert max(rates) / min(rates) < 1.02


def test_rows_and_weights_of_zero_give_no_nan() -> None:
    base, x, left, right = problem()
    with torch.no_grad():
        base.weight[3] = 0
        base.weight[:, 5] = 0
    norm = SMagNorm("element")
    y = element_linear(x, left, right, base, norm, floor_of(base, norm))
    y.sum().backward()
    for tensor in (y, x.grad, left.grad, right.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


@pytest.mark.parametrize("block", [1, 3 * IN, 7 * IN, OUT * IN])
def test_blockwise_layer_is_the_plain_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(element, "_CPU_BLOCK", block)
    base, x, left, right = problem()
    norm, fused = SMagNorm("element"), torch.randn(OUT, IN, dtype=torch.float64) * 0.05
    floor, pull = floor_of(base, norm), torch.randn(2, 5, OUT, dtype=torch.float64)
    for extra in (None, fused):
        reference = base.weight if extra is None else base.weight + extra
        plain = nn.functional.linear(x, reference + norm.element_change(reference, left @ right, floor), base.bias)
        ours = element_linear(x, left, right, base, norm, floor, extra)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad(plain, (x, left, right), pull)
        for got, want in zip(torch.autograd.grad(ours, (x, left, right), pull), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_detached_divisor_passes_the_gradient_over_m() -> None:
    base, x, left, right = problem()
    norm = SMagNorm("element", detach=True)
    floor = floor_of(base, norm)
    delta = left @ right
    divisor = norm.element_divisor(base.weight, delta, floor).detach()
    plain = nn.functional.linear(x, base.weight + delta / divisor, base.bias)
    ours = element_linear(x, left, right, base, norm, floor)
    pull = torch.randn_like(plain)
    for got, want in zip(
        torch.autograd.grad(ours, (left, right), pull), torch.autograd.grad(plain, (left, right), pull), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_detached_divisor_has_an_exact_gradient_for_the_smallest_change() -> None:
    base, x, left, right = problem(torch.float32)
    norm = SMagNorm("element", detach=True)
    y = element_linear(x, left.detach() * 1e-6, right, base, norm, floor_of(base, norm))
    pull = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, right, pull)
    want = (left.detach() * 1e-6).t() @ (pull.flatten(0, 1).t() @ x.detach().flatten(0, 1))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=float(want.abs().max()) * 1e-4)


def test_element_keeps_nothing_dense_for_backward() -> None:
    base, x, left, right = problem(torch.float32)
    norm = SMagNorm("element")
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = element_linear(x, left, right, base, norm, floor_of(base, norm))
    assert sorted(saved) == sorted([x.numel(), left.numel(), right.numel()])
    assert max(saved) < OUT * IN
    assert y.grad_fn is not None
    assert not [n for n, v in vars(y.grad_fn).items() if isinstance(v, Tensor)]


def test_low_precision_base_still_feels_a_change_that_it_could_not_hold() -> None:
    _, _, left, right = problem(torch.float32)
    base, norm, small = nn.Linear(IN, OUT, bias=False).to(torch.bfloat16), SMagNorm("element"), left.detach() * 1e-3
    wide = base.weight.detach().float()
    floor = norm.floor(wide.norm(dim=1), IN)
    change = norm.element_change(wide, small @ right.detach(), floor)
    swallowed = (wide + change).to(torch.bfloat16).float() - wide
    assert (swallowed - change).norm() > 0.5 * change.norm()
    kept = element.Limiter(base, norm, floor, None).change(small, right.detach(), torch.bfloat16).float()
    assert (kept - change).norm() < 5e-3 * change.norm()


def test_series_coefficients_are_those_of_tanh() -> None:
    # Bernoulli numbers B_2..B_12: tanh(z)/z = sum 2^2n (2^2n - 1) B_2n / (2n)! z^(2n-2)
    bernoulli = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730)
    terms = [4**n * (4**n - 1) * b / math.factorial(2 * n) for n, b in enumerate(bernoulli, start=1)]
    assert list(reversed(_SERIES)) == pytest.approx(terms, rel=1e-13)
