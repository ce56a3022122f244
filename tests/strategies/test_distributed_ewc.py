"""Fisher information and EWC's gradient do not depend on how a window is split over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import EXACT, finished, run_jobs, write
from tests.integration.conftest import Fit, fit_into

STEPS: dict[str, Any] = {"data.steps_per_task": [2, 3, 2]}  # the first step of a task is still at the anchor
LISTED: dict[str, Any] = {
    **STEPS,
    "trainer.callbacks": [{"class_path": "EWC", "init_args": {"ewc_lambda": 5.0, "samples": 9, "batch_size": 4}}],
}


def fisher(run: Fit) -> dict[str, torch.Tensor]:
    return next(value for key, value in run.checkpoint["callbacks"].items() if key.startswith("EWC"))


@pytest.mark.slow
def test_two_processes_give_the_fisher_and_the_run_of_one(tmp_path: Path) -> None:
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 4}
    run_jobs(tmp_path, [write(tmp_path, "two", {**LISTED, **two})])
    many, single = finished(tmp_path, "two"), fit_into(tmp_path, {**EXACT, **LISTED, "data.batch_size": 8})
    one, other = fisher(single), fisher(many)
    assert sum(float(value.sum()) for value in one["weights"].values()) > 0
    torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(other["anchor"], one["anchor"], rtol=1e-9, atol=1e-10)
    # Two further tasks were learned under the penalty, whose gradient is therefore the same too.
    torch.testing.assert_close(many.checkpoint["state_dict"], single.checkpoint["state_dict"], rtol=1e-9, atol=1e-10)
    free = fit_into(tmp_path, {**EXACT, **STEPS, "data.batch_size": 8}, folder="free")
    apart = [
        (value - free.checkpoint["state_dict"][name]).abs().max()
        for name, value in single.checkpoint["state_dict"].items()
    ]
    assert max(apart) > 1e-6
