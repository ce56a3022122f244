"""The diagonal empirical Fisher information of the adapters, with one backward per batch of sequences.

::

    F = 1/N sum_n (d log p(answer_n | prompt_n) / d theta)^2        theta: the adapters' anchors

The square is of each sequence's own gradient: squares of batch means would be smaller by about the batch size. One
backward of a batch gives every layer's input x_n and output gradient d_n, and those give the layer's gradient for each
sequence alone:

* a change ``x R^T L^T`` (every adapter of :mod:`secura_lightning.adapters.delta` under norm ``none`` or ``row``):
  g_L,n = d_n^T (x_n R^T) and g_R,n = (d_n L)^T x_n for all n in two batched products, then on to the trained tensors;
* SECURA's dense fused change (norm ``element`` with fusion ``base``): d_n^T x_n;
* everything else (norm ``element``, DoRA, full fine-tuning, SECURA's fusion ``base``, weights that layers share): the
  layer alone is run again on x_n, and its backward is fed with d_n.

All three are exact, and right padding adds nothing: its output gradients are zero in a causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secura_lightning.adapters import AdapterSet
from secura_lightning.adapters.base import AdapterLayer
from secura_lightning.adapters.delta import DeltaLayer
from secura_lightning.adapters.numerics import no_autocast
from secura_lightning.data.encode import Encoded, collate
from secura_lightning.errors import SecuraError
from secura_lightning.evaluation.batching import batches, evaluating, shard
from secura_lightning.modeling.loss import summed_cross_entropy
from secura_lightning.strategies.ranks import passes

Use = tuple[str, Tensor, Tensor]
"""One call of a layer: its name, input [n, t, ...] and output gradient [n, t, ...]."""


def empirical_fisher(
    model: Any,
    adapters: AdapterSet,
    rows: Sequence[Encoded],
    pad: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher information over ``rows``, without dropout. Gradients of parameters are left alone.

    When distributed, every rank works on its share of the rows and all get the mean over all (a collective call).

    Args:
        model: The model that the adapters are in; its mode and random state are left as they were.
        adapters: The adapters.
        rows: Encoded sequences; only their trained tokens count.
        pad: Token id that fills short rows.
        batch_size: Sequences of one backward.
        progress: Called with the number of sequences after each batch.

    Returns:
        ``"{module}.{anchor}"`` -> F in the anchor's shape and type.
    """
    squares = SquaredGradients(adapters)
    mine = shard(rows)
    with evaluating(model) as device, torch.enable_grad():
        parts = [[mine[i] for i in members] for members in batches([len(row.ids) for row in mine], batch_size)]
        for part, counts in passes(parts, list(rows[:1]), model):
            batch = {name: value.to(device) for name, value in collate(part, pad).items()}
            squares.add(partial(_loss, model, batch), len(part), counts)
            if progress and counts:
                progress(len(part))
    for total in squares.sums.values():
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        total /= len(rows)
    return squares.sums


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return summed_cross_entropy(output.logits, batch["labels"])


