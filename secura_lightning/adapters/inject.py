"""Put adapters into a model, and handle all of them as one set.

>>> adapters = inject(model, LoRAConfig(targets=["q_proj", "v_proj"]), seed=0)
>>> print(adapters.report())
>>> with adapters.disabled():
...     base_output = model(**batch)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from secura_lightning.adapters.base import AdapterConfig, AdapterLayer, Fusion
from secura_lightning.adapters.describe import summarize_adapter
from secura_lightning.adapters.numerics import is_quantized, module_generator, spread_like
from secura_lightning.adapters.targets import match_targets
from secura_lightning.errors import SecuraError


def inject(model: nn.Module, config: AdapterConfig, seed: int = 0) -> AdapterSet:
    """Freeze ``model`` and wrap the modules that ``config`` names, in place.

    Args:
        model: Any module whose linear layers are found by name.
        config: Which adapter, and where.
        seed: Each module's random start depends on this and on the module's name only.

    Returns:
        The adapters, by module name.

    Raises:
        ConfigError: No module matches, or the settings do not fit one.
        SecuraError: The model already has adapters.
    """
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise SecuraError("the model already has adapters: merge or remove them before injecting others")
    targets = match_targets(model, config)
    config.check_model(model, targets)
    layers = {name: config.build_at(name, base, module_generator(seed, name)) for name, base in targets.items()}
    clones: dict[int, nn.Parameter] = {}
    for layer in layers.values():
        layer.share_clones(clones)
    model.requires_grad_(False)
    _replace(model, {id(layer.base): layer for layer in layers.values()})
    return AdapterSet(model, config, layers)


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put ``replacements[id(child)]`` in the place of every such child, under each of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


class AdapterSet:
    """All adapters of one model.

    Args:
        model: The model that holds them.
        config: What they were built from.
        layers: The adapters by the name of the module that each wraps.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, layers: dict[str, AdapterLayer]) -> None:
        self.model = model
        self.config = config
        self.layers = layers

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(``"{module}.{tensor}"``, parameter) of every trained tensor once."""
        seen: set[int] = set()
        for name, layer in self.layers.items():
            for tensor, parameter in _own_parameters(layer):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{name}.{tensor}", parameter

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every trained tensor once."""
        return [parameter for _, parameter in self.named_parameters()]

    def anchors(self) -> dict[str, Tensor]:
        """``"{module}.{anchor}"`` -> coordinate, with gradient; see :meth:`AdapterLayer.anchors`. A tied one once."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, layer in self.layers.items():
            for key, value in layer.anchors().items():
                if id(value) not in seen:
                    seen.add(id(value))
                    found[f"{name}.{key}"] = value
        return found

    def report(self) -> str:
        """A short table of what matched: suffix, number of modules, shapes, trained parameters and their share."""
        groups: dict[str, list[AdapterLayer]] = defaultdict(list)
        for name, layer in self.layers.items():
            groups[name.split(".")[-1]].append(layer)
        trained = sum(p.numel() for p in self.trainable_parameters())
        total = trained + sum(_logical_size(p) for p in _base_parameters(self.model, self.layers.values()))
        width = max(6, *map(len, groups))
        lines = [f"{'module':<{width}}  count  {'shape':<24}  trained"]
        for suffix, layers in groups.items():
            shapes = list(dict.fromkeys(_shape(layer) for layer in layers))
            shown = ", ".join(shapes[:2]) + (", ..." if len(shapes) > 2 else "")
            count = sum(p.numel() for p in {id(p): p for layer in layers for _, p in _own_parameters(layer)}.values())
            lines.append(f"{suffix:<{width}}  {len(layers):>5}  {shown:<24}  {count:,}")
        share = f"{trained:,} of {total:,} parameters ({trained / total:.2%})"
        lines.append(f"{summarize_adapter(self.config)} on {len(self.layers)} modules trains {share}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Tensor]:
        """Adapter tensors only: ``"{module}.{tensor}"`` -> a detached view. A tied clone appears once."""
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, layer in self.layers.items():
            for tensor, value in layer.adapter_tensors():
                if id(value) not in seen:
                    seen.add(id(value))
                    state[f"{name}.{tensor}"] = value.detach()
        return state

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of what training and a task's end change, to :meth:`restore` within the same task."""
        kept = {f"{name}.{tensor}" for name, layer in self.layers.items() for tensor in layer.lasting}
        return {name: value.clone() for name, value in self.state_dict().items() if name not in kept}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to a :meth:`snapshot`.

        Raises:
            SecuraError: It is none of these adapters.
        """
        self.load_state_dict({**self.state_dict(), **snapshot})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the adapters, in place. Nothing is changed unless everything fits.

        Raises:
            SecuraError: The tensors' names or shapes are not those of these adapters.
        """
        own = self.state_dict()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise SecuraError(
                f"the tensors are not those of this {type(self.config).__name__}: {len(missing)} missing"
                f"{_first(missing)}, {len(extra)} unknown{_first(extra)}; they were written by another adapter, "
                "or for other targets"
            )
        for key, value in own.items():
            layer, tensor = self._owner(key)
            if not layer.fits(tensor, state[key].shape):
                raise SecuraError(
                    f"{key} has shape {tuple(state[key].shape)}, this model needs {tuple(value.shape)}: "
                    "the adapter was trained with other settings or on another base"
                )
        self.resize({key: value.shape for key, value in state.items()})
        for key, value in self.state_dict().items():
            source = spread_like(state[key], value)
            if source is not state[key] or source.data_ptr() != value.data_ptr():  # a sharded tensor's address is 0
                value.copy_(source)
        for layer in self.layers.values():
            layer.refresh()

    def resize(self, shapes: dict[str, torch.Size]) -> None:
        """Give the state these shapes, by its keys; the contents of what changes its shape are lost."""
        for key, value in self.state_dict().items():
            if value.shape != shapes[key]:
                layer, tensor = self._owner(key)
                layer.resize(tensor, shapes[key])

    def _owner(self, key: str) -> tuple[AdapterLayer, str]:
        """The layer, and its name there, of a tensor of :meth:`state_dict`."""
        name, _, tensor = key.rpartition(".")
        return self.layers[name], tensor

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model is the untouched base."""
        before = {name: layer.enabled for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.enabled = before[name]

    def end_task(self) -> Fusion:
        """Tell every adapter that a task ended; the logs are means over the modules."""
        return _combine(self.layers.values(), lambda layer: layer.end_task())

    def after_step(self, step: int) -> Fusion:
        """Tell every adapter that optimizer step ``step`` (the first is 1) was taken."""
        return _combine(self.layers.values(), lambda layer: layer.after_step(step))

    def delta_norms(self) -> dict[str, Tensor]:
        """||dW|| / ||W0|| by module, without host sync."""
        return {name: layer.telemetry()["relative_change"] for name, layer in self.layers.items()}

    def telemetry(self) -> dict[str, Tensor]:
        """Mean over the modules of what each layer tells about itself, without host sync."""
        return _means([layer.telemetry() for layer in self.layers.values()])

    def remove_(self) -> nn.Module:
        """Put the plain modules back, without the changes. The set is empty afterwards.

        Returns:
            The model, computing what it did before :func:`inject`.
        """
        _replace(self.model, {id(layer): layer.base for layer in self.layers.values()})
        self.layers = {}
        return self.model

    @torch.no_grad()
    def merge_(self, progress: Callable[[int], object] | None = None) -> list[str]:
        """Write every change into its module's weight and put plain modules back. The set is empty afterwards.

        Sums are taken in fp32 and rounded once to the weight's type, layer by layer: beside the model, memory holds the
        new weight of one layer and a small block of rows, and each adapter is let go as soon as it is merged.

        Args:
            progress: Called with 1 after each module.

        Returns:
            Names of modules whose weight was tied to another one and no longer is, because only one of them changed.

        Raises:
            SecuraError: A weight is quantised; nothing was written.
        """
        for name, layer in self.layers.items():
            if is_quantized(layer.base):
                raise SecuraError(
                    f"{name} is quantised, and packing the merged weight again would round most of the change away: "
                    "load the base with model.quantization: none and merge there, or run `secura merge --onto base` "
                    "(or `dequantized`), which writes a model of full precision"
                )
        tied = tied_modules(self.model)
        places = _places(self.model)
        merged: dict[int, nn.Parameter] = {}
        bases = {name: layer.base for name, layer in self.layers.items()}
        for name in list(self.layers):
            layer = self.layers[name]
            _write(layer, merged)
            for parent, child in places[id(layer)]:
                setattr(parent, child, layer.base)
            del self.layers[name]
            if progress is not None:
                progress(1)
        broken = untied(tied)
        return [name for name, base in bases.items() if id(base) in broken]


def merge(adapters: AdapterSet) -> nn.Module:
    """Write every change into the model's weights; see :meth:`AdapterSet.merge_`.

    Returns:
        The model, with its plain modules back in place and the adapted function.
    """
    adapters.merge_()
    return adapters.model


def _own_parameters(layer: AdapterLayer) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in layer.adapter_tensors() if isinstance(value, nn.Parameter)]


def _base_parameters(model: nn.Module, layers: Iterable[AdapterLayer]) -> list[nn.Parameter]:
    own = {id(p) for layer in layers for _, p in _own_parameters(layer)}
    return [p for p in model.parameters() if id(p) not in own]


def _logical_size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into one byte
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _shape(layer: AdapterLayer) -> str:
    size = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    shape = size if None not in size else tuple(cast(Tensor, layer.base.weight).shape)
    return " x ".join(map(str, shape))


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""


def _means(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: torch.stack([record[key] for record in records if key in record]).mean() for key in keys}


def _combine(layers: Iterable[AdapterLayer], act: Callable[[AdapterLayer], Fusion]) -> Fusion:
    done = [act(layer) for layer in layers]
    return Fusion(reset=[p for fusion in done for p in fusion.reset], logs=_means([fusion.logs for fusion in done]))


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """(parent, name) of every adapter in ``model``, by id."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, AdapterLayer):
                found[id(child)].append((parent, name))
    return found


def tied_modules(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of modules that share one weight."""
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(module)
    return [group for group in owners.values() if len(group) > 1]


def untied(groups: list[list[nn.Module]]) -> set[int]:
    """Ids of the modules of such groups that share one weight no longer."""
    return {id(m) for group in groups if len({id(m.weight) for m in group}) > 1 for m in group}


def _write(layer: AdapterLayer, merged: dict[int, nn.Parameter]) -> None:
    """Give the layer's base its merged weight and bias as new parameters, because others may share the old ones."""
    base = layer.base
    if base._parameters.get("weight") is not None:
        key = layer.merge_key()
        if key not in merged:
            merged[key] = nn.Parameter(layer.merged_weight(), requires_grad=False)
        base.weight = merged[key]
    bias = layer.merged_bias()
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
