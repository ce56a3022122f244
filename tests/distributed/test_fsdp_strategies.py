"""Every strategy trains on a sharded base what it trains on a whole one, also when it is interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import torchrun
from tests.distributed.sharded_strategies import SCENARIOS
from tests.strategies.tiny import base

pytestmark = pytest.mark.slow
TOLERANCE = 1e-8  # in fp64: the order of sums


def assert_equal(one: Any, other: Any, place: str) -> None:
    """Equal structures whose numbers are close."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key != "words":  # of a buffer: kept logits are fp32 in a bit pattern
                assert_equal(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{place}/{i}")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{place}: {text}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE), place
    else:
        assert one == other, place


def test_every_strategy_on_a_sharded_base_equals_a_whole_one_resumed_or_not(tmp_path: Path) -> None:
    done = torchrun(["-m", "tests.distributed.sharded_strategies", str(tmp_path), base()])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    runs = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in SCENARIOS}
    for name, found in runs.items():
        for part in ("tensors", "strategies"):
            assert_equal(found["sharded"][part], found["whole"][part], f"{name}: sharded/{part}")
            assert_equal(found["resumed"][part], found["sharded"][part], f"{name}: resumed/{part}")
        if name != "none" and not SCENARIOS[name][1]:  # the strategy did something
            plain = runs["L2SP" if name == "AGEM" else "none"]["whole"]["tensors"]
            apart = max((value - plain[key]).abs().max() for key, value in found["whole"]["tensors"].items())
            assert apart > 1e-4, name

    # What makes ranks differ was there: rows that go together on one rank alone, and nothing to replay on one alone.
    first, second = runs["ER"]["whole"]["apart"]
    assert any(one != other for one, other in zip(first, second, strict=True))
    first, second = runs["ER, nothing on one rank"]["whole"]["apart"]
    assert len(second) < len(first)
