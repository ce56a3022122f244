"""Quadratic penalties on the way from an anchor: what EWC and L2-SP share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from secura_lightning.adapters import AdapterSet
from secura_lightning.strategies.base import Strategy


class AnchoredPenalty(Strategy):
    """``(strength / 2) sum_i w_i (theta_i - theta*_i)^2`` on the adapters' anchors, added as a gradient.

    Anchors (:meth:`AdapterLayer.anchors <secura_lightning.adapters.base.AdapterLayer.anchors>`) are the trained tensors
    themselves, or what a fusion does not move.

    Args:
        strength: Factor on the penalty.

    Attributes:
        weights: w by anchor name; empty while nothing is held.
        anchor: theta* by anchor name.
    """

    needs_anchors = True
    needs_tensors = True

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.weights: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What is held, and how firmly."""
        return {"weights": dict(self.weights), "anchor": dict(self.anchor)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold what a checkpoint held."""
        self.weights = dict(state_dict["weights"])
        self.anchor = dict(state_dict["anchor"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring restored tensors to the adapters' device."""
        now = pl_module.adapters.anchors()  # type: ignore[union-attr, operator]
        for tensors in (self.weights, self.anchor):
            for name, value in tensors.items():
                tensors[name] = value.to(now[name].device)

    @torch.no_grad()
    def hold(self, adapters: AdapterSet, weights: dict[str, Tensor]) -> None:
        """Hold the adapters where they are now."""
        self.weights = weights
        self.anchor = {name: value.detach().clone() for name, value in adapters.anchors().items()}

    def penalty(self, adapters: AdapterSet) -> Tensor:
        """The penalty, a scalar with gradient: the plain form of what :meth:`add_gradient` adds."""
        now = adapters.anchors()
        terms = [(self.weights[name] * (now[name] - kept).square()).sum() for name, kept in self.anchor.items()]
        return self.strength / 2 * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def add_gradient(self, trainer: Trainer, pl_module: LightningModule, tag: str) -> None:
        """Add the penalty's gradient to the parameters' gradients; log ``{tag}/penalty`` and ``{tag}/share`` at the
        trainer's logging interval.

        The share is ||penalty's gradient|| / (||penalty's gradient|| + ||the other gradient||).
        """
        adapters: AdapterSet = pl_module.adapters  # type: ignore[assignment]
        if not self.anchor or all(p.grad is None for p in adapters.trainable_parameters()):  # no step is taken
            return
        now = adapters.anchors()
        names = list(now)
        with torch.no_grad():
            moved = torch._foreach_sub([now[name] for name in names], [self.anchor[name] for name in names])
            pulls = torch._foreach_mul(moved, [self.weights[name] for name in names])
            torch._foreach_mul_(pulls, self.strength)
        parameters, gradients = _to_parameters(adapters, [now[name] for name in names], list(pulls))
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and (trainer.global_step + 1) % interval == 0:
            self._log(pl_module, tag, list(moved), list(pulls), parameters, gradients)
        _add(parameters, gradients)

    @torch.no_grad()
    def _log(
        self,
        pl_module: LightningModule,
        tag: str,
        moved: list[Tensor],
        pulls: list[Tensor],
        parameters: list[nn.Parameter],
        gradients: list[Tensor],
    ) -> None:
        value = torch.stack([(m * p).sum().float() for m, p in zip(moved, pulls, strict=True)]).sum() / 2
        own = _norm(gradients)
        other = _norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        share = own / (own + other).clamp_min(torch.finfo(own.dtype).tiny)
        pl_module.log_dict({f"{tag}/penalty": value, f"{tag}/share": share}, batch_size=1)


def _to_parameters(
    adapters: AdapterSet, anchors: list[Tensor], pulls: list[Tensor]
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Trained tensors and their gradients, given the gradients of the anchors."""
    parameters = [anchor for anchor in anchors if isinstance(anchor, nn.Parameter)]
    gradients = [pull for anchor, pull in zip(anchors, pulls, strict=True) if isinstance(anchor, nn.Parameter)]
    computed = [(a, pull) for a, pull in zip(anchors, pulls, strict=True) if a.grad_fn is not None]
    if computed:
        direct = {id(parameter) for parameter in parameters}
        behind = [parameter for parameter in adapters.trainable_parameters() if id(parameter) not in direct]
        # grad and not backward: nothing that waits for .grad, as DDP does, hears of this.
        found = torch.autograd.grad(
            [anchor for anchor, _ in computed], behind, [pull for _, pull in computed], allow_unused=True
        )
        reached = [(p, gradient) for p, gradient in zip(behind, found, strict=True) if gradient is not None]
        parameters += [parameter for parameter, _ in reached]
        gradients += [gradient for _, gradient in reached]
    return parameters, gradients


def _add(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Add to ``.grad``, which may be missing."""
    pairs = list(zip(parameters, gradients, strict=True))
    for parameter, gradient in pairs:
        if parameter.grad is None:
            parameter.grad = gradient
    rest = [(p.grad, gradient) for p, gradient in pairs if p.grad is not None and p.grad is not gradient]
    if rest:
        torch._foreach_add_([old for old, _ in rest], [new for _, new in rest])


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors) if tensors else [torch.zeros(())]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]))
