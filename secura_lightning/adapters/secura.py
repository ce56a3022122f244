"""SECURA (arXiv 2502.18168): CABR-LoRA, limited by S-MagNorm, fused at task ends.

::

    W_fin = W0 + norm(C K R),   K = K_L + A B        C = W0[:, J] (out, c), R = W0[I, :] (c, in), frozen
                                                     A (c, a), B (a, c), trained

J and I are the columns and rows of W0 of smallest norm, where a change disturbs the base least. A starts as W0[:c, :a] (to which the
authors' SVD expression reduces), B as zero. x R^T is gathered from the base's output (:mod:`secura_lightning.adapters.gather`), and
the norm is :mod:`secura_lightning.adapters.norm`.

Fusion moves the trained change into a frozen one and starts B again:

* ``frozen`` (M2): K_L += A B. The norm still measures against the pretrained W0, so outputs do not change and the bound 2/s holds
  for ever. (The authors' M2 at its shipped setting never changes the model.)
* ``base`` (M1): the limited change joins the reference weight, W_t = W0 + E R with E (out, c) += diag(h) C A B, and the norm measures
  against W_t from then on; its bound compounds to (1 + 2/s)^n - 1. With ``norm: element`` the fused change is dense.

Restraint, at fusion: when most rows moved by more than r_edge, some rows' change is shrunk. Where the authors' code differs (output
space, two additions of the base, 4/3 jumps) this file follows the text, see :mod:`secura_lightning.adapters.norm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import Fusion, require
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.gather import add_gathered
from secura_lightning.adapters.norm import Granularity
from secura_lightning.adapters.numerics import add_product, dense_weight, is_quantized, row_products

FusionMode = Literal["frozen", "base", "none"]


def restraint_edge(edge: float, s: float) -> float:
    """r_edge = logit(2 - edge) / s: the relative change at which the sigmoid of the norm reaches 2 - edge."""
    return math.log((2 - edge) / (edge - 1)) / s


@dataclass(kw_only=True)
class SECURAConfig(DeltaConfig):
    """SECURA: a change in the span of W0's weakest rows and columns, limited weight by weight, fused at task ends."""

    norm: Granularity = "element"
    """S-MagNorm on the change: `element` (the paper's, protects most), `row` (keeps the rank) or `none` (plain CABR-LoRA)."""
    c: int = 32
    """Number of columns and rows of W0 that span the change (the authors: 150)."""
    a: int = 48
    """Inner size of the core's factors A and B, usually above c (the authors: 200)."""
    fusion: FusionMode = "frozen"
    """What becomes of the change at fusion: `frozen` (into a frozen core, M2), `base` (into the reference weight, M1) or `none`."""
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
        for key, low in (("restraint_edge", 1), ("restraint_percent", 0), ("restraint_decay", 0)):
            value = getattr(self, key)
            require(low < value < low + 1, f"model.adapter.{key} is {value}: it must lie between {low} and {low + 1}")

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> SECURALayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        rows, columns = dense_weight(base).shape
        for key, limit in (("c", min(rows, columns)), ("a", columns)):
            require(
                getattr(self, key) <= limit,
                f"model.adapter.{key} is {getattr(self, key)}, but {name} is {rows} x {columns}: use at most {limit}, "
                "or leave the module out with model.adapter.exclude",
            )
        require(
            not (self.fusion == "base" and self.norm == "element" and is_quantized(base)),
            f"model.adapter.fusion: base with norm: element keeps a dense change beside {name}, larger than its quantised "
            "weight: set fusion: frozen, or norm: row, or model.quantization: none",
        )
        return SECURALayer(base, self, seed=generator.initial_seed())


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
        row_decay: [out] product of the restraint's factors, on the rows of C (fusion ``frozen`` with restraint).
        fused_left: [out, c] E (fusion ``base``).
        fused_dense: [out, in] fused change (fusion ``base`` with norm ``element``).
        draws: [2] seed and number of the restraint's draws so far.
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
