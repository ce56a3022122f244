"""Random states go to where they can: a run may continue on fewer devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secura_lightning import rng


def test_states_of_gpus_that_are_not_here_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    state = rng.capture()
    state["ranks"][0]["cuda"] = [torch.get_rng_state()] * 4
    restored: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    rng.restore(state, 0)
    assert len(restored[0]) == 2
