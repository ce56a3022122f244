"""Two processes stop and dial where one does: they score the probe together and hold one state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import EXACT, finished, run_jobs, write
from tests.integration.conftest import fit_into

STEPS: dict[str, Any] = {"data.steps_per_task": [4, 3], "data.probe": "PocketProbe", "forgetting.limit": 20}
TASKS = [{"class_path": "tests.tiny.TinyTask", "init_args": {"name": name}} for name in ("first", "second")]
TWO = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 4}
SAME = {"class_path": "tests.distributed.callbacks.SameEverywhere"}


def changes(policy: str, *more: dict[str, Any]) -> dict[str, Any]:
    settings = {"floor": 0.9, "policy": policy, "every_n_steps": 1, "limit": 40, "bisections": 3}
    listed = [{"class_path": "RetentionGuard", "init_args": settings}, *more]
    return {**STEPS, "data.tasks": TASKS, "trainer.callbacks": listed}


@pytest.mark.slow
def test_two_processes_stop_and_dial_where_one_does(tmp_path: Path) -> None:
    run_jobs(tmp_path, [write(tmp_path, policy, {**changes(policy, SAME), **TWO}) for policy in ("stop", "dial")])
    for policy in ("stop", "dial"):
        single = fit_into(tmp_path, {**EXACT, **changes(policy), "data.batch_size": 8}, folder=policy)
        many = finished(tmp_path, policy)
        torch.testing.assert_close(
            many.checkpoint["state_dict"], single.checkpoint["state_dict"], rtol=1e-9, atol=1e-10
        )
        one, other = single.report["meta"]["guard"], many.report["meta"]["guard"]
        assert one == other
        assert all(row["retention"] >= 0.9 for row in one["tasks"])
        rows = one["tasks"]
        if policy == "stop":  # which the floor makes act, in the middle of a task at least once
            assert any(row["steps"] < steps for row, steps in zip(rows, (4, 3), strict=True)), rows
        else:
            assert any(0 < row["scale"] < 1 for row in rows), rows
        assert single.report["matrix"] == many.report["matrix"]
        assert single.report["base_knowledge"]["part"] == "held-out"
