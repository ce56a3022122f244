"""A base model spread over processes by FSDP2, loaded block by block, with adapters that start from whole weights.

    config -> model on meta -> for each block: read its weights, start its adapters, shard it, free the rest
                            -> embeddings, last norm and head: the same, as the root

No device ever holds more of the base than its own share and one block (or the root). Adapters start from whole
weights, so their start is that of a single process bit for bit, and every process keeps all of them: they are small,
and their gradients are averaged by :class:`~secura_lightning.engine.ShardedStrategy`. Full fine-tuning is not small:
its clones are sharded with the base, and FSDP2 averages their gradients. A checkpoint is in any case the same file as
that of any other run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from secura_lightning.adapters import AdapterConfig, AdapterLayer, AdapterSet
from secura_lightning.adapters.numerics import module_generator
from secura_lightning.adapters.targets import match_targets
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.modeling.load import BaseSpec, blocks_of, combine_prints, load_config, resolve, tensor_print

_WEIGHTS = "model.safetensors"


def empty_model(spec: BaseSpec) -> PreTrainedModel:
    """The model from its config alone: parameters on the meta device, buffers that follow from the config real.

    Raises:
        SecuraError: The configuration cannot be read.
    """
    from accelerate import init_empty_weights

    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "dtype": getattr(torch, spec.dtype)}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(load_config(spec), **options)
    model.tie_weights()
    model.config.use_cache = False
    return cast(PreTrainedModel, model.train())


def load_sharded(
    spec: BaseSpec, config: AdapterConfig, seed: int, mesh: DeviceMesh, device: torch.device
) -> tuple[PreTrainedModel, AdapterSet, str]:
    """Load, adapt and shard a base model; a collective call.

    Args:
        spec: The base.
        config: The adapter.
        seed: Seed of the adapters' start.
        mesh: The processes to shard over, one-dimensional.
        device: This process's device.

    Returns:
        The model, its adapters, and the fingerprint that :func:`~secura_lightning.modeling.load.fingerprint` gives.

    Raises:
        ConfigError: The combination cannot be sharded.
        SecuraError: The weights cannot be read.
    """
    check_shardable(spec)
    model = empty_model(spec)
    targets = match_targets(model, config)
    config.check_model(model, targets)
    model.requires_grad_(False)
    prints: dict[str, bytes] = {name: tensor_print(name, buffer) for name, buffer in _saved_buffers(model)}
    with WeightFiles(spec) as weights:
        loader = _Loader(model, weights, device, prints)
        layers: dict[str, AdapterLayer] = {}
        blocks = blocks_of(model)
        for prefix, unit in [*blocks.items(), ("", model)]:
            loader.materialise(prefix, unit)
            inside = f"{prefix}." if prefix else ""
            own = {name: t for name, t in targets.items() if name not in layers and name.startswith(inside)}
            clones: dict[int, nn.Parameter] = {}  # within one unit: ids mean nothing once its weights are let go
            for name, base in own.items():
                layers[name] = config.build_at(name, base, module_generator(seed, name))
                layers[name].share_clones(clones)
                base.requires_grad_(False)
                model.set_submodule(name, layers[name])
            tensors = [t for layer in layers.values() for _, t in layer.adapter_tensors()]
            whole = {t for t in tensors if isinstance(t, nn.Parameter) and not config.whole_weights}
            # The root's weights serve the first and the last product of a step: gathering them once is enough.
            fully_shard(unit, mesh=mesh, reshard_after_forward=bool(prefix), ignored_params=whole)
    ordered = {name: layers[name] for name in targets}
    return model, AdapterSet(model, config, ordered), combine_prints(prints)


def check_shardable(spec: BaseSpec) -> None:
    """Refuse what cannot be sharded.

    Raises:
        ConfigError: The base is quantised or random.
    """
    if spec.quantization != "none":
        raise ConfigError(
            f"model.quantization: {spec.quantization} cannot be sharded (its packed weights have no rows to split): "
            "use trainer.strategy: ddp, or model.quantization: none with model.dtype: bfloat16"
        )
    if spec.init == "random":
        raise ConfigError("model.init: random cannot be sharded: use trainer.strategy: ddp")


def is_sharded(model: nn.Module | None) -> bool:
    """Whether a model's weights are spread over processes, so that its forward is a collective call."""
    return isinstance(model, FSDPModule)


