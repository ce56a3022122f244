"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732).

``W = W0 + (alpha / r) B A`` with A (r, in) uniform as in ``nn.Linear`` and B (out, r) zero; rsLoRA scales by
``alpha / sqrt(r)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import require, require_size
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.numerics import add_product


@dataclass(kw_only=True)
class LoRAConfig(DeltaConfig):
    """LoRA: a trained low-rank change beside every target."""

    rank: int = 8
    """Rank of the change."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    dropout: float = 0.0
    """Dropout on the input of the change, in training."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range, or a combination is impossible.
        """
        super().__post_init__()
        require(self.rank >= 1, f"model.adapter.rank is {self.rank}: it must be at least 1")
        require(self.alpha > 0, f"model.adapter.alpha is {self.alpha}: it must be above 0")
        require(0 <= self.dropout < 1, f"model.adapter.dropout is {self.dropout}: it must be at least 0 and below 1")
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
        self.scale = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
        self.dropout = config.dropout
        self.lora_A = nn.Parameter(self.new_zeros(config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.new_zeros(self.out_features, config.rank))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(in) (``kaiming_uniform`` with a = sqrt 5), B zero."""
        bound = self.in_features**-0.5
        # Drawn on the CPU, so that a seed gives the same start on every device.
        start = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype, device="cpu")
        self.lora_A.copy_(start.uniform_(-bound, bound, generator=generator))
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
