"""PiSSA (arXiv 2404.02948) and MiLoRA (arXiv 2406.09044): low-rank factors that start at singular triplets of W0.

::

    W = W0 + s (B A - B0 A0),     B0 = U (S/s)^1/2,  A0 = (S/s)^1/2 V^T,     s = alpha / r, 1 by default

with the r largest singular triplets (PiSSA: the change starts where the base is strong) or the r smallest (MiLoRA: it
starts where the base is weak). Both papers write the rest, W0 - s B0 A0, into the base; here the start is subtracted
beside an untouched base, which is the same function, exact on a bf16 base and possible on a 4-bit one. It is computed
as ``B A - B0 A0 = (B - B0) A + B0 (A - A0)``: exactly zero at the start, and free of cancellation near it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import require, require_size
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.numerics import add_product, dense_weight

_OVERSAMPLE = 10  # further directions of the randomized SVD, as torch.svd_lowrank advises

Triplets = tuple[Tensor, Tensor, Tensor]
"""U [out, r], S [r], V^T [r, in]."""


class StartedLayer(DeltaLayer):
    """A linear module with a change ``scale * (B A - B0 A0)``.

    Args:
        base: The frozen linear module.
        config: Settings that all such adapters share.
        rank: r.
        scale: Factor on the change.

    Attributes:
        lora_A: [r, in] trained, A0 at the start.
        lora_B: [out, r] trained, B0 at the start.
        start_A: [r, in] A0.
        start_B: [out, r] B0.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: nn.Module, config: DeltaConfig, rank: int, scale: float) -> None:
        super().__init__(base, config)
        self.scale = scale
        self.lora_A = nn.Parameter(self.new_zeros(rank, self.in_features))
        self.lora_B = nn.Parameter(self.new_zeros(self.out_features, rank))
        # Saved with the state: a randomized or calibrated start cannot be had again from W0 bit for bit.
        self.register_buffer("start_A", self.new_zeros(rank, self.in_features))
        self.register_buffer("start_B", self.new_zeros(self.out_features, rank))

    @torch.no_grad()
    def set_start(self, start_a: Tensor, start_b: Tensor) -> None:
        """Start from A0 [r, in] and B0 [out, r]."""
        for tensor in (self.lora_A, self.start_A):
            tensor.copy_(start_a)
        for tensor in (self.lora_B, self.start_B):
            tensor.copy_(start_b)

    def untouched(self) -> dict[str, Tensor]:
        """A0 and B0."""
        return {**super().untouched(), "lora_A": self.start_A.clone(), "lora_B": self.start_B.clone()}

    def factors(self) -> tuple[Tensor, Tensor]:
        """(scale [B - B0, B0], [A; A - A0]), of rank 2 r."""
        left = torch.cat([self.lora_B - self.start_B, self.start_B], dim=1)
        return self.scale * left, torch.cat([self.lora_A, self.lora_A - self.start_A])

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + x (diag(scale) L R)^T``."""
        left, right = self.factors()
        features = F.linear(x.to(y0.dtype), right.to(y0.dtype))  # [..., 2 r]
        return add_product(y0, features, self.scaled(left, scale).to(y0.dtype))


@dataclass(kw_only=True)
class SVDConfig(DeltaConfig):
    """Settings that PiSSA and MiLoRA share."""

    rank: int = 8
    """Rank of the factors."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; null: by 1."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        require(self.rank >= 1, f"model.adapter.rank is {self.rank}: it must be at least 1")
        require(self.alpha is None or self.alpha > 0, f"model.adapter.alpha is {self.alpha}: it must be above 0")

    @abstractmethod
    def triplets(self, weight: Tensor, generator: torch.Generator) -> Triplets:
        """The singular triplets of ``weight`` [out, in] that the factors start from."""

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> StartedLayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        require_size("rank", self.rank, name, base)
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        layer = StartedLayer(base, self, self.rank, scale)
        with torch.no_grad():
            u, s, vt = self.triplets(dense_weight(base).to(layer.work_dtype), generator)
            root = (s / scale).sqrt()
            layer.set_start(root.unsqueeze(-1) * vt, u * root)
        return layer


@dataclass(kw_only=True)
class PiSSAConfig(SVDConfig):
    """PiSSA: trained factors that start at the largest singular triplets of every target's weight."""

    svd: Literal["randomized", "exact"] = "randomized"
    """`randomized` (subspace iteration: fast, and as good) or `exact` (minutes on a large model)."""
    niter: int = 4
    """Iterations of the randomized SVD."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        require(
            self.svd in ("randomized", "exact"), f"model.adapter.svd is {self.svd!r}: choose one of randomized, exact"
        )
        require(self.niter >= 0, f"model.adapter.niter is {self.niter}: it must be at least 0")

    def triplets(self, weight: Tensor, generator: torch.Generator) -> Triplets:
        """The r largest triplets."""
        if self.svd == "randomized":
            return top_triplets(weight, self.rank, self.niter, generator)
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        return u[:, : self.rank], s[: self.rank], vt[: self.rank]


@dataclass(kw_only=True)
class MiLoRAConfig(SVDConfig):
    """MiLoRA: trained factors that start at the smallest singular triplets of every target's weight."""

    def triplets(self, weight: Tensor, generator: torch.Generator) -> Triplets:
        """The r smallest triplets."""
        return bottom_triplets(weight, self.rank)


def top_triplets(weight: Tensor, rank: int, niter: int, generator: torch.Generator) -> Triplets:
    """The ``rank`` largest singular triplets by randomized subspace iteration (Halko et al., arXiv 0909.4061).

    As ``torch.svd_lowrank`` with q = rank + 10, but drawn from ``generator`` on the CPU, so that a seed gives the same
    start on every device and whatever was drawn before.

    Args:
        weight: [out, in].
        rank: How many.
        niter: Iterations; each sharpens the spectrum by its square.
        generator: CPU generator.
    """
    width = min(rank + _OVERSAMPLE, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=generator, dtype=weight.dtype, device="cpu").to(weight.device)
    basis = torch.linalg.qr(weight @ probe).Q  # [out, q]
    for _ in range(niter):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def bottom_triplets(weight: Tensor, rank: int) -> Triplets:
    """The ``rank`` smallest singular triplets, through the eigenvectors of the smaller Gram matrix in fp64.

    Args:
        weight: [out, in].
        rank: How many.
    """
    if weight.shape[0] > weight.shape[1]:
        u, s, vt = bottom_triplets(weight.t(), rank)
        return vt.t(), s, u.t()
    wide = weight.double()
    basis = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, :rank]  # [out, r], smallest first
    # Squaring costs half the digits of a small singular value: take it from W0 within the subspace.
    u, s, vt = torch.linalg.svd(basis.t() @ wide, full_matrices=False)
    return (basis @ u).to(weight.dtype), s.to(weight.dtype), vt.to(weight.dtype)
