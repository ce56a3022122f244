"""S-MagNorm on outputs, as the authors of SECURA run it: for reproduction of their figures alone.

::

    delta = x (C K R)^T,   r = |delta| / |y0|,   M = 2 - sigmoid(s r)        every output of every token
    y     = (y0 + (y0 + delta)) / M

y0 is the base's output, bias included. ``official`` is our reading of their code; ``official_max`` is the line that
the code overwrites, with r / max(r) over the whole tensor in the place of r. Restated from behaviour that was measured
on that code (the limits for small and large changes, the restraint's edge), not copied from it; the paper describes a
norm of weights. Its oddities, each shown in a test:

* The base enters twice: y tends to 2 y0 + delta where the change is large, so nothing is limited there (M tends to 1).
* It is not continuous: any change, however small, takes the output to 2 y0 / 1.5, 4/3 of the base's. Without a change
  the output is the base's, here by a case of its own.
* Under ``official_max`` the jump differs from output to output, because r / max(r) does not shrink with the change, and
  a token's output depends on the other tokens of the batch.

No weight matrix computes any of this, so it cannot be merged or exported, and there is no bound.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from secura_lightning.adapters.delta import DeltaLayer
from secura_lightning.adapters.numerics import no_autocast, row_products
from secura_lightning.errors import SecuraError

OFFICIAL = ("official", "official_max")


def official_output(y0: Tensor, delta: Tensor, s: float, by_max: bool = False, detach: bool = False) -> Tensor:
    """(2 y0 + delta) / (2 - sigmoid(s r)), or y0 where the whole of ``delta`` is zero.

    Args:
        y0: [..., out] output of the base.
        delta: [..., out] change of it.
        s: Scale of the sigmoid.
        by_max: Divide r by its largest value in the tensor.
        detach: Treat the divisor as a constant in backward, as the authors do.
    """
    tiny = torch.finfo(y0.dtype).tiny
    ratio = delta.abs() / y0.abs().clamp_min(tiny)
    if by_max:
        ratio = ratio / ratio.amax().clamp_min(tiny)
    divisor = 2 - torch.sigmoid(s * ratio)
    if detach:
        divisor = divisor.detach()
    # A choice by tensor, because asking the host would wait for the device; y0 + delta lets the first gradient through.
    return torch.where(delta.detach().any(), (2 * y0 + delta) / divisor, y0 + delta)


class OfficialLayer(DeltaLayer):
    """Puts :func:`official_output` in the place of a layer's forward; its change has no weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        y0 = cast(Tensor, self.base(x, *args, **kwargs))
        if not self.enabled:
            return y0
        with no_autocast(x):
            left, right = self.factors()
            features = F.linear(x.to(right.dtype), right)  # [..., c]
            by_max = self.norm.granularity == "official_max"
            delta = F.linear(features, left)
            y = official_output(y0.to(delta.dtype), delta, self.norm.s, by_max, self.norm.detach).to(y0.dtype)
        return y if self.bias_change is None else y + self.bias_change.to(y.dtype)

    def low_rank_delta(self) -> tuple[Tensor, Tensor] | None:
        """There is none.

        Raises:
            SecuraError: Always.
        """
        raise SecuraError(
            f"norm: {self.norm.granularity} changes outputs, and no weight computes the same, so the model cannot be "
            "merged or exported: train with model.adapter.norm: element or row"
        )

    @torch.no_grad()
    def telemetry(self) -> dict[str, Tensor]:
        """``relative_change`` = ||C K R|| / ||W0||, before the norm."""
        left, right = self.factors()
        change = row_products(left, right @ right.t()).sum().sqrt()
        return {"relative_change": change / self.base_norm.norm()}
