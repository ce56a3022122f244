"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732).

``W = W0 + (alpha / r) B A`` with A (r, in) uniform as in ``nn.Linear`` and B (out, r) zero; rsLoRA scales by
``alpha / sqrt(r)``. DoRA has the same settings and the same start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import require, require_size
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.numerics import add_product
from secura_lightning.adapters.overrides import PerTargetConfig

Init = Literal["kaiming", "gaussian", "orthogonal"]


@dataclass(kw_only=True)
class LoRASettings(PerTargetConfig):
    """What LoRA and DoRA share: the product ``scale * B A`` and how A starts."""

    rank: int = 8
    """Rank of the change."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    init: Init = "kaiming"
    """Start of A: `kaiming` (uniform in +-1/sqrt(in)), `gaussian` (deviation 1/rank) or `orthogonal` (orthonormal
    rows); B starts as zero with each."""
    dropout: float = 0.0
    """Dropout on the input of the change, in training."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        require(self.rank >= 1, f"model.adapter.rank is {self.rank}: it must be at least 1")
        require(self.alpha > 0, f"model.adapter.alpha is {self.alpha}: it must be above 0")
        inits = get_args(Init)
        require(self.init in inits, f"model.adapter.init is {self.init!r}: choose one of {', '.join(inits)}")
        require(0 <= self.dropout < 1, f"model.adapter.dropout is {self.dropout}: it must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def start(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """A's start, in the shape [r, in] and type of ``like``."""
        # Drawn on the CPU, so that a seed gives the same start on every device.
        drawn = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        if self.init == "gaussian":
            return drawn.normal_(0, 1 / self.rank, generator=generator)
        if self.init == "orthogonal":
            return nn.init.orthogonal_(drawn, generator=generator)
        bound = like.shape[1] ** -0.5
        return drawn.uniform_(-bound, bound, generator=generator)  # kaiming_uniform with a = sqrt 5


@dataclass(kw_only=True)
class LoRAConfig(DeltaConfig, LoRASettings):
    """LoRA: a trained low-rank change beside every target."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range, or a combination is impossible.
        """
        super().__post_init__()
        require(
            self.dropout == 0 or self.norm != "element",
            "model.adapter.dropout cannot go with model.adapter.norm: element, where change and base share a matmul: "
            "set dropout: 0, or norm: row",
        )

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> LoRALayer:
        """Wrap ``base``; see :meth:`AdapterConfig.build`."""
        require_size("rank", self.rank, name, base)
        layer = LoRALayer(base, self)
        layer.reset_parameters(generator)
        return layer


class LoRALayer(DeltaLayer):
    """A linear module with a change ``scale * B A``.

    Args:
        base: The frozen linear module.
        config: The settings.

    Attributes:
        lora_A: [r, in].
        lora_B: [out, r].
    """

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__(base, config)
        self.config = config
        self.scale = config.scale
        self.dropout = config.dropout
        self.lora_A = nn.Parameter(self.new_zeros(config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.new_zeros(self.out_features, config.rank))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A as ``init`` says, B zero."""
        self.lora_A.copy_(self.config.start(self.lora_A, generator))
        self.lora_B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(scale * B, A)."""
        return self.scale * self.lora_B, self.lora_A

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + scale * (dropout(x) A^T) B^T``."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        features = F.linear(dropped.to(y0.dtype), self.lora_A.to(y0.dtype))  # [..., r]
        left = self.scaled(self.lora_B, scale)
        return add_product(y0, features, left.to(y0.dtype), alpha=self.scale)
