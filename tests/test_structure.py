"""Imports flow one way, and files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import secura_lightning

ROOT = Path(secura_lightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
OWN = "secura_lightning"
LAYERS = ("adapters", "modeling", "data", "metrics", "evaluation", "strategies", "callbacks", "module", "cli")
# package -> the layers and libraries that it must not import
FORBIDDEN = {
    "adapters": ("transformers", "lightning", *(f"{OWN}.{name}" for name in LAYERS if name != "adapters")),
    "modeling": ("lightning", *(f"{OWN}.{name}" for name in ("module", "cli", "callbacks", "strategies"))),
    "metrics": ("torch", "lightning", "transformers", *(f"{OWN}.{name}" for name in ("module", "cli", "data"))),
    "data": tuple(f"{OWN}.{name}" for name in ("module", "cli", "adapters", "callbacks")),
    "evaluation": tuple(f"{OWN}.{name}" for name in ("module", "cli", "adapters", "callbacks")),
    "strategies": (f"{OWN}.module", f"{OWN}.cli"),
    "callbacks": (f"{OWN}.module", f"{OWN}.cli"),
}


def imported_at_start(path: Path) -> set[str]:
    """Modules that importing ``path`` imports at once, lazily imported ones left out."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_flow_one_way(package: str) -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == package:
            bad = {
                name
                for name in imported_at_start(path)
                for ban in FORBIDDEN[package]
                if f"{name}.".startswith(f"{ban}.")
            }
            assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_files_and_functions_stay_readable() -> None:
    for path in FILES:
        source = path.read_text()
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
                assert node.returns is not None, f"{path}: {node.name} lacks a return annotation"
