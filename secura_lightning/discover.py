"""Find classes by name without a registry: import every module of a package once."""

from __future__ import annotations

import importlib
import pkgutil


def import_all(package: str) -> None:
    """Import every direct submodule of ``package``, so that its classes can be named in YAML by class name alone."""
    paths = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(paths):
        importlib.import_module(f"{package}.{module.name}")
