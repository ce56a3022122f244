"""What every adapter is: a frozen module, a trained change beside it, and one interface over both.

Each adapter of this package computes ``W0 + norm(L R)`` (:mod:`secura_lightning.adapters.delta`) or trains a clone of
``W0`` (:mod:`secura_lightning.adapters.full`). ``W0`` is never written: it stays in ``layer.base``, so switching an
adapter off gives the base model back bit for bit. Only
:meth:`AdapterSet.merge_ <secura_lightning.adapters.inject.AdapterSet.merge_>` writes weights.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from secura_lightning.adapters.numerics import dense_weight, is_linear, linear_shape, stored_layout, work_dtype
from secura_lightning.errors import ConfigError

ALL_LINEAR = "all-linear"


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_size(key: str, size: int, name: str, base: nn.Module, limit: int | None = None) -> None:
    """Raise :class:`ConfigError` where ``size``, the setting ``key``, is above what the linear module ``base`` allows.

    Args:
        key: Name of the setting.
        size: Its value.
        name: Dotted path of the module.
        base: The linear module.
        limit: The largest size; None for the smaller dimension of its weight.
    """
    rows, columns = linear_shape(base)
    largest = min(rows, columns) if limit is None else limit
    require(
        size <= largest,
        f"model.adapter.{key} is {size}, but {name} is {rows} x {columns}: use at most {largest}, or leave the module "
        "out with model.adapter.exclude",
    )


class AdapterConfig(ABC):
    """Base of every adapter's settings: choose one with ``model.adapter.class_path``.

    A subclass is a keyword-only dataclass that derives from :class:`TargetedConfig`; the command line finds it by
    name.
    """

    targets: str | list[str]
    exclude: str | None
    keywords: ClassVar[tuple[str, ...]] = (ALL_LINEAR,)
    needs_calibration: ClassVar[bool] = False
    """Whether layers take their start from the second moments of their inputs (:meth:`AdapterLayer.calibrate`)."""
    accumulates: ClassVar[bool] = False
    """Whether they take another start at every task's end, from the second moments of the task's inputs too."""

    whole_weights: ClassVar[bool] = False
    """Whether layers train tensors as large as the base's, which a sharded run spreads over the processes too."""

    @abstractmethod
    def build(self, name: str, base: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """Wrap ``base``, which is found at ``name`` in the model.

        Args:
            name: Dotted path of the module, for messages and for settings that depend on it.
            base: The frozen module.
            generator: CPU generator of this module's own random numbers.

        Raises:
            ConfigError: The settings do not fit this module; the message names the key and the module.
        """

    def build_at(self, name: str, base: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """:meth:`build` with the settings that hold at ``name``: the same everywhere, unless a subclass has others."""
        return self.build(name, base, generator)

    def accepts(self, module: nn.Module) -> bool:
        """Whether this adapter can wrap ``module``."""
        return is_linear(module)

    def check_model(self, model: nn.Module, targets: dict[str, nn.Module]) -> None:  # noqa: B027
        """Refuse what only the whole model shows, before anything is changed. Nothing by default."""


@dataclass(kw_only=True)
class TargetedConfig(AdapterConfig):
    """Which modules an adapter wraps; the part of the settings that all adapters share."""

    targets: str | list[str] = ALL_LINEAR
    """Modules to adapt: names or dotted suffixes such as `q_proj` or `self_attn.q_proj`, or `all-linear`: every linear
    layer but the output head."""
    exclude: str | None = None
    """Regular expression: modules whose full name it matches somewhere are left alone."""

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            ConfigError: A value is out of range.
        """
        require(bool(self.targets), "model.adapter.targets is empty: name modules, or use all-linear")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ConfigError(
                f"model.adapter.exclude is not a regular expression ({error}): {self.exclude!r}; escape . * + ( ) [ ]"
            ) from None


@dataclass
class Fusion:
    """What one fusion, or one task's end, did to a layer."""

    reset: list[nn.Parameter] = field(default_factory=list)
    """Parameters that were set back, whose optimizer state must be forgotten."""
    logs: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to log."""


class AdapterLayer(nn.Module, ABC):
    """A frozen module and its trained change.

    The layer's own parameters and persistent buffers are exactly what a checkpoint needs. Whatever follows from
    ``W0`` and those is a non-persistent buffer that :meth:`refresh` brings up to date after a load. Attributes that
    the layer lacks are read from the base, so that model code may go on asking for ``in_features``, ``weight.dtype``
    or ``padding_idx``.

    Attributes:
        base: The frozen module.
        enabled: While false, the layer is the base module.
        calibrated: False while the layer still waits for :meth:`calibrate`.
    """

    lasting: ClassVar[tuple[str, ...]] = ()
    """Names of tensors of the state that neither a step nor a task's end changes: large ones are copied no more than
    they must."""
    enabled: bool
    calibrated: bool = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.enabled = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers ties weights by assigning `module.weight`, which must reach the module that owns the weight.
        if name in ("weight", "bias") and (value is None or isinstance(value, Tensor)):
            self._set_tied(name, value)
        else:
            super().__setattr__(name, value)

    def _set_tied(self, name: str, value: Tensor | None) -> None:
        setattr(self.base, name, value)

    @property
    def work_dtype(self) -> torch.dtype:
        """Type of the adapter's own tensors."""
        return work_dtype(self.base)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's forward with the change added, or without it while ``enabled`` is false."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The exact change of the dense weight, (out, in) in the working type: what merging adds. No gradient."""

    def delta_bias(self) -> Tensor | None:
        """The change of the bias, or None where the adapter has none. No gradient."""
        return None

    def delta_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`delta_weight` in blocks of rows, so that a merge needs no dense copy in the working type; in one
        block by default."""
        change = self.delta_weight()
        yield slice(0, len(change)), change

    @torch.no_grad()
    def merged_weight(self, onto: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight with the change, summed in the working type and rounded once, in the base's layout.

        Beside the result it needs what :meth:`delta_blocks` yields at a time, and a dense copy of a quantised base.

        Args:
            onto: [out, in] weight that the change is added to; None for the base's own.
            dtype: Type of the result; None for that of the base's weight.
        """
        reference = dense_weight(self.base) if onto is None else onto
        merged = torch.empty_like(reference, dtype=dtype or cast(Tensor, self.base.weight).dtype)
        for rows, change in self.delta_blocks():
            merged[rows] = reference[rows] + change  # the sum is taken in the wider type of the two
        return stored_layout(self.base, merged).contiguous()

    def merged_bias(self) -> Tensor | None:
        """The bias with its change, in the weight's type; None where there is neither."""
        bias, change = cast(Tensor | None, self.base.bias), self.delta_bias()
        if change is None:
            return None if bias is None else bias.detach().clone()
        total = change if bias is None else bias.detach().to(change.dtype) + change
        return total.to(cast(Tensor, self.base.weight).dtype)

    def end_task(self) -> Fusion:
        """Called once when a task ends."""
        return Fusion()

    def after_step(self, step: int) -> Fusion:
        """Called after optimizer step number ``step`` (the first is 1)."""
        return Fusion()

    def telemetry(self) -> dict[str, Tensor]:
        """Scalars that describe the change, on the layer's device: at least ``relative_change`` = ||dW|| / ||W0||."""
        with torch.no_grad():
            base = dense_weight(self.base).to(self.work_dtype)
            return {"relative_change": self.delta_weight().norm() / base.norm().clamp_min(torch.finfo(base.dtype).tiny)}

    def calibrate(self, gram: Tensor, others: Sequence[AdapterLayer] = ()) -> None:
        """Take the start from calibration text, before any training. Nothing by default.

        Args:
            gram: [in, in] sum of x x^T over the layer's inputs x, in fp64 on the layer's device.
            others: Further layers that read the same input, which take their starts too.
        """

    def fits(self, name: str, shape: torch.Size) -> bool:
        """Whether a saved tensor of this shape can become the state ``name``: a method's may grow task by task."""
        return bool(dict(self.adapter_tensors())[name].shape == shape)

    def resize(self, name: str, shape: torch.Size) -> None:
        """Make room for a saved tensor of another shape that :meth:`fits`. Nothing by default."""

    def share_clones(self, clones: dict[int, nn.Parameter]) -> None:
        """Take the trained clone of a weight that an earlier layer already cloned. Nothing by default.

        Args:
            clones: Trained clones by the id of the frozen parameter; the layer adds its own.
        """

    def merge_key(self) -> int:
        """Layers with equal keys merge into one shared weight."""
        return id(self)

    def refresh(self) -> None:
        """Recompute what follows from the loaded tensors. Nothing by default."""

    def anchors(self) -> dict[str, Tensor]:
        """Coordinates of the layer's function that a penalty may hold in place, with gradient to the trained tensors.

        No fusion moves them. They are the trained tensors themselves, unless a method fuses those. Where the
        configuration :attr:`accumulates <AdapterConfig.accumulates>`, they mean the same within one task alone.
        """
        return {name: value for name, value in self._parameters.items() if value is not None}

    @contextmanager
    def at(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Within the context the layer computes from these values of its anchors, with gradient to them."""
        own = {name: self._home(name)[name] for name in values}
        self._lend(values)
        try:
            yield
        finally:
            self._lend(own)

    def _home(self, name: str) -> dict[str, Any]:
        """Where the layer keeps a tensor: among its parameters or its buffers."""
        return cast("dict[str, Any]", self._parameters if name in self._parameters else self._buffers)

    def _lend(self, values: dict[str, Any]) -> None:
        """Put tensors in the places of the layer's own, without copying."""
        for name, value in values.items():
            self._home(name)[name] = value

    @abstractmethod
    def untouched(self) -> dict[str, Tensor]:
        """Values of the anchors at which the layer is its base; of many, those on the straight way from where it is."""

    @torch.no_grad()
    def set_anchors(self, values: dict[str, Tensor]) -> None:
        """Move the layer to these values of its anchors, in place."""
        for name, value in values.items():
            self._home(name)[name].copy_(value)
        self.refresh()

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a checkpoint needs: own parameters, then own persistent buffers."""
        yield from ((name, value) for name, value in self._parameters.items() if value is not None)
        for name, value in self._buffers.items():
            if value is not None and name not in self._non_persistent_buffers_set:
                yield name, value
