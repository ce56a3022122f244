"""CURLoRA (arXiv 2408.14572): a CUR decomposition of W0 whose middle factor alone is trained.

::

    W = W0 + alpha C U R        C = W0[:, J] (out, r), R = W0[I, :] (r, in), frozen;  U (r, r) trained from zero

J and I are drawn against their weight: with p_j = ||W0_:j||^2 / ||W0||_F^2, a column is drawn by
p~_j = (1/p_j) / sum(1/p), so that the change lives where the base says least; rows likewise. x R^T is gathered from the
base's output (:mod:`secura_lightning.adapters.gather`), except on a module with a bias and under ``norm: element``,
which keep R, as in :mod:`secura_lightning.adapters.secura`.

The authors' code draws by 1 / (p + 1e-3), which is almost uniform at 4096 columns (``inverse_smoothed``), and with
replacement, so that C may hold a column twice; here draws are without replacement unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import require, require_size
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.gather import add_gathered
from secura_lightning.adapters.numerics import (
    add_product,
    dense_weight,
    row_and_column_norms,
    row_products,
    work_dtype,
)

Selection = Literal["inverse", "inverse_smoothed", "smallest", "uniform"]

_SMOOTHING = 1e-3  # the authors' code


def selection_probabilities(norms: Tensor, selection: Selection) -> Tensor:
    """p~: the probability of the first draw for every column (or row).

    Args:
        norms: [n] norms of the columns.
        selection: ``inverse``, ``inverse_smoothed`` or ``uniform``; ``smallest`` draws nothing.

    Returns:
        [n] in fp64 on the CPU. Columns of zeros share all the probability under ``inverse``.
    """
    square = norms.double().cpu().square()
    if selection == "uniform":
        return torch.full_like(square, 1 / len(square))
    share = square / square.sum().clamp_min(torch.finfo(square.dtype).tiny)
    weight = 1 / (share + _SMOOTHING) if selection == "inverse_smoothed" else 1 / share.clamp_min(1e-200)
    return weight / weight.sum()


def draw(norms: Tensor, number: int, selection: Selection, replacement: bool, generator: torch.Generator) -> Tensor:
    """Ids of the columns (or rows) that span the change.

    Without replacement by Gumbel top-k: the ``number`` largest of log p~ + Gumbel noise are distributed as draws one
    after another without putting back.

    Args:
        norms: [n] norms of the columns.
        number: How many to choose.
        selection: By what; ``smallest`` takes those of smallest norm and draws nothing.
        replacement: Whether a column may be drawn again.
        generator: CPU generator.

    Returns:
        [number] int64 on the norms' device.
    """
    if selection == "smallest":
        return norms.argsort(stable=True)[:number].clone()
    weights = selection_probabilities(norms, selection)
    if replacement:
        return weights.multinomial(number, replacement=True, generator=generator).to(norms.device)
    uniform = torch.rand(len(weights), generator=generator, dtype=torch.float64, device="cpu")
    tiny = torch.finfo(torch.float64).tiny
    gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
    return (weights.clamp_min(tiny).log() + gumbel).topk(number).indices.to(norms.device)


@dataclass(kw_only=True)
class CURLoRAConfig(DeltaConfig):
    """CURLoRA: a small trained matrix between drawn columns and rows of every target's weight."""

    rank: int = 16
    """Number of columns and rows of W0 that span the change; rank**2 parameters a module."""
    alpha: float = 1.0
    """The change is scaled by this."""
    selection: Selection = "inverse"
    """How columns and rows are chosen: `inverse` (the paper's: probability falls with the norm), `inverse_smoothed`
    (the authors' code: almost uniform), `smallest` (of smallest norm, no draw) or `uniform`."""
    replacement: bool = False
    """Whether a column or row may be drawn more than once (the authors' code: yes)."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range, or a combination is impossible.
        """
        super().__post_init__()
        require(self.rank >= 1, f"model.adapter.rank is {self.rank}: it must be at least 1")
        require(self.alpha > 0, f"model.adapter.alpha is {self.alpha}: it must be above 0")
        modes = get_args(Selection)
        require(
            self.selection in modes, f"model.adapter.selection is {self.selection!r}: choose one of {', '.join(modes)}"
        )
        require(
            not (self.replacement and self.selection == "smallest"),
            "model.adapter.replacement: true does nothing under selection: smallest, which draws nothing: remove it",
        )

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> CURLoRALayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        require_size("rank", self.rank, name, base)
        return CURLoRALayer(base, self, generator)


class CURLoRALayer(DeltaLayer):
    """A linear module with a change ``alpha C U R``.

    Args:
        base: The frozen linear module.
        config: The settings.
        generator: CPU generator of the draws.

    Attributes:
        U: [r, r] trained, zero at the start.
        columns: [r] ids J.
        rows: [r] ids I.
    """

    columns: Tensor
    rows: Tensor
    left_basis: Tensor
    right_basis: Tensor | None
    right_gram: Tensor | None

    def __init__(self, base: nn.Module, config: CURLoRAConfig, generator: torch.Generator) -> None:
        weight = dense_weight(base)
        row_norm, column_norm = row_and_column_norms(weight, work_dtype(base))
        super().__init__(base, config, row_norm)
        self.config = config
        how = (config.rank, config.selection, config.replacement, generator)
        self.register_buffer("columns", draw(column_norm, *how))
        self.register_buffer("rows", draw(row_norm, *how))
        self.U = nn.Parameter(self.new_zeros(config.rank, config.rank))
        for name in ("left_basis", "right_basis", "right_gram"):
            self.register_buffer(name, None, persistent=False)
        self._take_bases(weight)

    def refresh(self) -> None:
        """Take C, and where needed R, from W0 by the ids."""
        self._take_bases(dense_weight(self.base))

    @torch.no_grad()
    def _take_bases(self, weight: Tensor) -> None:
        # index_select: on a CPU a quarter of indexing's time.
        self.left_basis = weight.index_select(1, self.columns).to(self.work_dtype)
        right = weight[self.rows].to(self.work_dtype)
        # Only these two need R itself; everything else gathers x R^T from the base's output.
        self.right_basis = right if self.norm.granularity == "element" or self.base.bias is not None else None
        self.right_gram = right @ right.t() if self.norm.granularity == "row" else None

    def right(self) -> Tensor:
        """R, [r, in]."""
        return dense_weight(self.base)[self.rows].to(self.work_dtype) if self.right_basis is None else self.right_basis

    def left(self) -> Tensor:
        """alpha C U, [out, r]."""
        return self.left_basis @ (self.config.alpha * self.U)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(alpha C U, R)."""
        return self.left(), self.right()

    def delta_row_square(self) -> Tensor:
        """[out] squared norms of the change's rows, from R R^T."""
        return super().delta_row_square() if self.right_gram is None else row_products(self.left(), self.right_gram)

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + alpha ((x R^T) U^T) (diag(scale) C)^T``."""
        left = self.scaled(self.left_basis, scale)
        core = self.config.alpha * self.U
        if self.right_basis is None:
            return add_gathered(y0, self.rows, core, left)
        features = F.linear(x.to(y0.dtype), self.right_basis.to(y0.dtype))  # [..., r]
        return add_product(y0, F.linear(features.to(core.dtype), core).to(y0.dtype), left.to(y0.dtype))
