"""LoRA-Null (arXiv 2503.02659): low-rank factors that read only where calibration text leaves the input empty.

::

    G  = sum x x^T over calibration tokens     (in, in), un-centred
    P  = r eigenvectors of G of smallest eigenvalue                  (in, r)
    U S Z^T = SVD(W0 P),   A0 = S^1/2 Z^T P^T,   B0 = U S^1/2

    v1   W = W0 + B A - B0 A0      A and B trained
    v2   W = W0 + B A0             B trained from zero, A0 frozen

A0 x is almost zero for inputs like the calibration's, so v2 leaves the outputs on them alone however far B moves, while
v1 starts there and may leave. Equal to the authors' two SVDs up to signs; v2 is their (B - B0) A0 with B0 left out.
``basis: orthonormal`` takes A0 = P^T, B0 = W0 P instead: the same product and span, without the base's singular values
as step sizes. G is measured in fp64 and its eigenvectors are taken there: in fp16 a thousandth of X leaks through.

An injected layer starts at a random basis; :func:`secura_lightning.modeling.calibrate.calibrate` gives it the null one,
and a checkpoint holds A0 (and B0), so that it loads without calibrating again.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_lightning.adapters.base import AdapterLayer, require, require_size
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer
from secura_lightning.adapters.numerics import add_product, dense_weight
from secura_lightning.adapters.svd_init import StartedLayer

Version = Literal["v1", "v2"]
Basis = Literal["weight", "orthonormal"]


def null_bases(gram: Tensor, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The directions that the inputs fill least, for layers that read one input.

    Args:
        gram: [in, in] second moments of the input.
        ranks: Number of directions that each layer wants.

    Returns:
        For each P [in, rank] with orthonormal columns, in fp64; and the leakage ||X P|| / ||X||, a scalar.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp_min(0)
    whole = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return [(vectors[:, :rank], (values[:rank].sum() / whole).sqrt()) for rank in ranks]


def null_start(weight: Tensor, null: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] in fp64, with B0 A0 = W0 P P^T.

    Args:
        weight: [out, in] W0.
        null: [in, r] P.
        basis: ``weight`` or ``orthonormal``.
    """
    image = weight.double() @ null  # W0 P [out, r]
    if basis == "orthonormal":
        return null.t(), image
    u, s, zt = torch.linalg.svd(image, full_matrices=False)
    root = s.sqrt()
    return root.unsqueeze(-1) * (zt @ null.t()), u * root


