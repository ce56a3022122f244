"""Sizes that differ from module to module: one mechanism for all adapters.

::

    model:
      adapter:
        class_path: LoRAConfig
        init_args:
          rank: 8
          per_target:
            down_proj: {rank: 32, alpha: 64}       # every module whose name ends so
            layers.0.self_attn.q_proj: {rank: 2}   # this one alone

A longer name wins over a shorter one, setting by setting. peft's ``rank_pattern`` and ``alpha_pattern`` are this with
one setting each.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from secura_lightning.adapters.base import AdapterLayer, TargetedConfig, require
from secura_lightning.errors import ConfigError


@dataclass(kw_only=True)
class PerTargetConfig(TargetedConfig):
    """Settings of an adapter whose sizes may differ from module to module."""

    may_differ: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    """Names of the settings that may."""

    per_target: dict[str, dict[str, int | float]] | None = None
    """Settings of single modules, such as `{down_proj: {rank: 32}}`: by name or dotted suffix, the longer one wins."""

    def __post_init__(self) -> None:
        """Check names and types; values are checked as those of the whole adapter are.

        Raises:
            ConfigError: A setting is unknown, or may not differ.
        """
        super().__post_init__()
        for target, settings in (self.per_target or {}).items():
            require(bool(settings), f"model.adapter.per_target.{target} is empty: give it a setting, or remove it")
            for key, value in settings.items():
                require(
                    key in self.may_differ,
                    f"model.adapter.per_target.{target} sets {key!r}, but {type(self).__name__} can differ in "
                    f"{', '.join(self.may_differ)} alone",
                )
                whole = isinstance(getattr(type(self), key), int)
                require(
                    isinstance(value, int) if whole else isinstance(value, int | float),
                    f"model.adapter.per_target.{target}.{key} is {value!r}: it must be a{' whole' * whole} number",
                )

    def check_model(self, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        """Refuse names that no target has.

        Raises:
            ConfigError: The message names the nearest.
        """
        super().check_model(model, targets)
        known = {".".join(name.split(".")[-depth:]) for name in targets for depth in range(1, name.count(".") + 2)}
        for target in self.per_target or {}:
            near = difflib.get_close_matches(target, sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(_last_parts(targets)[:12])}"
            require(
                target in known, f"model.adapter.per_target names {target!r}, which none of the targets has: {hint}"
            )

    def differences(self, name: str) -> dict[str, tuple[str, int | float]]:
        """What differs at the module ``name``: setting -> (the name in ``per_target`` that says so, value)."""
        found: dict[str, tuple[str, int | float]] = {}
        for target, settings in sorted((self.per_target or {}).items(), key=lambda item: item[0].count(".")):
            if name == target or name.endswith(f".{target}"):
                found |= {key: (target, value) for key, value in settings.items()}
        return found

    def build_at(self, name: str, base: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """:meth:`build` with the settings of this module; messages name the key that was set."""
        different = self.differences(name)
        try:
            values: dict[str, Any] = {key: value for key, (_, value) in different.items()}
            config = dataclasses.replace(self, per_target=None, **values) if values else self
            return config.build(name, base, generator)
        except ConfigError as error:
            message = str(error)
            for key, (target, _) in different.items():
                message = message.replace(f"model.adapter.{key} ", f"model.adapter.per_target.{target}.{key} ")
            raise ConfigError(message) from None


def _last_parts(targets: dict[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[-1] for name in targets))