class _Loader:
    """Puts weights in the place of a model's meta parameters, part by part."""

    def __init__(
        self, model: PreTrainedModel, weights: WeightFiles, device: torch.device, prints: dict[str, bytes]
    ) -> None:
        self.weights = weights
        self.device = device
        self.prints = prints
        self.done: set[str] = set()  # buffers
        self.prefix = f"{model.base_model_prefix}."
        self.owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)  # tied weights have several
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.owners[id(parameter)].append((f"{name}.{key}" if name else key, module, key))

    def materialise(self, prefix: str, unit: nn.Module) -> None:
        """Read every parameter of ``unit`` that is still on the meta device and every buffer that was saved with the
        weights, and move the other buffers."""
        for parameter in [p for p in unit.parameters() if p.is_meta]:
            owners = self.owners[id(parameter)]
            value = self._read([name for name, _, _ in owners], parameter)
            fresh = nn.Parameter(value, requires_grad=False)
            for name, module, key in owners:
                module._parameters[key] = fresh
                self.prints[name] = tensor_print(name, value)
        for path, module in unit.named_modules(prefix=prefix):
            for key, buffer in module._buffers.items():
                if buffer is None:
                    continue
                name = f"{path}.{key}" if path else key
                if name in self.prints and self._find([name]) is not None and name not in self.done:
                    module._buffers[key] = self._read([name], buffer)
                    self.prints[name] = tensor_print(name, module._buffers[key])
                    self.done.add(name)
                elif buffer.device != self.device:
                    module._buffers[key] = buffer.to(self.device)

    def _find(self, names: list[str]) -> str | None:
        # A model that was saved without its head names its weights without the prefix, and the other way round.
        wanted = [v for name in names for v in (name, name.removeprefix(self.prefix), self.prefix + name)]
        return next((name for name in wanted if name in self.weights), None)

    def _read(self, names: list[str], like: Tensor) -> Tensor:
        found = self._find(names)
        if found is None:
            raise SecuraError(
                f"model.base: no tensor {names[0]} in the weight files: this layout cannot be sharded; use "
                "trainer.strategy: ddp"
            )
        value = self.weights[found]
        if value.shape != like.shape:
            raise SecuraError(f"model.base: {found} has shape {tuple(value.shape)}, not {tuple(like.shape)}")
        return value.to(device=self.device, dtype=like.dtype)


class WeightFiles:
    """The tensors of a model's safetensors files by name, each read when it is asked for.

    Raises:
        SecuraError: There are no such files.
    """

    def __init__(self, spec: BaseSpec) -> None:
        self.base = spec.base
        self.files = dict(_find_files(spec))
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return cast(Tensor, self._open[path].get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise SecuraError(f"model.base: cannot read {path}: {error}") from error


def _find_files(spec: BaseSpec) -> Iterator[tuple[str, Path]]:
    """(tensor, file) of a local folder or a hub id."""
    where = resolve(spec.base)
    index = _fetch(where, f"{_WEIGHTS}.index.json", spec)
    if index is not None:
        for name, file in json.loads(index.read_text())["weight_map"].items():
            path = _fetch(where, file, spec)
            if path is None:
                raise SecuraError(f"model.base: {spec.base} names a weight file {file} that is not there")
            yield name, path
        return
    single = _fetch(where, _WEIGHTS, spec)
    if single is None:
        raise SecuraError(f"model.base: {spec.base} holds no safetensors weights")
    with safe_open(single, framework="pt") as file:
        yield from ((name, single) for name in file.keys())  # noqa: SIM118  (no mapping)


def _fetch(where: str, name: str, spec: BaseSpec) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        where,
        name,
        revision=spec.revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers, which :func:`fingerprint` reads with the weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    yield from ((name, value) for name, value in model.state_dict().items() if name not in parameters)
