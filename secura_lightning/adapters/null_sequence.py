"""LoRA-Null over a sequence of tasks: each finished task's inputs join what the next task must leave alone.

::

    G_0 = G(calibration) / trace                       G_t = G_(t-1) + G(inputs of task t) / trace
    W   = W0 + norm(sum_(k<t) B_k A_k + B_t A_t)       A_t the null start of G_(t-1), frozen; B_t trained from zero

A null basis from calibration text alone protects that text, not the first task from the second. Here every finished
task adds its second moments, measured through the model as it then is, and the next task gets a basis that is silent on
all of them. No row of a finished task is kept: one Gram matrix a module is. At a task's end B_t A_t becomes part of a
frozen change, so that neither the end nor the new basis changes an output. The sum is exact: its factors are stacked,
and recompressed by QR and SVD once their rank would exceed the matrix' own. ``frozen_rank`` bounds it below that, at
the price of a truncation that is logged as ``frozen_truncation``.

S-MagNorm measures the whole change, frozen and trained, against W0: so no task's end changes an output under it either,
and its bound holds over the sequence, where a norm against the frozen reference would compound task by task. The norm
is no linear map, so under it the null space protects finished tasks only nearly: the better, the smaller the change.

The Gram matrix is part of the state, as the lower triangle in fp64: in (in + 1) / 2 numbers, no more bytes than all of
it in fp32, whose rounding alone would let sqrt(1e-7) of the inputs through. Resumed runs are therefore bit for bit the
uninterrupted ones. Layers with one input each keep their own copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import Fusion, require
from secura_lightning.adapters.lora_null import LoRANullConfig, LoRANullV2, null_basis
from secura_lightning.adapters.numerics import add_product
from secura_lightning.errors import ConfigError

_STATE = ("frozen_left", "frozen_right", "gram")


@dataclass(kw_only=True)
class LoRANullSequenceConfig(LoRANullConfig):
    """LoRA-Null that takes a new basis for every task, silent on calibration text and on all finished tasks."""

    accumulates: ClassVar[bool] = True

    frozen_rank: int | None = None
    """Largest rank of the sum of finished tasks' changes; null keeps it exact."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range, or the version would leave the null space.
        """
        super().__post_init__()
        require(
            self.version == "v2",
            "model.adapter.version: v1 trains A out of the null space, so nothing would protect finished tasks: "
            "set version: v2",
        )
        require(
            self.frozen_rank is None or self.frozen_rank >= 1,
            f"model.adapter.frozen_rank is {self.frozen_rank}: it must be at least 1, or null for an exact sum",
        )

    def _layer(self, base: nn.Module) -> NullSequenceLayer:
        return NullSequenceLayer(base, self)


class NullSequenceLayer(LoRANullV2):
    """A linear module with a frozen change of finished tasks, and ``B A`` with B trained.

    Args:
        base: The frozen linear module.
        config: The settings.

    Attributes:
        frozen_left: [out, k] left factor of the finished tasks' change; k grows by the rank at each task's end.
        frozen_right: [k, in] right factor.
        gram: [in (in + 1) / 2] lower triangle of the accumulated Gram matrix in fp64; [0] before calibration.
    """

    frozen_left: Tensor
    frozen_right: Tensor
    gram: Tensor

    def __init__(self, base: nn.Module, config: LoRANullSequenceConfig) -> None:
        super().__init__(base, config)
        self.frozen_rank = config.frozen_rank
        self.register_buffer("frozen_left", self.new_zeros(self.out_features, 0))
        self.register_buffer("frozen_right", self.new_zeros(0, self.in_features))
        self.register_buffer("gram", self.new_zeros(0).double())

    @torch.no_grad()
    def calibrate(self, gram: Tensor) -> None:
        """Add these second moments [in, in], divided by their trace, and start anew in what all of them leave empty."""
        total = gram / gram.trace().clamp_min(torch.finfo(gram.dtype).tiny)
        if self.gram.numel():
            total += unpack(self.gram, self.in_features)
        self.gram = pack(total)
        null, leakage = null_basis(total, self.config.rank)
        self._start_at(null)
        self.leakage.copy_(leakage)
        self.calibrated = True

    @torch.no_grad()
    def end_task(self) -> Fusion:
        """Freeze what the task taught; B starts again from zero.

        Returns:
            B for a fresh optimizer state, and what to log: the share of the frozen change that was truncated.
        """
        left = torch.cat([self.frozen_left, self.lora_B.detach()], dim=1)
        right = torch.cat([self.frozen_right, self.lora_A])
        limit = min(self.out_features, self.in_features, self.frozen_rank or self.in_features)
        lost = left.new_zeros(())
        if left.shape[1] > limit:
            left, right, lost = compress(left, right, limit)
        self.frozen_left, self.frozen_right = left, right
        self.lora_B.zero_()
        return Fusion(reset=[self.lora_B], logs={"frozen_truncation": lost})

    def anchors(self) -> dict[str, Tensor]:
        """B, during the first task.

        Raises:
            ConfigError: A task has ended, and B is not the coordinate that it was.
        """
        if not self.frozen_left.shape[1]:
            return super().anchors()
        raise ConfigError(
            "LoRANullSequenceConfig takes new coordinates for every task, which no penalty or average of coordinates "
            "(EWC, I-LoRA) can hold on to: use LoRANullConfig, or a strategy without them, such as replay"
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """([F_L, B], [F_R; A])."""
        return torch.cat([self.frozen_left, self.lora_B], dim=1), torch.cat([self.frozen_right, self.lora_A])

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + x (diag(scale) (F_L F_R + B A))^T``."""
        left, right = self.factors()
        features = F.linear(x.to(y0.dtype), right.to(y0.dtype))  # [..., k + r]
        return add_product(y0, features, (left if scale is None else scale.unsqueeze(-1) * left).to(y0.dtype))

    def fits(self, name: str, shape: torch.Size) -> bool:
        """The frozen factors have the rank of the tasks so far, and the Gram matrix is empty before calibration."""
        if name == "frozen_left":
            return len(shape) == 2 and shape[0] == self.out_features
        if name == "frozen_right":
            return len(shape) == 2 and shape[1] == self.in_features
        if name == "gram":
            return shape in ((0,), (self.in_features * (self.in_features + 1) // 2,))
        return super().fits(name, shape)

    def resize(self, name: str, shape: torch.Size) -> None:
        """Make room for a state of other tasks."""
        assert name in _STATE, name
        setattr(self, name, getattr(self, name).new_zeros(shape))


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric [n, n] matrix, row after row, as [n (n + 1) / 2]."""
    return torch.cat([row[: i + 1] for i, row in enumerate(matrix)])


def unpack(packed: Tensor, width: int) -> Tensor:
    """The symmetric [width, width] matrix that was packed."""
    matrix = packed.new_zeros(width, width)
    for i, row in enumerate(packed.split(list(range(1, width + 1)))):
        matrix[i, : i + 1] = row
    return matrix + matrix.tril(-1).t()


def compress(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of ``left @ right`` by factors of ``rank``; exact where that is not below its own rank.

    Args:
        left: [out, k].
        right: [k, in].
        rank: At most k.

    Returns:
        Factors [out, rank] and [rank, in], orthonormal rows in the second; and the share of the Frobenius norm that is
        lost, a scalar.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, s, vt = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    lost = s[rank:].norm() / s.norm().clamp_min(torch.finfo(s.dtype).tiny)
    kept_left, kept_right = q_left @ (u[:, :rank] * s[:rank]), vt[:rank] @ q_right.t()
    return kept_left.to(left.dtype), kept_right.to(right.dtype).contiguous(), lost.to(left.dtype)
