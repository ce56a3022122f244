"""SECURA (arXiv 2502.18168): CABR-LoRA, limited by S-MagNorm, fused at task ends.

::

    W_fin = W0 + norm(C K R),   K = K_L + A B        C = W0[:, J] (out, c), R = W0[I, :] (c, in), frozen
                                                     A (c, a), B (a, c), trained

J and I are the columns and rows of W0 of smallest norm, where a change disturbs the base least. A starts as
W0[:c, :a] (to which the authors' SVD expression reduces), B as zero. The norm is :mod:`secura_lightning.adapters.norm`.

Under ``norm: none`` and ``row``, on a module without a bias, x R^T is gathered from the base's output and R is not kept
(:mod:`secura_lightning.adapters.gather`). A module with a bias keeps R and multiplies by it, because its output's sums
are rounded together with the bias. ``norm: element`` needs R for the weight itself: C K R joins W0 before the one
matmul with tokens (:mod:`secura_lightning.adapters.element`).

Fusion moves the trained change into a frozen one and starts B again:

* ``frozen`` (M2): K_L += A B. The norm still measures against the pretrained W0, so outputs do not change and the
  bound 2/s holds for ever. (The authors' M2 at its shipped setting never changes the model.)
* ``base`` (M1): the limited change joins the reference weight, W_t = W0 + E R with E (out, c) += diag(h) C A B, and
  the norm measures against W_t from then on; its bound compounds to (1 + 2/s)^n - 1. With ``norm: element`` the fused
  change is dense.

Restraint, at fusion: when more than ``restraint_percent`` of the rows have a relative change (before the norm) of at
least r_edge = logit(2 - edge)/s, max((out - c)/2, out/4) rows are drawn with p_i ~ ||W0_i||, and their fused change is
multiplied by ``restraint_decay``. Where the authors' code differs from all this (it works on outputs, adds the base
twice, jumps to 4/3 of it) the text is followed; see :mod:`secura_lightning.adapters.norm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import Fusion, require, require_size
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.gather import add_gathered
from secura_lightning.adapters.norm import Granularity
from secura_lightning.adapters.numerics import (
    add_product,
    dense_weight,
    is_quantized,
    linear_shape,
    row_and_column_norms,
    work_dtype,
)
from secura_lightning.adapters.official import OFFICIAL, OfficialLayer

FusionMode = Literal["frozen", "base", "none"]


def restraint_edge(edge: float, s: float) -> float:
    """r_edge = logit(2 - edge) / s: the relative change at which the sigmoid of the norm reaches 2 - edge."""
    return math.log((2 - edge) / (edge - 1)) / s


@dataclass(kw_only=True)
class SECURAConfig(DeltaConfig):
    """SECURA: a change in the span of W0's weakest rows and columns, limited weight by weight, fused at task ends."""

    may_differ: ClassVar[tuple[str, ...]] = ("c", "a")
    norms: ClassVar[tuple[Granularity, ...]] = ("none", "row", "element", "official", "official_max")

    norm: Granularity = "element"
    """S-MagNorm on the change: `element` (the paper's, protects most), `row` (keeps the rank), `none` (plain
    CABR-LoRA); or, to reproduce the authors' figures alone, `official` and `official_max`, which act on outputs, break
    the base and cannot be merged."""
    c: int = 32
    """Number of columns and rows of W0 that span the change (the authors: 150)."""
    a: int = 48
    """Inner size of the core's factors A and B, usually above c (the authors: 200)."""
    fusion: FusionMode = "frozen"
    """What becomes of the change at fusion: `frozen` (into a frozen core, M2), `base` (into the reference weight, M1)
    or `none`."""
    fusion_every: int | None = None
    """Fuse every so many optimizer steps; null: at every task's end."""
    restraint: bool = False
    """Shrink the change of some rows at fusion when most rows moved far."""
    restraint_edge: float = 1.2
    """Sets the relative change that counts as far: logit(2 - edge) / norm_s."""
    restraint_percent: float = 0.9
    """Share of rows that must have moved far."""
    restraint_decay: float = 0.99
    """Factor on the change of the rows that are drawn."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range, or a combination is impossible.
        """
        super().__post_init__()
        for key in ("c", "a", "fusion_every"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"model.adapter.{key} is {value}: it must be at least 1")
        modes = ("frozen", "base", "none")
        require(self.fusion in modes, f"model.adapter.fusion is {self.fusion!r}: choose one of {', '.join(modes)}")
        require(
            self.fusion != "none" or (self.fusion_every is None and not self.restraint),
            "model.adapter.fusion: none never fuses, so fusion_every and restraint do nothing: "
            "remove them, or set fusion: frozen",
        )
        require(
            self.norm not in OFFICIAL or self.fusion != "base",
            f"model.adapter.norm: {self.norm} acts on outputs, which fusion: base could not move into the weight: "
            "set fusion: frozen",
        )
        for key, low in (("restraint_edge", 1), ("restraint_percent", 0), ("restraint_decay", 0)):
            value = getattr(self, key)
            require(low < value < low + 1, f"model.adapter.{key} is {value}: it must lie between {low} and {low + 1}")

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> SECURALayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        require_size("c", self.c, name, base)
        require_size("a", self.a, name, base, limit=linear_shape(base)[1])
        require(
            not (self.fusion == "base" and self.norm == "element" and is_quantized(base)),
            f"model.adapter.fusion: base with norm: element keeps a dense change beside {name}, larger than its "
            "quantised weight: set fusion: frozen, or norm: row, or model.quantization: none",
        )
        kind = OfficialSECURALayer if self.norm in OFFICIAL else SECURALayer
        return kind(base, self, seed=generator.initial_seed())


