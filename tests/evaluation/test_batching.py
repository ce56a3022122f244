import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from secura_lightning.data.encode import Prompt
from secura_lightning.data.rows import Row
from secura_lightning.evaluation.batching import batches, evaluating, gather, left_pad, shard, subset
from tests.evaluation.tiny import tiny_llama


@given(st.lists(st.integers(1, 50)), st.integers(1, 8), st.none() | st.integers(1, 100))
def test_batches_cover_everything_once_within_the_bounds(lengths: list[int], size: int, tokens: int | None) -> None:
    found = batches(lengths, size, tokens)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    ordered = [lengths[i] for batch in found for i in batch]
    assert ordered == sorted(lengths, reverse=True)
    for batch in found:
        assert len(batch) <= size
        assert tokens is None or len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 4), st.integers(0, 40))
def test_no_other_cut_of_the_sorted_sequences_costs_less(lengths: list[int], size: int, overhead: int) -> None:
    def least(rest: list[int]) -> int:
        first = range(1, min(size, len(rest)) + 1)
        return min((n * rest[0] + overhead + least(rest[n:]) for n in first), default=0)

    found = batches(lengths, size, overhead=overhead)
    assert sum(len(batch) * lengths[batch[0]] + overhead for batch in found) == least(sorted(lengths, reverse=True))


def test_left_pad_aligns_ends_and_counts_positions_from_the_first_token() -> None:
    found = left_pad([[5, 6, 7], [8]], 9, torch.device("cpu"))
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_cut_keeps_the_beginning_token_and_the_end() -> None:
    assert Prompt([0, 11, 12, 13], head=1).cut(3) == [0, 12, 13]
    assert Prompt([10, 11, 12, 13]).cut(3) == [11, 12, 13]
    assert Prompt([0, 11], head=1).cut(3) == [0, 11]
    assert Prompt([0, 11, 12, 13], head=1).cut(None) == [0, 11, 12, 13]


def test_what_is_cached_while_evaluating_can_be_trained_through() -> None:
    model = tiny_llama()
    with evaluating(model):
        cached = model.lm_head.weight * 2
    weight = torch.ones(259, 32, requires_grad=True)
    (weight * cached).sum().backward()  # an inference tensor would raise here
    assert weight.grad is not None
    assert not cached.requires_grad


ROWS = [Row(str(i), "p", "a", kind=kind) for i, kind in enumerate("aaaaaaaabbbc")]


def test_subset_is_spread_over_kinds_and_in_order() -> None:
    found = subset(ROWS, 7)
    kinds = [row.kind for row in found]
    assert {kind: kinds.count(kind) for kind in "abc"} == {"a": 3, "b": 3, "c": 1}
    assert [int(row.id) for row in found] == sorted(int(row.id) for row in found)
    assert found == subset(ROWS, 7)


def test_smaller_subset_lies_within_the_larger_and_is_not_the_head() -> None:
    rows = [Row(str(i), "p", "a") for i in range(100)]
    small, large = subset(rows, 10), subset(rows, 40)
    assert set(small) < set(large)
    assert small != rows[:10]
    assert len(small) == 10
    assert subset(rows, None) == subset(rows, 100) == rows


@pytest.mark.parametrize(("n", "world"), [(0, 2), (1, 3), (7, 3), (8, 4)])
def test_gather_undoes_shard(n: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [f"row {i}" for i in range(n)]
    here = {"rank": 0}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "get_rank", lambda: here["rank"])
    shares = []
    for here["rank"] in range(world):
        shares.append(shard(items))
    assert sum(map(len, shares)) == n  # neither padding nor duplicates

    def all_gather_object(out: list[object], mine: object) -> None:
        assert mine == shares[here["rank"]]
        out[:] = shares

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    assert gather(shares[-1]) == items


def test_without_distribution_one_process_has_everything() -> None:
    assert shard(ROWS) == ROWS
    assert gather(ROWS) == ROWS
