"""LoRA-Null over a sequence of tasks: each finished task's inputs join what the next task must leave alone.

::

    G_0 = w G(calibration) / trace                     G_t = G_(t-1) + G(inputs of task t) / trace
    W   = W0 + norm(sum_(k<t) B_k A_k + B_t A_t)       A_t the null start of G_(t-1), frozen; B_t trained from zero

A null basis from calibration text alone protects that text, not the first task from the second. Here every finished
task adds its second moments, measured through the model as it then is, and the next task gets a basis that is silent on
all of them. No row of a finished task is kept: one Gram matrix a module is. At a task's end B_t A_t becomes part of a
frozen change, so that neither the end nor the new basis changes an output. The sum is exact: its factors are stacked,
and recompressed by QR and SVD once their rank would exceed the matrix' own. ``frozen_rank`` bounds it below that, at
the price of a truncation that is logged as ``frozen_truncation``.

S-MagNorm measures, by ``norm_over``,

* ``sequence``: the whole change, frozen and trained, against W0. Its bound 2/s holds over the sequence. But the norm is
  no linear map: what a later task adds shrinks or bends what earlier ones wrote, so they are protected only nearly.
* ``task`` (``norm: row``): the current task's change alone, ``W = W0 + sum_(k<t) B_k A_k + diag(h) B_t A_t``. Scaling
  rows keeps the null space, so finished tasks are protected as without a norm; the bound is 2/s a task. At a task's
  end diag(h) B_t is what is frozen.

Under either, no task's end changes an output.

The Gram matrix is part of the state, as its lower triangle of in (in + 1) / 2 numbers, so that resumed runs are bit for
bit the uninterrupted ones. Of layers with one input (q, k, v; gate, up) the first keeps the matrix, and the others keep
none. It stays in the CPU's memory, and visits the device at a task's end. In fp64 (the default) that is 33 GB for a
Llama-3.1-8B with all linear layers; ``moments: float32`` halves it. Rounding then lets at most about sqrt(1e-7) of the
inputs through, which nobody sees where the basis itself lets a hundredth through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import AdapterLayer, Fusion, require
from secura_lightning.adapters.lora_null import LoRANullConfig, LoRANullV2
from secura_lightning.adapters.numerics import add_product, row_products
from secura_lightning.errors import SecuraError

MomentType = Literal["float64", "float32"]
NormOver = Literal["sequence", "task"]

_STATE = ("frozen_left", "frozen_right", "gram")


@dataclass(kw_only=True)
class LoRANullSequenceConfig(LoRANullConfig):
    """LoRA-Null that takes a new basis for every task, silent on calibration text and on all finished tasks."""

    accumulates: ClassVar[bool] = True

    frozen_rank: int | None = None
    """Largest rank of the sum of finished tasks' changes; null keeps it exact."""
    moments: MomentType = "float64"
    """Type in which second moments are kept between tasks and in checkpoints: `float64`, or `float32` in half the
    space."""
    base_weight: float = 1.0
    """Weight w of the calibration text beside each finished task: above 1, what the base knows is kept before what the
    tasks taught."""
    norm_over: NormOver = "sequence"
    """What S-MagNorm bounds: the change of the whole `sequence`, or each `task`'s own, with `norm: row`, which leaves
    finished tasks exactly as protected as without a norm."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range, or the version would leave the null space.
        """
        super().__post_init__()
        choices = get_args(NormOver)
        require(
            self.norm_over in choices,
            f"model.adapter.norm_over is {self.norm_over!r}: choose one of {', '.join(choices)}",
        )
        require(
            self.norm_over == "sequence" or self.norm == "row",
            f"model.adapter.norm_over: task needs a norm that keeps the rank, and norm is {self.norm}: "
            "set model.adapter.norm: row, or norm_over: sequence",
        )
        require(
            self.version == "v2",
            "model.adapter.version: v1 trains A out of the null space, so nothing would protect finished tasks: "
            "set version: v2",
        )
        require(
            self.frozen_rank is None or self.frozen_rank >= 1,
            f"model.adapter.frozen_rank is {self.frozen_rank}: it must be at least 1, or null for an exact sum",
        )
        require(self.base_weight > 0, f"model.adapter.base_weight is {self.base_weight}: it must be above 0")
        types = get_args(MomentType)
        require(self.moments in types, f"model.adapter.moments is {self.moments!r}: choose one of {', '.join(types)}")

    @property
    def moment_type(self) -> torch.dtype:
        """:attr:`moments` as torch's type."""
        return torch.float64 if self.moments == "float64" else torch.float32

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
        gram: [in (in + 1) / 2] lower triangle of the accumulated Gram matrix on the CPU; [0] before calibration, and in
            layers whose input another layer's matrix describes.
    """

    lasting: ClassVar[tuple[str, ...]] = ("gram",)

    frozen_left: Tensor
    frozen_right: Tensor
    gram: Tensor

    def __init__(self, base: nn.Module, config: LoRANullSequenceConfig) -> None:
        super().__init__(base, config)
        self.frozen_rank = config.frozen_rank
        self.norm_over = config.norm_over
        self.base_weight = config.base_weight
        self.register_buffer("frozen_left", self.new_zeros(self.out_features, 0))
        self.register_buffer("frozen_right", self.new_zeros(0, self.in_features))
        # No buffer: those follow the model to its device and into its type.
        self.gram = torch.zeros(0, dtype=config.moment_type, device="cpu")

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a checkpoint needs: parameters, buffers and the Gram matrix."""
        yield from super().adapter_tensors()
        yield "gram", self.gram

    @torch.no_grad()
    def calibrate(self, gram: Tensor, others: Sequence[AdapterLayer] = ()) -> None:
        """Add these second moments [in, in], divided by their trace, and start anew in what all of them leave empty.

        The first ones are those of the calibration text, and weigh ``base_weight``.

        Raises:
            SecuraError: The sum so far is kept by a layer that no longer reads this layer's input.
        """
        total = gram / gram.trace().clamp_min(torch.finfo(gram.dtype).tiny)
        if not self.calibrated:
            total *= self.base_weight
        elif self.gram.numel():
            total += unpack(self.gram.to(total), self.in_features)
        else:
            raise SecuraError(
                "the finished tasks' moments of an input are kept by another module, which read the same input when "
                "they were measured and no longer does: the model's code has changed, so begin the sequence again"
            )
        self.gram = pack(total).to(self.gram)
        for other in others:
            assert isinstance(other, NullSequenceLayer)
            other.gram = other.gram.new_zeros(0)
        super().calibrate(total, others)

    @torch.no_grad()
    def end_task(self) -> Fusion:
        """Freeze what the task taught; B starts again from zero.

        Returns:
            B for a fresh optimizer state, and what to log: the share of the frozen change that was truncated.
        """
        left, right = self.factors()
        if self.norm_over == "task":
            left = self.scaled(left, self.row_scale())
        limit = min(self.out_features, self.in_features, self.frozen_rank or self.in_features)
        lost = left.new_zeros(())
        if left.shape[1] > limit:
            left, right, lost = compress(left, right, limit)
        self.frozen_left, self.frozen_right = left, right
        self.lora_B.zero_()
        return Fusion(reset=[self.lora_B], logs={"frozen_truncation": lost})

    def anchors(self) -> dict[str, Tensor]:
        """B and F_L: coordinates of one task, since the next one has another basis and a wider F."""
        return {**super().anchors(), "frozen_left": self.frozen_left}

    def factors(self) -> tuple[Tensor, Tensor]:
        """([F_L, B], [F_R; A])."""
        return torch.cat([self.frozen_left, self.lora_B], dim=1), torch.cat([self.frozen_right, self.lora_A])

    def delta_row_square(self) -> Tensor:
        """[out] squared norms of the rows of what the norm bounds."""
        if self.norm_over == "sequence":
            return super().delta_row_square()
        return row_products(self.lora_B, self.lora_A @ self.lora_A.t())

    def scaled(self, left: Tensor, scale: Tensor | None) -> Tensor:
        """The left factor [out, k + r] under the row scale: under ``norm_over: task`` its last r columns alone."""
        if scale is None or self.norm_over == "sequence":
            return super().scaled(left, scale)
        frozen, trained = left.tensor_split([self.frozen_left.shape[1]], dim=1)
        return torch.cat([frozen, scale.unsqueeze(-1) * trained], dim=1)

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + x (diag(scale) (F_L F_R + B A))^T``; under ``norm_over: task`` the scale is that of B A alone."""
        left, right = self.factors()
        features = F.linear(x.to(y0.dtype), right.to(y0.dtype))  # [..., k + r]
        return add_product(y0, features, self.scaled(left, scale).to(y0.dtype))

    def fits(self, name: str, shape: torch.Size) -> bool:
        """The frozen factors have the rank of the tasks so far, and the Gram matrix is empty before calibration."""
        if name == "frozen_left":
            return len(shape) == 2 and shape[0] == self.out_features
        if name == "frozen_right":
            return len(shape) == 2 and shape[1] == self.in_features
        if name == "gram":
            return shape in ((0,), (packed_size(self.in_features),))
        return super().fits(name, shape)

    def resize(self, name: str, shape: torch.Size) -> None:
        """Make room for a state of other tasks."""
        assert name in _STATE, name
        setattr(self, name, getattr(self, name).new_zeros(shape))


def packed_size(width: int) -> int:
    """How many numbers :func:`pack` keeps of a [width, width] matrix."""
    return width * (width + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric [n, n] matrix, row after row, as [n (n + 1) / 2]."""
    return torch.cat([row[: i + 1] for i, row in enumerate(matrix)])


def unpack(packed: Tensor, width: int) -> Tensor:
    """The symmetric [width, width] matrix that was packed."""
    matrix = packed.new_zeros(width, width)
    for i, row in enumerate(packed.split(list(range(1, width + 1)))):
        matrix[i, : i + 1] = row
    return matrix.add_(matrix.tril(-1).t())


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
