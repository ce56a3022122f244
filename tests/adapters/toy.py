"""A small model with everything adapters have to cope with, and every adapter that the package has."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secura_lightning.adapters as package
from secura_lightning.adapters import AdapterConfig, AdapterLayer, AdapterSet, inject
from secura_lightning.adapters.delta import DeltaConfig, DeltaLayer

WIDTH, OUTER, VOCABULARY = 64, 56, 40


class Conv1D(nn.Module):
    """Has the name, the layout and the attribute by which GPT-2's linear layer is known."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.1)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, x.shape[-1]) @ self.weight + self.bias).view(*x.shape[:-1], self.nf)


class ToyBlock(nn.Module):
    """Linear layers with and without bias, transposed, and two that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, OUTER)
        self.o_proj = nn.Linear(OUTER, WIDTH, bias=False)
        self.fc = Conv1D(WIDTH, WIDTH)
        self.twin_a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.twin_b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.twin_b.weight = self.twin_a.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.o_proj(torch.tanh(self.q_proj(h)))
        return x + self.twin_b(torch.tanh(self.twin_a(self.fc(x))))


class ToyModel(nn.Module):
    """Embedding, two blocks, and a head tied to the embedding. [b, t] token ids -> [b, t, vocabulary]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(ToyBlock() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight
        self.checkpointing: bool | None = None  # value of use_reentrant, or None for no checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.checkpointing:
            x.requires_grad_()  # reentrant checkpoints need an input with a gradient
        for layer in self.layers:
            x = layer(x) if self.checkpointing is None else checkpoint(layer, x, use_reentrant=self.checkpointing)
        return self.lm_head(x)


IDS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


def all_config_classes() -> list[type[AdapterConfig]]:
    """Every concrete adapter of the package, whether or not anything exports it."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted((c for c in _subclasses(AdapterConfig) if not inspect.isabstract(c)), key=lambda c: c.__name__)


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def variants() -> dict[str, AdapterConfig]:
    """Each adapter with its defaults, under each norm and with a trained bias where it has them."""
    found: dict[str, AdapterConfig] = {}
    for cls in all_config_classes():
        name = cls.__name__.removesuffix("Config")
        if not issubclass(cls, DeltaConfig):
            found[name] = cls()
            continue
        for norm in ("none", "row", "element"):
            found[f"{name}-{norm}"] = cls(norm=norm)
        found[f"{name}-row-detached-bias"] = cls(norm="row", detach_norm=True, bias=True)
        found[f"{name}-element-detached-bias"] = cls(norm="element", detach_norm=True, bias=True)
    return found


VARIANTS = variants()


def adapted(
    config: AdapterConfig, dtype: torch.dtype = torch.float32, moved: bool = True
) -> tuple[ToyModel, AdapterSet]:
    """A toy model with adapters; ``moved`` takes them away from their start, where norms bend."""
    model = ToyModel().to(dtype)
    adapters = inject(model, config, seed=1)
    if moved:
        move(adapters)
    return model, adapters


@torch.no_grad()
def move(adapters: AdapterSet, size: float = 0.3, seed: int = 3) -> None:
    """Add noise to every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((size * noise).to(parameter.dtype))


def train(model: nn.Module, adapters: AdapterSet, steps: int = 3, lr: float = 1e-2) -> None:
    """A few steps of AdamW on an arbitrary target."""
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS).flatten(0, 1).float(), IDS.flatten().flip(0)).backward()
        optimizer.step()


def numpy_weight(layer: AdapterLayer) -> np.ndarray:
    """The dense weight that a layer stands for, in numpy and fp64, after METHODS rather than after the package."""
    base = layer.base.weight.detach().double().numpy()
    base = base.T if isinstance(layer.base, Conv1D) else base
    if not isinstance(layer, DeltaLayer):
        return base + layer.delta_weight().double().numpy()
    left, right = (factor.detach().double().numpy() for factor in layer.factors())
    return base + numpy_norm(base, left @ right, layer.norm.granularity, layer.norm.s, layer.norm.eps)


def numpy_norm(base: np.ndarray, delta: np.ndarray, granularity: str, s: float = 6.0, eps: float = 1e-3) -> np.ndarray:
    """The change after S-MagNorm: ratio, sigmoid, divisor, division."""
    if granularity == "none":
        return delta
    if granularity == "row":
        ratio = np.linalg.norm(delta, axis=1, keepdims=True) / np.linalg.norm(base, axis=1, keepdims=True)
    else:
        ratio = np.abs(delta) / np.sqrt(base**2 + (eps**2) * np.mean(base**2))
    g = 2 / (1 + np.exp(-s * ratio)) - 1
    with np.errstate(invalid="ignore"):
        divisor = np.where(ratio == 0, 1.0, s * ratio / (2 * g))
    return delta / divisor


def dense_weight_with_gradient(layer: DeltaLayer) -> Tensor:
    """The same dense weight as plain autograd sees it, with M detached where the settings ask for it."""
    base = layer.base.weight.detach()
    base = base.t() if isinstance(layer.base, Conv1D) else base
    left, right = layer.factors()
    delta, s = left @ right, layer.norm.s
    if layer.norm.granularity == "none":
        return base + delta
    if layer.norm.granularity == "row":
        ratio = delta.norm(dim=1, keepdim=True) / base.norm(dim=1, keepdim=True)
    else:
        ratio = delta.abs() / (base.square() + (layer.norm.eps**2) * base.square().mean()).sqrt()
    divisor = s * ratio / (2 * (2 * torch.sigmoid(s * ratio) - 1))
    return base + delta / (divisor.detach() if layer.norm.detach else divisor)


def with_settings(config: AdapterConfig, **changes: object) -> AdapterConfig:
    """A copy of a configuration with some settings changed."""
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
