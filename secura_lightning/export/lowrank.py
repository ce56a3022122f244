"""Any adapter's change as the factors of a LoRA: exactly where its rank allows, else by truncated SVD.

=====================  =======================================================  ==========
adapter                B (out, r), A (r, in)                                    exact
=====================  =======================================================  ==========
LoRA, rsLoRA           as trained, with alpha                                   yes
LoRA-Null v2           as trained                                               yes
PiSSA, MiLoRA, Null v1 [B - B0, B0], [A; A - A0]: the start subtracted, rank 2r yes
CURLoRA                C U, R                                                   yes
SECURA none, row       diag(h) C K, R (with the fused change: E + diag(h) C K)  yes
DoRA                   as trained, with the magnitude                           yes
norm ``row`` on any    diag(h) B, A                                             yes
norm ``element``, full truncated SVD of the dense change                        to a tolerance
=====================  =======================================================  ==========
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secura_lightning.adapters.base import AdapterLayer
from secura_lightning.adapters.delta import DeltaLayer
from secura_lightning.adapters.dora import DoRALayer
from secura_lightning.adapters.lora import LoRALayer
from secura_lightning.adapters.numerics import is_linear
from secura_lightning.errors import SecuraError


@dataclass(frozen=True)
class LowRank:
    """One module's change as a LoRA.

    Attributes:
        left: B [out, r].
        right: A [r, in].
        scale: The change is ``scale * B A``.
        bias: [out] change of the bias, or None.
        magnitude: [out] DoRA's m, or None.
        error: ||dW - B A|| / ||dW||; 0 where exact.
        trained: Whether B and A are the tensors that were trained, so that training can go on from them.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    error: float = 0.0
    trained: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.right.shape[0]


@torch.no_grad()
def low_rank(name: str, layer: AdapterLayer, rank: int | None, tolerance: float) -> LowRank:
    """The change of the module ``name`` as a LoRA.

    Args:
        name: For messages.
        layer: The adapter.
        rank: Rank of a truncated SVD; None for the smallest that meets ``tolerance``. Exact changes keep theirs.
        tolerance: Largest relative error of a truncated SVD.

    Raises:
        SecuraError: The module is not linear, or the truncated SVD is too far off.
    """
    if not is_linear(layer.base):
        raise SecuraError(
            f"{name} ({type(layer.base).__name__}) is no linear layer, so its change is no LoRA: use `secura merge`"
        )
    bias = layer.delta_bias()
    bias = bias if bias is not None and bool(bias.any()) else None
    if isinstance(layer, DoRALayer):
        if bias is not None:
            raise SecuraError(f"{name}: PEFT's DoRA has no bias, but this one's was trained: use `secura merge`")
        return LowRank(layer.lora_B, layer.lora_A, layer.scale, magnitude=layer.magnitude, trained=True)
    if isinstance(layer, LoRALayer) and layer.norm.granularity == "none":
        return LowRank(layer.lora_B, layer.lora_A, layer.scale, bias, trained=True)
    exact = layer.low_rank_delta() if isinstance(layer, DeltaLayer) else None
    if exact is not None:
        return LowRank(*exact, bias=bias)
    left, right, error = truncate(layer.delta_weight(), rank, tolerance)
    if error > tolerance:
        raise SecuraError(
            f"{name}: rank {rank} holds its change to a relative error of {error:.3f}, above --tolerance {tolerance}; "
            "raise --rank, leave --rank out, or use `secura merge`, which is exact"
        )
    return LowRank(left, right, bias=bias, error=error)


def truncate(change: Tensor, rank: int | None, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """The best approximation of a matrix by a product of small factors (Eckart and Young, 1936).

    Through the eigenvectors of the smaller Gram matrix in fp64, which costs a fraction of a full SVD.

    Args:
        change: [out, in].
        rank: How many singular directions; None for the smallest number that meets ``tolerance``, at least 1.
        tolerance: Relative error in the Frobenius norm.

    Returns:
        B [out, r], A [r, in], both scaled by the roots of the singular values; and the relative error.
    """
    if change.shape[0] > change.shape[1]:
        right, left, error = truncate(change.t(), rank, tolerance)
        return left.t().contiguous(), right.t().contiguous(), error
    wide = change.double()
    values, vectors = torch.linalg.eigh(wide @ wide.t())  # ascending
    energy = values.flip(0).clamp_min(0)
    total = energy.sum()
    if not bool(total > 0):
        return change.new_zeros(change.shape[0], 1), change.new_zeros(1, change.shape[1]), 0.0
    errors = ((total - energy.cumsum(0)).clamp_min(0) / total).sqrt()  # after 1, 2, ... directions
    if rank is None:
        rank = min(int((errors > tolerance).sum()) + 1, len(errors))
    rank = min(rank, len(errors))
    basis = vectors.flip(1)[:, :rank]
    root = energy[:rank].sqrt().sqrt().clamp_min(torch.finfo(torch.float32).tiny)  # singular values' roots
    left, right = basis * root, (basis.t() @ wide) / root.unsqueeze(-1)
    return left.to(change.dtype), right.to(change.dtype), float(errors[rank - 1])
