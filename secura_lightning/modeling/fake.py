"""A model without memory, and its adapters: fake tensors, which have shapes and types alone.

Adapters are shaped after small real ones: an adapter is built on a matrix whose sides are two primes, and each side of
its tensors that is one of the primes stands for that side. All of it is called within a ``FakeTensorMode``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secura_lightning.adapters import AdapterConfig, AdapterLayer
from secura_lightning.adapters.numerics import is_conv1d, is_linear, linear_shape, module_generator
from secura_lightning.adapters.targets import match_targets
from secura_lightning.modeling.load import BaseSpec, load_config

# Sides of the small matrices. Primes that no setting is likely to have; the large ones for large ranks.
_SIDES = ((499, 503), (1999, 2003))
_SMALL = 1 << 18  # weights up to this size are built as they are


def fake_model(spec: BaseSpec) -> PreTrainedModel:
    """The model without memory; call it, and use it, within a ``FakeTensorMode``."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "dtype": getattr(torch, spec.dtype)}
    if spec.quantization != "none":  # packed weights are multiplied in their compute type
        options["dtype"] = getattr(torch, spec.compute_dtype)
    if spec.attn_implementation is not None and "flash" not in spec.attn_implementation:
        options["attn_implementation"] = spec.attn_implementation  # SDPA keeps what FlashAttention keeps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(load_config(spec), **options)
    model.tie_weights()
    model.config.use_cache = False
    return cast(PreTrainedModel, model.train())


def fake_adapters(model: nn.Module, config: AdapterConfig) -> dict[str, AdapterLayer]:
    """What :func:`~secura_lightning.adapters.inject` would put into a fake model, with tensors as fake as its own."""
    targets = match_targets(model, config)
    config.check_model(model, targets)
    made: dict[tuple[Any, ...], AdapterLayer] = {}
    layers: dict[str, AdapterLayer] = {}
    clones: dict[int, nn.Parameter] = {}
    for name, base in targets.items():
        if is_linear(base):
            differences: Callable[[str], Any] = getattr(config, "differences", lambda _: {})
            differs = differences(name)
            key = (type(base), linear_shape(base), base.bias is None, repr(differs))
            if key not in made:
                made[key] = _shaped(name, base, config)
            layer = _another(made[key])
            layer._modules["base"] = base
        else:
            layer = config.build_at(name, base, module_generator(0, name))
        layer.share_clones(clones)
        layers[name] = layer
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _shaped(name: str, base: nn.Module, config: AdapterConfig) -> AdapterLayer:
    """An adapter of ``base``'s shape without memory, and without ``base``."""
    rows, columns = linear_shape(base)
    sizes = [v for v in vars(config).values() if isinstance(v, int)]
    sides = (rows, columns)
    if rows * columns > _SMALL:
        sides = next((s for s in _SIDES if not sizes or max(sizes) < s[0] // 2), (rows, columns))
    with real_tensors():
        generator = torch.Generator().manual_seed(0)
        small = type(base)(sides[0], sides[1]) if is_conv1d(base) else nn.Linear(sides[1], sides[0])
        with torch.no_grad():
            cast(Tensor, small.weight).normal_(generator=generator)
        if base.bias is None:
            small.bias = None
        small.to(cast(Tensor, base.weight).dtype)
        layer = config.build_at(name, small, module_generator(0, name))
    layer._modules["base"] = nn.Identity()
    stands_for = {sides[0]: rows, sides[1]: columns}
    if sides == (rows, columns):
        stands_for = {}
    for module in layer.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for own in tables:
            for key, value in own.items():
                if value is not None:
                    size = [stands_for.get(n, n) for n in value.shape]
                    fake = torch.empty(size, dtype=value.dtype)
                    own[key] = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
    for key in ("out_features", "in_features"):
        if key in layer.__dict__:
            layer.__dict__[key] = stands_for.get(layer.__dict__[key], layer.__dict__[key])
    return layer


def _another(layer: AdapterLayer) -> AdapterLayer:
    """A layer like ``layer`` with tensors of its own; deepcopy would look for their memory."""
    twin = copy.copy(layer)
    twin.__dict__ = dict(layer.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[kind] = {key: _fresh(value) for key, value in layer.__dict__[kind].items()}
    return twin


def _fresh(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty(value.shape, dtype=value.dtype), value.requires_grad)
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


@contextmanager
def real_tensors() -> Iterator[None]:
    """Within the context tensors have memory, whatever mode is around it."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def own_tensors(tensors: Iterable[Tensor], base: nn.Module) -> list[Any]:
    """The tensors of an adapter that are not its base's."""
    theirs = {id(t) for t in (*base.parameters(), *base.buffers())}
    return [t for t in tensors if id(t) not in theirs]
