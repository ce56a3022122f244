"""A second set of adapter tensors that the model can compute with: a slow average, or an earlier state.

It holds the adapters' anchors (:meth:`AdapterLayer.anchors <secura_lightning.adapters.base.AdapterLayer.anchors>`), a
few MB whatever the base and its quantisation, and lends them to the model without copying.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from secura_lightning.adapters import AdapterSet
from secura_lightning.adapters.base import AdapterLayer


class Memory:
    """Values of the anchors of a model's adapters.

    Args:
        adapters: The adapters.
        values: Their anchors' values by name; None for where they are now.
    """

    def __init__(self, adapters: AdapterSet, values: dict[str, Tensor] | None = None) -> None:
        self.adapters = adapters
        now = adapters.anchors()
        source = now if values is None else values
        self.values = {name: source[name].detach().to(now[name].device, copy=True) for name in now}
        self._names = _names(adapters)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """``values <- decay * values + (1 - decay) * now``."""
        now = self.adapters.anchors()
        torch._foreach_lerp_([self.values[name] for name in now], list(now.values()), 1 - decay)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """||now - values|| / ||now||, a scalar; 0 where both are zero."""
        now = [value.detach() for value in self.adapters.anchors().values()]
        moved = _norm(torch._foreach_sub(now, [self.values[name] for name in self.adapters.anchors()]))
        return moved / _norm(now).clamp_min(torch.finfo(moved.dtype).tiny)

    def write(self) -> None:
        """Move the adapters themselves to these values, in place."""
        for name, layer in self.adapters.layers.items():
            layer.set_anchors({key: self.values[place] for key, place in self._names[name].items()})

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context the model computes with these values."""
        with ExitStack() as stack:
            for name, layer in self.adapters.layers.items():
                stack.enter_context(layer.at({key: self.values[place] for key, place in self._names[name].items()}))
            yield


@contextmanager
def as_if_ended(adapters: AdapterSet) -> Iterator[None]:
    """Within the context the adapters are what they would be if the task ended now; then they are as they were.

    What ends a task may move outputs: SECURA's restraint shrinks rows as it fuses, a bounded ``frozen_rank`` truncates.
    """
    if all(type(layer).end_task is AdapterLayer.end_task for layer in adapters.layers.values()):
        yield
        return
    before = adapters.snapshot()
    adapters.end_task()
    try:
        yield
    finally:
        adapters.restore(before)


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Within the context the model answers without dropout and without gradients; its mode is put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _names(adapters: AdapterSet) -> dict[str, dict[str, str]]:
    """The set's name of every anchor of every layer; layers that share a tensor share the name of the first."""
    first: dict[int, str] = {}
    found: dict[str, dict[str, str]] = {}
    for name, layer in adapters.layers.items():
        # A computed anchor is a tensor of this moment, whose id may be used again: only parameters can be shared.
        anchors = layer.anchors()
        found[name] = {
            key: first.setdefault(id(value), f"{name}.{key}") if isinstance(value, nn.Parameter) else f"{name}.{key}"
            for key, value in anchors.items()
        }
    return found


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    norms = torch._foreach_norm(list(tensors))
    return torch.linalg.vector_norm(torch.stack([cast(Tensor, norm).to(norms[0].device) for norm in norms]))
