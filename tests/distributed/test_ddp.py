"""Rows split over micro-batches and processes in any way give the same gradient, the same scores and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import EXACT, finished, run_jobs, write
from tests.integration.conftest import Fit, fit_into

Split = tuple[int, int]  # rows of a micro-batch, micro-batches of a window
SECURA = {"class_path": "SECURAConfig", "init_args": {"c": 8, "a": 12, "norm": "element", "targets": "all-linear"}}
TWO = {
    "trainer.devices": 2,
    "trainer.strategy": "ddp",
    "trainer.callbacks": [{"class_path": "tests.distributed.callbacks.SameEverywhere"}],
}


def split(rows: int, micro_batches: int) -> dict[str, Any]:
    return {"data.batch_size": rows, "trainer.accumulate_grad_batches": micro_batches}


def assert_close(one: Fit, other: Fit, tolerance: float = 1e-10) -> None:
    """Equal tensors and equal reports; what they say about the split itself aside."""
    torch.testing.assert_close(one.checkpoint["state_dict"], other.checkpoint["state_dict"], rtol=0, atol=tolerance)
    left, right = one.report, other.report
    for report in (left, right):
        report["meta"].pop("data")
    assert left["matrix"] == right["matrix"]
    assert left["details"] == right["details"]
    torch.testing.assert_close(
        left["base_knowledge"].pop("perplexity"), right["base_knowledge"].pop("perplexity"), rtol=1e-9, atol=0
    )
    assert left == right


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fit]:
    """A run in one process."""

    def go(changes: dict[str, Any]) -> Fit:
        return fit_into(tmp_path_factory.mktemp("single"), {**EXACT, **changes})

    return go


@pytest.mark.slow
def test_any_split_into_micro_batches_gives_the_same_run(single: Callable[..., Fit]) -> None:
    whole = single(split(8, 1))
    assert any(value.abs().max() > 1e-4 for value in whole.checkpoint["state_dict"].values())
    for rows, micro_batches in ((4, 2), (1, 8)):
        assert_close(single(split(rows, micro_batches)), whole)


@pytest.mark.slow
def test_two_processes_equal_one(single: Callable[..., Fit], tmp_path: Path) -> None:
    jobs = {
        "plain": (split(4, 1), split(8, 1)),
        "accumulated": (split(2, 2), split(8, 1)),
        "secura": (
            {
                **split(4, 1),
                "model.adapter": SECURA,
                "model.chunked_loss": True,
                "model.activation_checkpointing": True,
            },
            {**split(8, 1), "model.adapter": SECURA},
        ),
    }
    lines = [write(tmp_path, name, {**TWO, **changes}) for name, (changes, _) in jobs.items()]
    run_jobs(tmp_path, lines)
    for name, (_, changes) in jobs.items():
        assert_close(finished(tmp_path, name), single(changes))
