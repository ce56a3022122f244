"""S-MagNorm per weight without keeping a dense matrix for backward.

``y = x (W + rho (2/s) tanh(s L R / (2 rho)))^T`` needs a dense (out, in) change, which plain autograd would keep several times over
for every layer. Here one autograd function saves the input and the factors, rebuilds the change in backward, and works through the
rows in blocks that fit the cache, in place. Beside the base's own two matmuls that costs one weight gradient::

    forward    t = tanh(s L R / (2 rho));   y = x W_fin^T,  W_fin = W + (2/s) rho t
    backward   G = dy^T x;   dL = (G (1 - t^2)) R^T;   dR = L^T (G (1 - t^2));   dx = dy W_fin

On a base of full precision there is one matmul in forward, so the layer is the base bit for bit while L R is zero. A low-precision
base could not hold a small change: there the change gets a matmul of its own, y = y0 + x (W_fin - W0)^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secura_lightning.adapters.norm import SMagNorm
from secura_lightning.adapters.numerics import add_product, dense_weight, is_plain_linear, no_autocast

# Elements of one block of rows. On a CPU three such fp32 blocks stay in the second-level cache; a GPU wants few, large kernels.
_CPU_BLOCK = 1 << 16
_GPU_BLOCK = 1 << 25


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
    return cast(Tensor, _ElementLinear.apply(x, left, right, _Limiter(base, norm, floor, fused)))


class _Limiter:
    """Builds W_fin, or its change alone, block by block from the factors."""

    def __init__(self, base: nn.Module, norm: SMagNorm, floor: float, fused: Tensor | None) -> None:
        self.base = base
        self.norm = norm
        self.floor_square = floor**2
        self.fused = fused

    def blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (rows, base weight, rho, s dW / (2 rho)) of one block of rows after another; the last two may be overwritten."""
        dense = dense_weight(self.base)
        scaled = left * (self.norm.s / 2)
        height = max(1, (_CPU_BLOCK if dense.device.type == "cpu" else _GPU_BLOCK) // dense.shape[1])
        for start in range(0, dense.shape[0], height):
            rows = slice(start, start + height)
            weight = dense[rows].to(left.dtype)
            reference = weight if self.fused is None else weight + self.fused[rows]
            rho = torch.mul(reference, reference).add_(self.floor_square).sqrt_()
            yield rows, weight, rho, torch.mm(scaled[rows], right).div_(rho)

    def write(self, out: Tensor, rows: slice, weight: Tensor | None, rho: Tensor, tanh: Tensor) -> None:
        """out[rows] = weight + fused + (2/s) rho tanh, in out's type, where a weight of None stands for 0."""
        start = weight if self.fused is None else self.fused[rows] if weight is None else weight + self.fused[rows]
        gain = 2 / self.norm.s
        block = out[rows]
        if start is None:
            torch.mul(rho, tanh, out=rho).mul_(gain)
            block.copy_(rho)
        elif block.dtype == rho.dtype:
            torch.addcmul(start, rho, tanh, value=gain, out=block)
        else:
            block.copy_(torch.addcmul(start, rho, tanh, value=gain))

    def chain(self, gradient: Tensor, argument: Tensor, tanh: Tensor) -> None:
        """Turn d loss / d W_fin of one block into d loss / d (L R), in place. ``argument`` is only read when M is a constant."""
        if self.norm.detach:
            gradient.mul_(torch.where(argument == 0, 1.0, tanh / argument))  # 1/M = tanh(z)/z
        else:
            gradient.addcmul_(gradient, tanh.square(), value=-1)  # sech^2 = 1 - tanh^2


class _ElementLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, limiter: _Limiter) -> Tensor:
        ctx.limiter = limiter
        ctx.save_for_backward(x, left, right)
        base = limiter.base
        stored = cast(Tensor, base.weight)
        single = is_plain_linear(base) and stored.dtype == left.dtype == x.dtype
        single = single and not torch.is_autocast_enabled(x.device.type)
        y0 = None if single else base(x)
        with no_autocast(x):
            change = torch.empty(
                left.shape[0], right.shape[1], dtype=left.dtype if y0 is None else y0.dtype, device=x.device
            )
            for rows, weight, rho, argument in limiter.blocks(left, right):
                limiter.write(change, rows, weight if single else None, rho, argument.tanh_())
            if y0 is None:
                return F.linear(x, change, cast(Tensor | None, base.bias))
            return add_product(y0, x.to(y0.dtype), change)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, left, right = ctx.saved_tensors
        need_x, need_left, need_right = ctx.needs_input_grad[:3]
        limiter: _Limiter = ctx.limiter
        with no_autocast(x):
            flat = grad.reshape(-1, grad.shape[-1])
            dense_grad = flat.t() @ x.reshape(-1, x.shape[-1]).to(flat.dtype)
            chained = dense_grad.to(left.dtype)
            final = torch.empty_like(dense_grad) if need_x else None
            for rows, weight, rho, argument in limiter.blocks(left, right):
                tanh = argument.tanh() if limiter.norm.detach else argument.tanh_()
                limiter.chain(chained[rows], argument, tanh)
                if final is not None:
                    limiter.write(final, rows, weight, rho, tanh)
            grad_x = None if final is None else (flat @ final).view(x.shape).to(x.dtype)
            grad_left = chained @ right.t() if need_left else None
            grad_right = left.t() @ chained if need_right else None
        return grad_x, grad_left, grad_right, None