@dataclass(kw_only=True)
class LoRANullConfig(DeltaConfig):
    """LoRA-Null: a low-rank change that reads the input only where calibration text (`model.calibration`) is silent."""

    needs_calibration: ClassVar[bool] = True
    may_differ: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = 16
    """Rank of the change: directions of least energy in the calibration text."""
    version: Version = "v2"
    """`v2` freezes A, so that the change stays in the null space; `v1` trains A too."""
    basis: Basis = "weight"
    """Start of A: `weight` (the paper's, scaled by the singular values of W0 in the null space) or `orthonormal`."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        require(self.rank >= 1, f"model.adapter.rank is {self.rank}: it must be at least 1")
        for key, choices in (("version", get_args(Version)), ("basis", get_args(Basis))):
            value = getattr(self, key)
            require(value in choices, f"model.adapter.{key} is {value!r}: choose one of {', '.join(choices)}")

    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> NullLayer:
        """Wrap ``base`` on a random basis; see :meth:`AdapterConfig.build`."""
        require_size("rank", self.rank, name, base)
        layer = self._layer(base)
        layer.reset_parameters(generator)
        return layer

    def _layer(self, base: nn.Module) -> NullLayer:
        return LoRANullV1(base, self) if self.version == "v1" else LoRANullV2(base, self)


class NullLayer(DeltaLayer):
    """What both versions share: how a start is taken, and what is known about it.

    Attributes:
        leakage: ||X P|| / ||X|| on the calibration text, a scalar; -1 before calibration.
    """

    leakage: Tensor
    config: LoRANullConfig

    def _init_null(self, config: LoRANullConfig) -> None:
        self.config = config
        self.register_buffer("leakage", self.base_norm.new_full((), -1.0))
        self.calibrated = False

    @abstractmethod
    def set_start(self, start_a: Tensor, start_b: Tensor) -> None:
        """Start from A0 [r, in] and B0 [out, r]."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """A random orthonormal basis, which protects nothing: a control, or what a checkpoint is loaded over."""
        shape = (self.in_features, self.config.rank)
        probe = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        self._start_at(torch.linalg.qr(probe).Q.to(self.base_norm.device))

    @torch.no_grad()
    def calibrate(self, gram: Tensor, others: Sequence[AdapterLayer] = ()) -> None:
        """Take the start from the second moments [in, in] of the input; one decomposition serves all who read it."""
        layers = [self]
        for other in others:
            assert isinstance(other, NullLayer)
            layers.append(other)
        bases = null_bases(gram, [layer.config.rank for layer in layers])
        for layer, (null, leakage) in zip(layers, bases, strict=True):
            layer._start_at(null)
            layer.leakage.copy_(leakage)
            layer.calibrated = True

    def _start_at(self, null: Tensor) -> None:
        self.set_start(*null_start(dense_weight(self.base), null, self.config.basis))

    def refresh(self) -> None:
        """Learn from the loaded state whether the start was calibrated."""
        super().refresh()
        self.calibrated = bool(self.leakage >= 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.enabled and self.training and not self.calibrated:
            warnings.warn(
                "LoRA-Null trains on a random basis, which protects nothing: call "
                "secura_lightning.modeling.calibrate.calibrate(adapters, ...) after inject",
                stacklevel=2,
            )
        return super().forward(x, *args, **kwargs)

    def telemetry(self) -> dict[str, Tensor]:
        """What every change tells, and ``null_leakage``."""
        return {**super().telemetry(), "null_leakage": self.leakage}


class LoRANullV1(NullLayer, StartedLayer):
    """A linear module with a change ``B A - B0 A0``, A and B trained.

    Args:
        base: The frozen linear module.
        config: The settings.
    """

    def __init__(self, base: nn.Module, config: LoRANullConfig) -> None:
        StartedLayer.__init__(self, base, config, config.rank, scale=1.0)
        self._init_null(config)

    def set_start(self, start_a: Tensor, start_b: Tensor) -> None:
        """Start from A0 [r, in] and B0 [out, r]."""
        StartedLayer.set_start(self, start_a, start_b)


class LoRANullV2(NullLayer):
    """A linear module with a change ``B A0``, B alone trained.

    Args:
        base: The frozen linear module.
        config: The settings.

    Attributes:
        lora_A: [r, in] A0, frozen.
        lora_B: [out, r], zero at the start.
    """

    lora_A: Tensor

    def __init__(self, base: nn.Module, config: LoRANullConfig) -> None:
        super().__init__(base, config)
        self._init_null(config)
        self.register_buffer("lora_A", self.new_zeros(config.rank, self.in_features))
        self.lora_B = nn.Parameter(self.new_zeros(self.out_features, config.rank))

    @torch.no_grad()
    def set_start(self, start_a: Tensor, start_b: Tensor) -> None:
        """Take A0 [r, in]; B0 is left out, because A never moves."""
        self.lora_A.copy_(start_a)
        self.lora_B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A0)."""
        return self.lora_B, self.lora_A

    def add_change(self, x: Tensor, y0: Tensor, scale: Tensor | None) -> Tensor:
        """``y0 + (x A0^T) B^T``."""
        features = F.linear(x.to(y0.dtype), self.lora_A.to(y0.dtype))  # [..., r]
        left = self.scaled(self.lora_B, scale)
        return add_product(y0, features, left.to(y0.dtype))
