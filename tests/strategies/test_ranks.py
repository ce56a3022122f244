"""Without a sharded model nothing is agreed upon: every rank keeps what it has."""

from __future__ import annotations

from torch import nn

from secura_lightning.strategies.ranks import most, passes


def test_a_whole_model_is_passed_as_often_as_this_rank_has_something() -> None:
    model = nn.Linear(2, 2)
    assert most(3, model) == 3
    assert passes(["a", "b"], "spare", model) == [("a", True), ("b", True)]
    assert passes([], "spare", model) == []
