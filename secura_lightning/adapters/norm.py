"""S-MagNorm: a smooth bound on how far a weight may move, as a component that any adapter with a change can take.

From SECURA (arXiv 2502.18168): ratio of change to weight -> sigmoid -> divide the change by the result. The form used
here is re-centred so that it is the identity at zero, smooth everywhere, and bounded::

    rho   = sqrt(W0^2 + (eps rms(W0))^2)          r = |dW| / rho
    M     = s r / (2 g),  g = 2 sigmoid(s r) - 1 = tanh(s r / 2),  M(0) = 1
    W_fin = W0 + dW / M = W0 + rho (2/s) tanh(s dW / (2 rho))

so no weight moves by more than 2/s of its own size (a third at s = 6). Granularities:

* ``element``: as above, weight by weight: the paper's figure. :mod:`secura_lightning.adapters.element` runs it.
* ``row``: one ratio per output row, r_i = ||dW_i|| / ||W0_i||, h_i = 1/M_i, W_fin = W0 + diag(h) dW. The rank stays
  what it was, and ||dW_i||^2 comes from Gram matrices.
* ``none``: the plain change.

The authors' code differs: it works on outputs, overwrites its own normalisation, adds the base twice and jumps to 4/3
of the base output for an arbitrarily small change. This form keeps its chain and its scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["none", "row", "element", "official", "official_max"]

_SERIES_BELOW = 1e-2
# tanh(z)/z = sum c_k (z^2)^k: beyond the last coefficient the series is below 4e-15 for z^2 < 1e-2.
_SERIES = (-1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)
# A base of zeros has rms 0: this keeps 0/0 out without being felt next to any real weight.
_TINY_FLOOR = 1e-12


def tanh_ratio(square: Tensor) -> Tensor:
    """tanh(z)/z as a function of z^2, with exact value and gradient at zero (1 and -1/3)."""
    small = square < _SERIES_BELOW
    near = torch.where(small, square, 0.0)  # both branches stay finite, so that no NaN leaks through `where` backward
    z = torch.where(small, 1.0, square).sqrt()
    series = torch.full_like(near, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series = series * near + coefficient
    return torch.where(small, series, z.tanh() / z)


@dataclass(frozen=True)
class SMagNorm:
    """The norm's settings and its closed forms.

    Attributes:
        granularity: ``none``, ``row`` or ``element``; SECURA alone knows ``official`` and ``official_max``
            (:mod:`secura_lightning.adapters.official`).
        s: Scale of the sigmoid; the relative change is bounded by 2/s.
        eps: Floor of a weight's size, as a fraction of the matrix' root mean square.
        detach: Treat M as a constant in backward (the authors' choice).
    """

    granularity: Granularity = "none"
    s: float = 6.0
    eps: float = 1e-3
    detach: bool = False

    def floor(self, base_norm: Tensor, width: int) -> float:
        """eps * rms(W0), from the norms [out] of the rows and their length. Synchronises: call it at construction."""
        rms = base_norm.double().square().mean().item() / width
        return max(self.eps * math.sqrt(rms), _TINY_FLOOR)

    def row_scale(self, delta_square: Tensor, base_norm: Tensor) -> Tensor:
        """h = 1/M of every row.

        Args:
            delta_square: [out] squared norms of the change's rows.
            base_norm: [out] norms of the base's rows, positive.
        """
        scale = tanh_ratio(delta_square * (self.s / (2 * base_norm)).square())
        return scale.detach() if self.detach else scale

    def element_change(self, base: Tensor, delta: Tensor, floor: float) -> Tensor:
        """The limited change rho (2/s) tanh(s dW / (2 rho)), written plainly.

        Args:
            base: [out, in] reference weight.
            delta: [out, in] change before the norm.
            floor: eps * rms of the base.
        """
        rho = (base.square() + floor**2).sqrt()
        return rho * (2 / self.s) * torch.tanh(delta * (self.s / 2) / rho)

    def element_divisor(self, base: Tensor, delta: Tensor, floor: float) -> Tensor:
        """M of every weight, [out, in]; arguments as in :meth:`element_change`."""
        return tanh_ratio((delta * (self.s / 2)).square() / (base.square() + floor**2)).reciprocal()
