"""The gather trick: with R = rows I of W0, ``x R^T`` is ``y0[..., I]``: neither R nor its matmul is needed.

``y = y0 + (y0[..., I] K^T) L^T`` for a small core K (k, k) and a left factor L (out, k). Exact in value and gradient,
and on a 4-bit base too. With a bias in the base, ``y0[..., I]`` holds rounded sums ``x R^T + b``; where b is large
(Qwen2's keys: hundreds) the difference is mostly rounding error, so there the caller computes ``x R^T`` itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secura_lightning.adapters.numerics import add_product, no_autocast


def add_gathered(y0: Tensor, rows: Tensor, core: Tensor | None, left: Tensor) -> Tensor:
    """``y0 + (y0[..., rows] core^T) left^T``.

    One autograd function, because plain autograd would scatter the gathered columns' gradient into a second (n, out)
    tensor.

    Args:
        y0: [..., out] output of the base, without bias.
        rows: [k] ids of the gathered outputs.
        core: [k, k] in fp32 or fp64, whose product with tokens keeps that type; None for the identity.
        left: [out, k] in the same type; its product with tokens runs in y0's type.
    """
    return cast(Tensor, _AddGathered.apply(y0, rows, core, left))


class _AddGathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y0: Tensor, rows: Tensor, core: Tensor | None, left: Tensor) -> Tensor:
        with no_autocast(y0):
            gathered = y0.reshape(-1, y0.shape[-1]).index_select(1, rows)  # [n, k]
            features = gathered if core is None else (gathered.to(core.dtype) @ core.t()).to(y0.dtype)
            ctx.save_for_backward(gathered, rows, core, left)
            return add_product(y0, features, left.to(y0.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        gathered, rows, core, left = ctx.saved_tensors
        need_y0, _, need_core, need_left = ctx.needs_input_grad
        with no_autocast(grad):
            flat = grad.reshape(-1, grad.shape[-1])
            grad_features = (flat @ left.to(flat.dtype)).to(left.dtype)  # [n, k]
            wide = gathered.to(left.dtype)
            features = wide if core is None else wide @ core.t()
            grad_gathered = grad_features if core is None else grad_features @ core
            grad_core = grad_features.t() @ wide if need_core else None
            grad_left = (flat.t() @ features.to(flat.dtype)).to(left.dtype) if need_left else None
            grad_y0 = None
            if need_y0:
                grad_y0 = flat.clone().index_add_(1, rows, grad_gathered.to(flat.dtype)).view(grad.shape)
        return grad_y0, None, grad_core, grad_left
