"""Settings of a checkpoint against those of a run."""

from __future__ import annotations

from typing import Any

from secura_lightning.resumed import first_difference, recount


def test_the_first_difference_is_told() -> None:
    assert first_difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "c": 5}) == ("b", 2, 4)
    assert first_difference({"a": 1, "gone": 9}, {"a": 1}) is None


def test_what_a_checkpoint_lacks_agrees_or_means_what_is_assumed() -> None:
    assert first_difference({}, {"a": 1}) is None
    assert first_difference({}, {"a": 1}, {"a": 1}) is None
    assert first_difference({}, {"a": 1}, {"a": 2}) == ("a", 2, 1)
    assert first_difference({}, {"a": 1}, {}) == ("a", None, 1)
    assert first_difference({"a": None}, {"a": 1}) == ("a", None, 1)


def test_counts_of_micro_batches_become_those_of_another_split() -> None:
    def checkpoint(ready: int, completed: int) -> dict[str, Any]:
        progress = {"ready": ready, "started": ready, "processed": ready, "completed": completed}
        loop = {"state_dict": {"combined_loader": [{"position": ready}]}}
        return {
            "loops": {"fit_loop": {**loop, "epoch_loop.batch_progress": {"total": progress, "current": {**progress}}}}
        }

    found = checkpoint(6, 5)
    recount(found, 2, 1)
    assert found == checkpoint(3, 2)
    recount(found, 1, 4)
    assert found == checkpoint(12, 11)
    recount(found, 4, 4)
    assert found == checkpoint(12, 11)
