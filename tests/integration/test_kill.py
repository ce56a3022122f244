"""A few kills of the soak that `benchmarks/kill.py` runs at length."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.kill import STEPS, differences, main, schedule


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EWC", "ER+EWC", "ILoRA"])
def test_killed_and_resumed_equals_untouched(name: str) -> None:
    assert main(["--kills", "2", "--per-run", "2", "--only", name, "--seed", "3"]) == 0


def test_differences_are_found_and_times_are_not() -> None:
    one = {"a": [torch.ones(2), 1], "elapsed": 3.0, "b": float("nan")}
    assert not list(differences(one, {"a": [torch.ones(2), 1], "elapsed": 4.0, "b": float("nan")}))
    other = {"a": [torch.tensor([1.0, 1.0 + 2**-23]), 1], "elapsed": 3.0, "b": float("nan")}
    assert list(differences(one, other)) == [".a[0]"]
    assert list(differences({"a": 1}, {"b": 1}))
    assert list(differences({"a": [1]}, {"a": [1, 2]}))


def test_schedule_strikes_edges_of_tasks_too() -> None:
    drawn = schedule(random.Random(0), 400)
    steps = {killer.step for killer in drawn}
    assert {0, 1, STEPS[0], STEPS[0] + 1, sum(STEPS)} <= steps <= set(range(sum(STEPS) + 1))
    assert {killer.moment for killer in drawn} == {"step", "evaluation", "checkpoint", "any"}
    assert all(killer.moment == "evaluation" for killer in drawn if killer.step == 0)
    assert [killer.step for killer in drawn] == sorted(killer.step for killer in drawn)
