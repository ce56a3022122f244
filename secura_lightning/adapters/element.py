"""S-MagNorm per weight without keeping a dense matrix for backward.

``y = x (W + rho (2/s) tanh(s L R / (2 rho)))^T`` needs a dense (out, in) change, which plain autograd would keep
several times over for every layer. Here one autograd function saves the input and the factors, rebuilds the change in
backward, and works through the rows in blocks that fit the cache, in place. Beside the base's own two matmuls that
costs one weight gradient::

    forward    t = tanh(s L R / (2 rho)),   W_fin = W + (2/s) rho t,   y = x W_fin^T
    backward   G = (dy^T x) (1 - t^2),      dL = G R^T,   dR = L^T G,   dx = dy W_fin

On a base of full precision there is one matmul in forward, so the layer is the base bit for bit while L R is zero. A
low-precision base could not hold a small change: there the change gets a matmul of its own, y = y0 + x (W_fin - W0)^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secura_lightning.adapters.norm import SMagNorm
from secura_lightning.adapters.numerics import add_product, dense_weight, is_plain_linear, no_autocast

# Elements of one block of rows: a few such fp32 blocks fit a CPU's cache, while a GPU wants few, large kernels.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 23


def element_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    base: nn.Module,
    norm: SMagNorm,
    floor: float,
    fused: Tensor | None = None,
) -> Tensor:
    """The output of ``base`` with the limited change in its weight.

    Args:
        x: [..., in] input.
        left: [out, k] left factor of the change before the norm, fp32 or fp64.
        right: [k, in] right factor.
        base: The frozen linear module.
        norm: The norm's settings.
        floor: eps * rms(W0).
        fused: [out, in] dense change that already belongs to the reference weight.

    Returns:
        [..., out] in the type that ``base`` itself would give.
    """
    return cast(Tensor, _ElementLinear.apply(x, left, right, Limiter(base, norm, floor, fused)))


class HeldWeight:
    """The limited weight of one module, built at its first use and kept: for many forwards without a gradient.

    Bit for bit what :func:`element_linear` computes, which builds it every time.

    Args:
        limiter: Builds it.
        left: [out, k] left factor of the change before the norm.
        right: [k, in] right factor.
    """

    def __init__(self, limiter: Limiter, left: Tensor, right: Tensor) -> None:
        self.limiter = limiter
        self.factors = (left, right)
        self.built: dict[torch.dtype | None, Tensor] = {}  # None: the whole weight; a type: the change in it

    def linear(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _output(x, self.factors[0], self.limiter.base, self._weight)

    def _weight(self, dtype: torch.dtype | None) -> Tensor:
        if dtype not in self.built:
            self.built[dtype] = self.limiter.weight(*self.factors, dtype)
        return self.built[dtype]


class Limiter:
    """Builds W_fin, or its change alone, block by block from the factors."""

    def __init__(self, base: nn.Module, norm: SMagNorm, floor: float, fused: Tensor | None) -> None:
        self.base = base
        self.norm = norm
        self.floor = floor
        self.fused = fused

    def blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (rows, base weight, rho, s dW / rho) of one block of rows after another; the last two may be
        overwritten."""
        dense = dense_weight(self.base)
        scaled = left * self.norm.s
        height = max(1, (_CPU_BLOCK if dense.device.type == "cpu" else _GPU_BLOCK) // dense.shape[1])
        for start in range(0, dense.shape[0], height):
            rows = slice(start, start + height)
            weight = dense[rows].to(left.dtype)
            reference = weight if self.fused is None else weight + self.fused[rows]
            rho = torch.mul(reference, reference).add_(self.floor**2).sqrt_()
            yield rows, weight, rho, torch.mm(scaled[rows], right).div_(rho)

    def weight(self, left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
        """:meth:`change` in ``dtype``, or :meth:`final_weight` where that is None."""
        return self.final_weight(left, right) if dtype is None else self.change(left, right, dtype)

    def final_weight(self, left: Tensor, right: Tensor) -> Tensor:
        """W_fin [out, in] in the factors' type."""
        final = left.new_empty(left.shape[0], right.shape[1])
        for rows, weight, rho, ratio in self.blocks(left, right):
            self.write_final(final[rows], rows, weight, rho, _half_tanh_(ratio))
        return final

    def write_final(self, out: Tensor, rows: slice, weight: Tensor, rho: Tensor, half: Tensor) -> None:
        """One block of W_fin into ``out``, given ``half`` = tanh/2."""
        gain = 4 / self.norm.s
        if self.fused is not None:
            weight = weight + self.fused[rows]
        if out.dtype == weight.dtype:
            torch.addcmul(weight, rho, half, value=gain, out=out)
        else:
            out.copy_(torch.addcmul(weight, rho, half, value=gain))

    def change(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """W_fin - W0 [out, in] in ``dtype``, with full relative precision also where it is tiny."""
        change = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
        for rows, _, rho, ratio in self.blocks(left, right):
            block = ratio.mul_(0.5).tanh_().mul_(rho).mul_(2 / self.norm.s)
            change[rows] = block if self.fused is None else block.add_(self.fused[rows])
        return change

    def chain_(self, gradient: Tensor, ratio: Tensor) -> Tensor:
        """Turn d loss / d W_fin of one block into d loss / d (L R), in place.

        Returns:
            tanh/2 of the block.
        """
        if not self.norm.detach:
            half = _half_tanh_(ratio)
            gradient.addcmul_(gradient, half.square(), value=-4)  # 1 - tanh^2
            return half
        half = (ratio * 0.5).tanh_().mul_(0.5)  # relatively exact, because it is divided by the ratio
        gradient.mul_(torch.where(ratio == 0, 1.0, 4 * half / ratio))  # 1/M = tanh(z)/z at z = ratio/2
        return half


def _half_tanh_(ratio: Tensor) -> Tensor:
    """tanh(ratio / 2) / 2, in place, as sigmoid(ratio) - 1/2.

    A third of tanh's time on a CPU. Absolutely, not relatively, exact: enough next to a weight of the same precision.
    """
    return ratio.sigmoid_().sub_(0.5)


def _output(x: Tensor, left: Tensor, base: nn.Module, weight: Callable[[torch.dtype | None], Tensor]) -> Tensor:
    """The layer's output, given how to come by its whole weight (None) or by the change in a type."""
    one_type = cast(Tensor, base.weight).dtype == left.dtype == x.dtype
    if one_type and is_plain_linear(base) and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight(None), cast(Tensor | None, base.bias))
    y0 = cast(Tensor, base(x))
    with no_autocast(x):
        return add_product(y0, x.to(y0.dtype), weight(y0.dtype))


class _ElementLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, limiter: Limiter) -> Tensor:
        ctx.limiter = limiter
        ctx.save_for_backward(x, left, right)
        return _output(x, left, limiter.base, partial(limiter.weight, left, right))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, left, right = ctx.saved_tensors
        need_x, need_left, need_right, _ = ctx.needs_input_grad
        limiter: Limiter = ctx.limiter
        with no_autocast(x):
            flat = grad.reshape(-1, grad.shape[-1])
            dense_grad = flat.t() @ x.reshape(-1, x.shape[-1]).to(flat.dtype)
            final = torch.empty_like(dense_grad) if need_x else None
            dense_grad = dense_grad.to(left.dtype)
            for rows, weight, rho, ratio in limiter.blocks(left, right):
                half = limiter.chain_(dense_grad[rows], ratio)
                if final is not None:
                    limiter.write_final(final[rows], rows, weight, rho, half)
            grad_x = None if final is None else (flat @ final).view(x.shape).to(x.dtype)
            grad_left = dense_grad @ right.t() if need_left else None
            grad_right = left.t() @ dense_grad if need_right else None
        return grad_x, grad_left, grad_right, None
