"""Adapters whose change is ``norm(L R)``: one forward, one merge, one set of settings for all of them.

A method says what its factors are, how they start, and its fast path; the norm is a setting::

    y = x (W0 + norm(L R))^T + b + db          L (out, k), R (k, in)

Weight-level maths (factors, Gram matrices, norms) is fp32 whatever autocast says; only products with tokens run in the
base's output type.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from secura_lightning.adapters.base import AdapterLayer, require
from secura_lightning.adapters.element import HeldWeight, Limiter, element_linear
from secura_lightning.adapters.norm import Granularity, SMagNorm
from secura_lightning.adapters.numerics import dense_weight, linear_shape, no_autocast, row_blocks, row_products
from secura_lightning.adapters.overrides import PerTargetConfig


@dataclass(kw_only=True)
class DeltaConfig(PerTargetConfig):
    """Settings of every adapter with a change ``L R``: targets, S-MagNorm, bias."""

    norms: ClassVar[tuple[Granularity, ...]] = ("none", "row", "element")
    """What `norm` may be."""

    norm: Granularity = "none"
    """S-MagNorm on the change: `none`, `row` (keeps the rank) or `element` (protects most, costs one weight
    gradient)."""
    norm_s: float = 6.0
    """Scale of the norm's sigmoid: no weight (or row) moves by more than 2/s of its size."""
    norm_eps: float = 1e-3
    """Floor of a weight's size in the norm, as a fraction of the matrix' root mean square."""
    detach_norm: bool = False
    """Treat the norm's divisor as a constant in backward."""
    bias: bool = False
    """Also train a change of each module's bias."""

    def __post_init__(self) -> None:
        """Check the norm's values.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        choices = self.norms
        require(self.norm in choices, f"model.adapter.norm is {self.norm!r}: choose one of {', '.join(choices)}")
        require(self.norm_s > 0, f"model.adapter.norm_s is {self.norm_s}: it must be above 0 (the default is 6)")
        require(
            self.norm_eps > 0, f"model.adapter.norm_eps is {self.norm_eps}: it must be above 0 (the default is 1e-3)"
        )

    def smagnorm(self) -> SMagNorm:
        """The norm component of these settings."""
        return SMagNorm(self.norm, self.norm_s, self.norm_eps, self.detach_norm)


class DeltaLayer(AdapterLayer):
    """A linear module with a change ``norm(L R)``.

    Args:
        base: ``nn.Linear``, transformers' ``Conv1D`` or a bitsandbytes layer.
        config: Settings that all such adapters share.
        base_norm: [out] norms of W0's rows in the working type, where the method knows them already.

    Attributes:
        base_norm: [out] norms of W0's rows.
        floor: eps * rms(W0).
    """

    base_norm: Tensor
    bias_change: nn.Parameter | None
    _held: HeldWeight | None = None

    def __init__(self, base: nn.Module, config: DeltaConfig, base_norm: Tensor | None = None) -> None:
        super().__init__(base)
        self.out_features, self.in_features = linear_shape(base)
        self.norm = config.smagnorm()
        if base_norm is None:
            base_norm = torch.linalg.vector_norm(dense_weight(base), dim=1, dtype=self.work_dtype)
        self.floor = self.norm.floor(base_norm, self.in_features)
        self.smallest_norm = self.floor * self.in_features**0.5
        self.register_buffer("base_norm", base_norm, persistent=False)
        change = nn.Parameter(self.new_zeros(self.out_features)) if config.bias else None
        self.register_parameter("bias_change", change)

    def new_zeros(self, *shape: int) -> Tensor:
        """Zeros in the working type on the base's device."""
        return torch.zeros(*shape, dtype=self.work_dtype, device=cast(Tensor, self.base.weight).device)

    @property
    def reference_norm(self) -> Tensor:
        """[out] row norms that the norm measures against: those of W0, unless a method moves its reference.

        Not below the norm of a row of floors, so that a row of zeros divides nothing by zero.
        """
        return self.base_norm.clamp_min(self.smallest_norm)

    @property
    def fused_weight(self) -> Tensor | None:
        """[out, in] dense change that is already part of the reference of ``norm: element``; usually None."""
        return None

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """L [out, k] and R [k, in] in the working type, with gradient: the change before the norm is L R."""

    @abstractmethod
    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """The method's fast path: ``y0 + x (diag(scale) L R)^T``.

        Args:
            x: [..., in] input.
            y0: [..., out] output of the base; its type is the type for token matmuls.
            scale: [out] row scale of S-MagNorm, or None for 1.
        """

    def delta_row_square(self) -> Tensor:
        """[out] squared norms of the rows of L R, with gradient."""
        left, right = self.factors()
        return row_products(left, right @ right.t())

    def row_scale(self) -> Tensor | None:
        """[out] row scale of S-MagNorm, or None unless the norm is per row."""
        if self.norm.granularity != "row":
            return None
        return self.norm.row_scale(self.delta_row_square(), self.reference_norm)

    def scaled(self, left: Tensor, scale: Tensor | None) -> Tensor:
        """diag(scale) times a left factor [out, k] of the change; None is 1."""
        return left if scale is None else scale.unsqueeze(-1) * left

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if not self.enabled:
            return cast(Tensor, self.base(x, *args, **kwargs))
        if self._held is not None and not torch.is_grad_enabled():
            y = self._held.linear(x)
        elif self.norm.granularity == "element":
            with no_autocast(x):
                left, right = self.factors()
            y = element_linear(x, left, right, self.base, self.norm, self.floor, self.fused_weight)
        else:
            y0 = self.base(x, *args, **kwargs)
            with no_autocast(x):
                scale = self.row_scale()
                y = self.add_change(x, y0, scale)
        return y if self.bias_change is None else y + self.bias_change.to(y.dtype)

    def held_bytes(self) -> int:
        """What :meth:`holding` keeps: a copy of the weight under ``norm: element``, nothing otherwise."""
        if self.norm.granularity != "element":
            return 0
        return self.out_features * self.in_features * self.base_norm.element_size()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Build the limited weight of ``norm: element`` once for all forwards without a gradient, until this ends.

        For evaluation, where a generated token is a forward. What is trained or buffered must not change meanwhile.
        """
        if self.norm.granularity == "element" and self.enabled:
            with torch.no_grad(), no_autocast(self.base_norm):
                limiter = Limiter(self.base, self.norm, self.floor, self.fused_weight)
                self._held = HeldWeight(limiter, *self.factors())
        try:
            yield
        finally:
            self._held = None

    def low_rank_delta(self) -> tuple[Tensor, Tensor] | None:
        """The exact change after the norm as factors (left, right), or None where it has full rank. No gradient."""
        if self.norm.granularity == "element":
            return None
        with torch.no_grad():
            (left, right), scale = self.factors(), self.row_scale()
            return self.scaled(left, scale), right

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The exact change of the weight after the norm, [out, in]."""
        low_rank = self.low_rank_delta()
        if low_rank is not None:
            return low_rank[0] @ low_rank[1]
        left, right = self.factors()
        change = left.new_empty(left.shape[0], right.shape[1])
        for rows, block in self.delta_blocks():
            change[rows] = block
        return change

    @torch.no_grad()
    def delta_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`delta_weight` in small blocks of rows."""
        low_rank = self.low_rank_delta()
        left, right = self.factors() if low_rank is None else low_rank
        dense, fused = dense_weight(self.base), self.fused_weight
        for rows in row_blocks(dense):
            change = left[rows] @ right
            if low_rank is None:
                reference = dense[rows].to(left.dtype)
                reference = reference if fused is None else reference + fused[rows]
                change = self.norm.element_change(reference, change, self.floor)
                change = change if fused is None else change.add_(fused[rows])
            yield rows, change

    def delta_bias(self) -> Tensor | None:
        """The trained change of the bias, [out]."""
        return None if self.bias_change is None else self.bias_change.detach()

    @torch.no_grad()
    def untouched(self) -> dict[str, Tensor]:
        """A stays and the rest is zero, so that the change before the norm shrinks in proportion."""
        kept = ("A", "lora_A")
        return {k: v.detach().clone() if k in kept else torch.zeros_like(v) for k, v in self.anchors().items()}

    @torch.no_grad()
    def telemetry(self) -> dict[str, Tensor]:
        """``relative_change`` = ||dW_fin|| / ||W0|| and ``restraint`` = the norm's mean divisor M. No host sync."""
        low_rank = self.low_rank_delta()
        if low_rank is not None:
            left, right = low_rank
            change = row_products(left, right @ right.t()).sum().sqrt()
        else:
            change = self.delta_weight().norm()
        return {"relative_change": change / self.base_norm.norm(), "restraint": self._mean_divisor()}

    def _mean_divisor(self) -> Tensor:
        scale = self.row_scale()
        if scale is not None:
            return scale.reciprocal().mean()
        left, right = self.factors()
        if self.norm.granularity == "none":
            return left.new_ones(())
        reference, fused = dense_weight(self.base).to(left.dtype), self.fused_weight
        if fused is not None:
            reference = reference + fused
        return self.norm.element_divisor(reference, left @ right, self.floor).mean()
