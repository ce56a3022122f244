"""Find classes by name without a registry: import every module of a package once."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any


def import_all(package: str) -> None:
    """Import every direct submodule of ``package``, so that its classes can be named in YAML by class name alone."""
    paths = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(paths):
        importlib.import_module(f"{package}.{module.name}")


def subclasses(cls: Any) -> Iterator[type]:
    """Every class below ``cls`` that has been imported, at any depth."""
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)
