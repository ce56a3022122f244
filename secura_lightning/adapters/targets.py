"""Which modules of a model a configuration names."""

from __future__ import annotations

import difflib
import re

from torch import nn

from secura_lightning.adapters.base import ALL_LINEAR, AdapterConfig
from secura_lightning.errors import ConfigError

_HEAD_NAMES = ("lm_head", "embed_out")
_SHOWN = 6


def match_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` names, by dotted name in the model's order; a module with two names appears once.

    Raises:
        ConfigError: A target matches nothing, or only modules that the adapter cannot wrap; near names are listed.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    usable = {name: module for name, module in modules.items() if config.accepts(module)}
    wanted = [config.targets] if isinstance(config.targets, str) else list(config.targets)
    keyword = wanted[0] if len(wanted) == 1 and wanted[0] in config.keywords else None
    if keyword is not None:
        heads = _output_heads(model) if keyword == ALL_LINEAR else set()
        chosen = {name for name, module in usable.items() if id(module) not in heads}
    else:
        chosen = set()
        for target in wanted:
            chosen |= _match_one(target, modules, usable, config)
    if config.exclude is not None:
        chosen = {name for name in chosen if not re.search(config.exclude, name)}
    if not chosen:
        raise ConfigError(
            f"model.adapter.targets {config.targets!r} with exclude {config.exclude!r} leaves no module: "
            f"the model has {_listing(usable)}"
        )
    first_names = {id(usable[name]): name for name in reversed(usable) if name in chosen}
    return {name: usable[name] for name in usable if first_names.get(id(usable[name])) == name}


def _match_one(
    target: str, modules: dict[str, nn.Module], usable: dict[str, nn.Module], config: AdapterConfig
) -> set[str]:
    found = {name for name in usable if name == target or name.endswith(f".{target}")}
    if found:
        return found
    wrong = next((m for name, m in modules.items() if name == target or name.endswith(f".{target}")), None)
    if wrong is not None:
        raise ConfigError(
            f"model.adapter.targets names {target!r}, a {type(wrong).__name__}, which {type(config).__name__} cannot "
            f"adapt: name linear layers; the model has {_listing(usable)}"
        )
    suffixes = {".".join(name.split(".")[-depth:]) for name in usable for depth in (1, 2)}
    near = difflib.get_close_matches(target, sorted(suffixes | set(config.keywords)), n=_SHOWN, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"the model has {_listing(usable)}"
    raise ConfigError(f"model.adapter.targets names {target!r}, which matches no module: {hint}")


def _output_heads(model: nn.Module) -> set[int]:
    """Ids of the modules that map to the vocabulary, which `all-linear` leaves alone."""
    heads = {id(module) for name, module in model.named_modules() if name.split(".")[-1] in _HEAD_NAMES}
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return heads | ({id(head)} if head is not None else set())


def _listing(usable: dict[str, nn.Module]) -> str:
    names = list(dict.fromkeys(name.split(".")[-1] for name in usable))
    return ", ".join(names[:12]) or "no module that this adapter can wrap"
