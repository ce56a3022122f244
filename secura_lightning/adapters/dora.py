"""DoRA (arXiv 2402.09353): magnitude and direction of every output row trained apart.

::

    W_i = m_i (W0 + s B A)_i / n_i,     n_i = ||(W0 + s B A)_i||,   m_i = ||W0_i|| at the start,   s = alpha / r

with n a constant in backward (``detach_norm``, section 4.3 of the paper). The norm is exact without a dense change::

    n_i^2 = ||W0_i||^2 + 2 s B_i . (A W0^T)_i + s^2 B_i (A A^T) B_i^T

With g = m / n the output is ``y = z + (g - 1) (z - b)``, ``z = y0 + s (x A^T) B^T``, where y0 holds the bias b already.
Both g - 1 and B A are exactly zero at the start. With dropout, the authors and peft drop inputs of (g - 1) W0 too, for
which they run the base a second time; here dropout acts on B A alone and the base runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import AdapterLayer, require_size
from secura_lightning.adapters.lora import LoRASettings
from secura_lightning.adapters.numerics import (
    add_product,
    dense_weight,
    linear_shape,
    no_autocast,
    row_blocks,
    row_products,
)

_DEAD_ROW = 1e-3  # of the root mean square row norm: a row of zeros has no direction to divide by


@dataclass(kw_only=True)
class DoRAConfig(LoRASettings):
    """DoRA: a trained low-rank change of every row's direction, and a trained magnitude."""

    detach_norm: bool = True
    """Treat the norm that rows are divided by as a constant in backward (the paper's choice; saves memory)."""
    bias: bool = False
    """Also train a change of each module's bias."""

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> DoRALayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        require_size("rank", self.rank, name, base)
        layer = DoRALayer(base, self)
        layer.reset_parameters(generator)
        return layer


class DoRALayer(AdapterLayer):
    """A linear module whose rows have a trained direction and a trained magnitude.

    Args:
        base: The frozen linear module.
        config: The settings.

    Attributes:
        lora_A: [r, in].
        lora_B: [out, r].
        magnitude: [out] m, at the start the norms of W0's rows.
        base_norm: [out] norms of W0's rows; rows of (almost) zeros count as 1e-3 of the others' size.
    """

    base_norm: Tensor
    bias_change: nn.Parameter | None

    def __init__(self, base: nn.Module, config: DoRAConfig) -> None:
        super().__init__(base)
        self.out_features, self.in_features = linear_shape(base)
        self.config = config
        self.scale = config.scale
        self.dropout = config.dropout
        self.detach_norm = config.detach_norm
        norms = torch.linalg.vector_norm(dense_weight(base), dim=1, dtype=self.work_dtype)
        self.floor = max(_DEAD_ROW * norms.double().square().mean().sqrt().item(), 1e-12)
        self.register_buffer("base_norm", norms.clamp_min(self.floor), persistent=False)
        self.lora_A = nn.Parameter(norms.new_zeros(config.rank, self.in_features))
        self.lora_B = nn.Parameter(norms.new_zeros(self.out_features, config.rank))
        self.magnitude = nn.Parameter(self.base_norm.clone())
        self.register_parameter("bias_change", nn.Parameter(torch.zeros_like(norms)) if config.bias else None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A as ``init`` says, B zero, m the norms of W0's rows."""
        self.lora_A.copy_(self.config.start(self.lora_A, generator))
        self.lora_B.zero_()
        self.magnitude.copy_(self.base_norm)

    def norm_change(self, dense: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """n^2 - ||W0_i||^2 of some rows of ``dense``, which is W0; exactly zero while B is, with gradient."""
        dense = dense_weight(self.base) if dense is None else dense
        a, b = self.lora_A, self.scale * self.lora_B[rows]
        cross = F.linear(a, dense[rows].to(a.dtype))  # A W0^T [r, rows]
        return 2 * (b * cross.t()).sum(-1) + row_products(b, a @ a.t())

    def gain(self, dense: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """g = m / n of some rows of ``dense``, which is W0; exactly 1 at the start."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            # ||W0|| sqrt(1 + change / ||W0||^2) rather than sqrt(sum): then no change is no change, bit for bit.
            base_norm = self.base_norm[rows]
            relative = 1 + self.norm_change(dense, rows) / base_norm.square()
            norm = base_norm * relative.clamp_min((self.floor / base_norm).square()).sqrt()
        return self.magnitude[rows] / norm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        y0 = cast(Tensor, self.base(x, *args, **kwargs))
        if not self.enabled:
            return y0
        with no_autocast(x):
            gain = self.gain()
            dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
            features = F.linear(dropped.to(y0.dtype), self.lora_A.to(y0.dtype))  # [..., r]
            y = add_product(y0, features, self.lora_B.to(y0.dtype), alpha=self.scale)
            y = self._scaled(y, gain)
        return y if self.bias_change is None else y + self.bias_change.to(y.dtype)

    def _scaled(self, y: Tensor, gain: Tensor) -> Tensor:
        """``gain * (y - b) + b``."""
        # By g - 1, which a bf16 type holds relatively exactly, while g itself would round to 1.
        scaled = torch.addcmul(y, y, (gain - 1).to(y.dtype))
        bias = cast("Tensor | None", self.base.bias)
        return scaled if bias is None else scaled.add_(((1 - gain) * bias).to(y.dtype))

    @torch.no_grad()
    def untouched(self) -> dict[str, Tensor]:
        """A stays, B is zero, and the magnitudes are the norms of W0's rows."""
        values = {name: torch.zeros_like(value) for name, value in self.anchors().items()}
        return values | {"lora_A": self.lora_A.detach().clone(), "magnitude": self.base_norm.clone()}

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """(g - 1) W0 + g s B A, [out, in]."""
        gain = self.gain().unsqueeze(-1)
        weight = dense_weight(self.base).to(gain.dtype)
        return torch.addmm((gain - 1) * weight, gain * self.lora_B, self.lora_A, alpha=self.scale)

    @torch.no_grad()
    def delta_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`delta_weight` in small blocks of rows."""
        dense = dense_weight(self.base)
        for rows in row_blocks(dense):
            gain = self.gain(dense, rows).unsqueeze(-1)
            scaled = (gain - 1) * dense[rows].to(gain.dtype)
            yield rows, scaled.addmm_(gain * self.lora_B[rows], self.lora_A, alpha=self.scale)

    def delta_bias(self) -> Tensor | None:
        """The trained change of the bias, [out]."""
        return None if self.bias_change is None else self.bias_change.detach()
