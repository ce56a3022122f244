"""Shared by the adapters' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The shared suite trains every adapter as it is injected, LoRA-Null on its random basis too."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:LoRA-Null trains on a random basis"))