class SECURALayer(DeltaLayer):
    """A linear module with a CABR change under S-MagNorm.

    Args:
        base: The frozen linear module.
        config: The settings.
        seed: Seed of the restraint's draws.

    Attributes:
        A: [c, a] trained.
        B: [a, c] trained, zero at the start and after every fusion.
        columns: [c] ids J.
        rows: [c] ids I.
        core: [c, c] K_L (fusion ``frozen``).
        row_decay: [out] product of the restraint's factors, on the rows of C, so also on what those rows learn later
            (fusion ``frozen`` with restraint).
        fused_left: [out, c] E (fusion ``base``).
        fused_dense: [out, in] fused change (fusion ``base`` with norm ``element``).
        draws: [2] seed of the restraint, and how often it drew.
    """

    columns: Tensor
    rows: Tensor
    core: Tensor | None
    row_decay: Tensor | None
    fused_left: Tensor | None
    fused_dense: Tensor | None
    draws: Tensor | None
    left_basis: Tensor
    right_basis: Tensor | None
    right_root: Tensor | None
    moved_norm: Tensor | None

    def __init__(self, base: nn.Module, config: SECURAConfig, seed: int) -> None:
        weight = dense_weight(base)
        row_norm, column_norm = row_and_column_norms(weight, work_dtype(base))
        super().__init__(base, config, row_norm)
        self.config = config
        width, dense = config.c, config.norm == "element"
        # A stable sort: rows of equal norm come out in the same order everywhere.
        self.register_buffer("columns", column_norm.argsort(stable=True)[:width].clone())
        self.register_buffer("rows", row_norm.argsort(stable=True)[:width].clone())
        self.A = nn.Parameter(weight[:width, : config.a].to(self.work_dtype, copy=True))
        self.B = nn.Parameter(self.new_zeros(config.a, width))

        frozen, base_mode = config.fusion == "frozen", config.fusion == "base"
        shape = (self.out_features, self.in_features)
        self.register_buffer("core", self.new_zeros(width, width) if frozen else None)
        self.register_buffer("row_decay", self.new_zeros(shape[0]) + 1 if frozen and config.restraint else None)
        self.register_buffer("fused_left", self.new_zeros(shape[0], width) if base_mode and not dense else None)
        self.register_buffer("fused_dense", self.new_zeros(*shape) if base_mode and dense else None)
        self.register_buffer("draws", torch.tensor([seed, 0]) if config.restraint else None)
        for name in ("left_basis", "right_basis", "right_root", "moved_norm"):
            self.register_buffer(name, None, persistent=False)
        self._take_bases(weight)

    def refresh(self) -> None:
        """Recompute C, R and the moved row norms from W0, the ids and the fused change."""
        self._take_bases(dense_weight(self.base))

    @torch.no_grad()
    def _take_bases(self, weight: Tensor) -> None:
        # index_select: on a CPU a quarter of indexing's time.
        self.left_basis = weight.index_select(1, self.columns).to(self.work_dtype)
        if self.row_decay is not None:
            self.left_basis *= self.row_decay.unsqueeze(-1)
        right = weight[self.rows].to(self.work_dtype)
        # Only these two need R itself; everything else gathers x R^T from the base's output.
        self.right_basis = right if self.norm.granularity == "element" or self.base.bias is not None else None
        self.right_root = _gram_root(right) if self.norm.granularity == "row" else None
        if self.fused_left is not None:
            self.moved_norm = torch.linalg.vector_norm(weight + self.fused_left @ right, dim=1, dtype=self.work_dtype)

    def right(self) -> Tensor:
        """R, [c, in]."""
        return dense_weight(self.base)[self.rows].to(self.work_dtype) if self.right_basis is None else self.right_basis

    def total_core(self) -> Tensor:
        """K = K_L + A B, [c, c]."""
        return self.A @ self.B if self.core is None else torch.addmm(self.core, self.A, self.B)

    @property
    def reference_norm(self) -> Tensor:
        """[out] row norms of W0, or of W_t under fusion ``base``."""
        norms = self.base_norm if self.moved_norm is None else self.moved_norm
        return norms.clamp_min(self.smallest_norm)

    @property
    def fused_weight(self) -> Tensor | None:
        """W_t - W0 under fusion ``base`` with norm ``element``."""
        return self.fused_dense

    def factors(self) -> tuple[Tensor, Tensor]:
        """(C K, R): the change before the norm, without what fusion ``base`` has moved into the reference."""
        return self.left_basis @ self.total_core(), self.right()

    def delta_row_square(self) -> Tensor:
        """[out] squared norms of the rows of C K R: those of C (K F), where F F^T = R R^T, so never negative."""
        root = _gram_root(self.right()) if self.right_root is None else self.right_root
        return (self.left_basis @ (self.total_core() @ root)).square().sum(-1)

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + x (E R + diag(scale) C K R)^T``."""
        left = self.scaled(self.left_basis, scale)
        core: Tensor | None = None
        if self.fused_left is None:
            core = self.total_core()
        else:
            left = self.fused_left + left @ self.total_core()
        if self.right_basis is None:
            return add_gathered(y0, self.rows, core, left)
        features = F.linear(x.to(y0.dtype), self.right_basis.to(y0.dtype))  # [..., c]
        if core is not None:
            features = F.linear(features.to(core.dtype), core).to(y0.dtype)
        return add_product(y0, features, left.to(y0.dtype))

    def low_rank_delta(self) -> tuple[Tensor, Tensor] | None:
        """(E + diag(h) C K, R), or None under norm ``element``. No gradient."""
        current = super().low_rank_delta()
        if current is None or self.fused_left is None:
            return current
        return self.fused_left + current[0], current[1]

    def anchors(self) -> dict[str, Tensor]:
        """What is fused and what is trained in one: K_L + A B, or W_t's change under fusion ``base``; A and B only
        where nothing is ever fused."""
        found = super().anchors()
        if self.config.fusion == "none":
            return found
        kept = {name: value for name, value in found.items() if name not in ("A", "B")}
        if self.core is not None:
            return {"core": self.total_core(), **kept}
        left = self.left_basis @ self.total_core()
        if self.fused_left is not None:
            return {"fused_left": self.fused_left + self.scaled(left, self.row_scale()), **kept}
        assert self.fused_dense is not None
        reference = dense_weight(self.base).to(left.dtype) + self.fused_dense
        change = self.norm.element_change(reference, left @ self.right(), self.floor)
        return {"fused_dense": self.fused_dense + change, **kept}

    @contextmanager
    def at(self, values: dict[str, Tensor]) -> Iterator[None]:
        """As if ``values`` had been fused; see :meth:`AdapterLayer.at`."""
        fused = any(name in self._buffers for name in values)
        with super().at(values | ({"B": torch.zeros_like(self.B)} if fused else {})):
            yield

    @torch.no_grad()
    def set_anchors(self, values: dict[str, Tensor]) -> None:
        """Fuse to these values; see :meth:`AdapterLayer.set_anchors`."""
        if any(name in self._buffers for name in values):
            self.B.zero_()
        super().set_anchors(values)

    def end_task(self) -> Fusion:
        """Fuse, unless fusion goes by steps or is off."""
        return self.fuse() if self.config.fusion != "none" and self.config.fusion_every is None else Fusion()

    def after_step(self, step: int) -> Fusion:
        """Fuse at every ``fusion_every``-th step."""
        every = self.config.fusion_every
        return self.fuse() if every is not None and step % every == 0 else Fusion()

    @torch.no_grad()
    def fuse(self) -> Fusion:
        """Move the trained change into the frozen one; A keeps its value, B starts again.

        Returns:
            B for a fresh optimizer state, and what to log: the rows' mean relative change before the norm, the share
            of rows above r_edge, the share that the restraint shrank.
        """
        ratio = self.delta_row_square().sqrt() / self.reference_norm
        moved = (ratio >= restraint_edge(self.config.restraint_edge, self.norm.s)).to(ratio.dtype).mean()
        drawn = self._draw_rows(moved)
        if self.core is not None:
            self.core.copy_(self.total_core())
        elif self.fused_left is not None:
            self.fused_left += self.scaled(self.left_basis @ self.total_core(), self.row_scale())
        elif self.fused_dense is not None:
            self.fused_dense.copy_(self.delta_weight())
        self.B.zero_()
        if drawn is not None:
            change = next(t for t in (self.row_decay, self.fused_left, self.fused_dense) if t is not None)
            change[drawn] *= self.config.restraint_decay
        self.refresh()
        share = 0.0 if drawn is None else len(drawn) / self.out_features
        logs = {"row_ratio": ratio.mean(), "moved_rows": moved, "restrained_rows": torch.full_like(moved, share)}
        return Fusion(reset=[self.B], logs=logs)

    def _draw_rows(self, moved: Tensor) -> Tensor | None:
        """Ids of the rows whose change the restraint shrinks now, p_i ~ ||W0_i||; None where it does not act."""
        if self.draws is None or not moved > self.config.restraint_percent:
            return None
        seed, count = self.draws.tolist()
        generator = torch.Generator().manual_seed((seed + count) % 2**63)
        self.draws[1] += 1
        number = max((self.out_features - self.config.c) // 2, self.out_features // 4, 1)
        weights = self.base_norm.double().cpu().clamp_min(torch.finfo(torch.float64).tiny)
        return weights.multinomial(number, generator=generator).to(self.rows.device)


class OfficialSECURALayer(OfficialLayer, SECURALayer):
    """A linear module with a CABR change, under the authors' norm of outputs."""


def _gram_root(right: Tensor) -> Tensor:
    """F [k, k] with F F^T = right right^T, also where rows of ``right`` depend on one another."""
    values, vectors = torch.linalg.eigh((right @ right.t()).double())
    return (vectors * values.clamp_min(0).sqrt()).to(right.dtype)
