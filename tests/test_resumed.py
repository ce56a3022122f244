"""Settings of a checkpoint against those of a run."""

from __future__ import annotations

from secura_lightning.resumed import first_difference


def test_the_first_difference_is_told() -> None:
    assert first_difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "c": 5}) == ("b", 2, 4)
    assert first_difference({"a": 1, "gone": 9}, {"a": 1}) is None


def test_what_a_checkpoint_lacks_agrees_or_means_what_is_assumed() -> None:
    assert first_difference({}, {"a": 1}) is None
    assert first_difference({}, {"a": 1}, {"a": 1}) is None
    assert first_difference({}, {"a": 1}, {"a": 2}) == ("a", 2, 1)
    assert first_difference({}, {"a": 1}, {}) == ("a", None, 1)
    assert first_difference({"a": None}, {"a": 1}) == ("a", None, 1)