class SquaredGradients:
    """Sums of squared per-sequence gradients of the adapters' anchors.

    Args:
        adapters: The adapters, in their model.

    Attributes:
        sums: ``"{module}.{anchor}"`` -> sum over the sequences so far.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self.layers = adapters.layers
        self._model = adapters.model
        self.sums = {name: torch.zeros_like(value).detach() for name, value in adapters.anchors().items()}
        self._names = _canonical(self.layers)
        self._groups = _sharing(self.layers)

    def add(self, loss: Callable[[], Tensor], size: int, counts: bool = True) -> None:
        """Add the squared gradients of ``size`` sequences.

        Args:
            loss: Runs the model on the batch, sequences in the first dimension, and sums their losses.
            size: Number of sequences.
            counts: Add them; otherwise the model is passed, forward and backward, and nothing else.
        """
        calls = dict.fromkeys(map(id, self._groups), 0)
        waiting: dict[int, list[Use]] = {id(group): [] for group in self._groups}

        def receive(group: list[str], name: str, x: Tensor, gradient: Tensor) -> None:
            if not counts:
                return
            uses = waiting[id(group)]
            uses.append((name, x, gradient))
            if len(uses) == calls[id(group)]:  # at once, so that no more inputs are held than needed
                waiting[id(group)] = []
                self._square(uses, size)

        def tap(group: list[str], name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            calls[id(group)] += 1
            return cast(Tensor, _Tap.apply(output, token, partial(receive, group, name, args[0].detach())))

        places = [(group, name) for group in self._groups for name in group]
        device = next(iter(self.sums.values())).device
        token = torch.zeros((), device=device, requires_grad=True)
        hooks = [self.layers[name].register_forward_hook(partial(tap, group, name)) for group, name in places]
        try:
            with self._eager():
                total = loss()
        finally:
            for hook in hooks:
                hook.remove()
        torch.autograd.grad(total, token)
        for uses in filter(None, waiting.values()):  # some call did not reach the loss
            self._square(uses, size)

    def _eager(self) -> AbstractContextManager[Any]:
        """Compiled blocks do not call hooks that came later: they run as they were written."""
        # Asked first, because the compiler takes seconds to import.
        compiled = any(module._compiled_call_impl is not None for module in self._model.modules())
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    @torch.no_grad()
    def _square(self, uses: list[Use], size: int) -> None:
        """Add the squares of one group of layers that share tensors, usually one layer called once."""
        for name, x, _ in uses:
            if len(x) != size or x.dim() < 2:
                raise SecuraError(
                    f"EWC: {name} gets its tokens as {tuple(x.shape)}, not sequence by sequence (experts?): "
                    "leave it out with model.adapter.exclude"
                )
        if len(uses) == 1 and (batched := _batched_gradients(self.layers[uses[0][0]], *uses[0][1:])) is not None:
            for key, value in batched.items():
                self.sums[self._names[uses[0][0], key]] += value.square_().sum(0)
            return
        leaves = {name: _leaves(self.layers[name]) for name, _, _ in uses}
        for n in range(size):
            summed: dict[str, Tensor] = {}
            for name, x, gradient in uses:
                alone = _own_gradient(self.layers[name], leaves[name], x[n : n + 1], gradient[n : n + 1])
                for key, value in alone.items():
                    full = self._names[name, key]
                    summed[full] = summed[full] + value if full in summed else value
            for full, value in summed.items():
                self.sums[full].addcmul_(value, value)


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands the gradient to ``receive``.

    ``token`` is what the graph is differentiated by: it lies behind every tap and nowhere else, so that one backward
    passes all taps and computes no gradient of any parameter.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        ctx.save_for_backward(token)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.receive(gradient)
        return gradient, torch.zeros_like(ctx.saved_tensors[0]), None


def _leaves(layer: AdapterLayer) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value.detach().clone().requires_grad_() for name, value in layer.anchors().items()}


def _batched_gradients(layer: AdapterLayer, x: Tensor, gradient: Tensor) -> dict[str, Tensor] | None:
    """Gradients [n, ...] of all sequences at once, or None where the change is not a product of thin factors."""
    if not isinstance(layer, DeltaLayer) or layer.norm.granularity not in ("none", "row") or x.dim() != 3:
        return None
    leaves = _leaves(layer)
    if "fused_left" in leaves:  # not among the factors
        return None
    x, gradient = x.to(layer.work_dtype), gradient.to(layer.work_dtype)
    with no_autocast(x):
        with torch.enable_grad(), layer.at(leaves):
            left, right = layer.factors()
            left = layer.scaled(left, layer.row_scale())
        reached: list[tuple[Tensor, Tensor]] = []
        if left.requires_grad:
            reached.append((left, gradient.mT @ (x @ right.detach().t())))  # [n, out, k]
        if right.requires_grad:
            reached.append((right, (gradient @ left.detach()).mT @ x))  # [n, k, in]
        inner = {name: leaf for name, leaf in leaves.items() if name != "bias_change"}
        found = torch.autograd.grad(
            [factor for factor, _ in reached],
            list(inner.values()),
            [value for _, value in reached],
            is_grads_batched=True,
            allow_unused=True,
        )
    result = {name: value for name, value in zip(inner, found, strict=True) if value is not None}
    return result | ({"bias_change": gradient.sum(1)} if "bias_change" in leaves else {})


def _own_gradient(layer: AdapterLayer, leaves: dict[str, Tensor], x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Gradients of one sequence through the layer alone."""
    if "fused_dense" in leaves:
        rows, inputs = (value.flatten(0, -2).to(layer.work_dtype) for value in (gradient, x))
        found = {"fused_dense": rows.t() @ inputs}
        return found | ({"bias_change": rows.sum(0)} if "bias_change" in leaves else {})
    weight = getattr(layer.base, "weight", None)
    if x.is_floating_point() and weight is not None and weight.is_floating_point():
        x = x.to(weight.dtype)  # what autocast would have seen to
    with no_autocast(gradient), torch.enable_grad(), layer.at(leaves):
        output = layer.forward(x)  # past the hooks
        values = torch.autograd.grad(output, list(leaves.values()), gradient.to(output.dtype), allow_unused=True)
    return {name: value for name, value in zip(leaves, values, strict=True) if value is not None}


def _canonical(layers: dict[str, AdapterLayer]) -> dict[tuple[str, str], str]:
    """(layer, anchor) -> the name under which :meth:`AdapterSet.anchors` lists it: the first layer's that has it."""
    first: dict[int, str] = {}
    names: dict[tuple[str, str], str] = {}
    kept = []  # so that no id is used twice
    for name, layer in layers.items():
        for key, value in layer.anchors().items():
            kept.append(value)
            names[name, key] = first.setdefault(id(value), f"{name}.{key}")
    return names


def _sharing(layers: dict[str, AdapterLayer]) -> list[list[str]]:
    """Layers in groups that share trained tensors; most are alone."""
    groups: list[tuple[list[str], set[int]]] = []
    for name, layer in layers.items():
        members, tensors = [name], {id(value) for _, value in layer.adapter_tensors()}
        for other in [group for group in groups if group[1] & tensors]:
            groups.remove(other)
            members, tensors = other[0] + members, other[1] | tensors
        groups.append((members, tensors))
    return [members for members, _ in groups]
