"""Base + change as one model of full precision, layer by layer.

::

    full-precision run   W = W0 + dW                     written into the live model
    4-bit or 8-bit run   W = W_base + dW   (``base``)    into the original weights, loaded beside the live model
                         W = deq(W_q) + dW (``dequantized``)   into the values that the run computed with

Sums are taken in fp32 and rounded once to the storage type. dW is the change as it was trained: with norms or factors
that depend on the weight, it was measured against the quantised one. Beside the models, memory holds the new weight of
one layer, a dequantised copy of it where the base is quantised, and a small block of rows
(:meth:`~secura_lightning.adapters.base.AdapterLayer.merged_weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secura_lightning.adapters import AdapterLayer, AdapterSet
from secura_lightning.adapters.inject import tied_modules, untied
from secura_lightning.adapters.numerics import dense_weight, is_quantized, stored_layout
from secura_lightning.errors import SecuraError
from secura_lightning.modeling.load import BaseSpec, load_model

Onto = Literal["base", "dequantized"]
Progress = Callable[[int], object]


def check_biases(adapters: AdapterSet) -> None:
    """Refuse trained biases of modules that have none: a plain model has no place for them and drops them on loading.

    Raises:
        SecuraError: There are such biases.
    """
    homeless = [
        name
        for name, layer in adapters.layers.items()
        if getattr(layer.base, "bias", None) is None
        and (change := layer.delta_bias()) is not None
        and bool(change.any())
    ]
    if homeless:
        raise SecuraError(
            f"bias: true trained biases on {len(homeless)} modules that have none (first: {homeless[0]}), and a plain "
            "model has no place for them: use `secura export`, or train with model.adapter.bias: false"
        )


def merge_live(model: PreTrainedModel, adapters: AdapterSet, progress: Progress | None = None) -> PreTrainedModel:
    """Merge into the live model of full precision; the adapters are gone afterwards."""
    if adapters.merge_(progress):
        _separate(model)
    return model


def full_precision_base(spec: BaseSpec, live: PreTrainedModel, onto: Onto) -> PreTrainedModel:
    """The model that a quantised run merges into, still without the change.

    Args:
        spec: The run's base.
        live: The quantised model, with its adapters.
        onto: ``base``: the original weights; ``dequantized``: the values that ``live`` multiplies by.

    Raises:
        SecuraError: The base is stored quantised, so that there are no original weights, or has other modules.
    """
    target = load_model(replace(spec, quantization="none")).eval()
    if any(is_quantized(module) for module in target.modules()):
        raise SecuraError(
            f"model.base={spec.base} is stored quantised, so there are no weights of full precision to merge into; "
            "give the run an unquantised base with model.quantization"
        )
    if onto == "dequantized":
        modules = dict(target.named_modules())
        for name, module in _quantized(live):
            weight = cast(Tensor, modules[name].weight)
            weight.data.copy_(stored_layout(modules[name], dense_weight(module)))
    return target


@torch.no_grad()
def merge_quantized(
    target: PreTrainedModel, adapters: AdapterSet, onto: Onto, progress: Progress | None = None
) -> PreTrainedModel:
    """Add the changes of a quantised run to ``target``, the result of :func:`full_precision_base`.

    Args:
        target: The model that is written to.
        adapters: The quantised run's adapters; they stay as they are.
        onto: What the changes are added to.
        progress: Called with 1 after each module.
    """
    groups = tied_modules(target)
    modules = dict(target.named_modules())
    for name, layer in adapters.layers.items():
        module = modules[name]
        # Not from the target under `dequantized`: its copy is rounded to the storage type already.
        reference = dense_weight(module if onto == "base" else layer.base)
        weight = layer.merged_weight(reference, cast(Tensor, module.weight).dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)
        bias = layer.merged_bias()
        if bias is not None:
            module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        if progress is not None:
            progress(1)
    if untied(groups):
        _separate(target)
    return target


def _quantized(live: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The quantised modules by the names that they have without adapters."""
    found = []
    for name, module in live.named_modules():
        if isinstance(module, AdapterLayer):
            if is_quantized(module.base):
                found.append((name, module.base))
        elif is_quantized(module) and not name.endswith(".base"):
            found.append((name, module))
    return found


def _separate(model: PreTrainedModel) -> None:
    """Tell transformers that weights which it ties by default differ now, or it would tie them again on loading."""
    model.config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}
