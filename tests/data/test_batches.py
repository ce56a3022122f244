"""Which rows a batch holds depends on the seed and the position alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secura_lightning.data.batches import ResumableLoader, SequenceBatches, SequencePlan, pack_lines
from secura_lightning.data.encode import Encoded


def rows(n: int, first: int) -> list[Encoded]:
    return [Encoded([1, first + i, *[7] * (i % 5), 2], 2) for i in range(n)]


def batches(batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1, seed: int = 0) -> SequenceBatches:
    plan = SequencePlan([5, 3], accumulate)
    return SequenceBatches([rows(20, 100), rows(7, 200)], plan, batch_size, rank, world, seed)


def test_positions_cover_the_sequence_once() -> None:
    plan = SequencePlan([2, 3], accumulate=2)
    where = [plan.locate(k) for k in range(len(plan))]
    assert [(p.task, p.step, p.micro) for p in where] == [
        (t, s, m) for t, n in ((0, 2), (1, 3)) for s in range(n) for m in (0, 1)
    ]
    assert [k for k in range(len(plan)) if plan.starts_task(k)] == [0, 4]
    assert [k for k in range(len(plan)) if plan.ends_task(k)] == [3, 9]


@pytest.mark.parametrize(("size", "accumulate", "world"), [(4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)])
def test_any_split_of_a_window_holds_the_same_rows_and_token_count(size: int, accumulate: int, world: int) -> None:
    whole = batches(8)
    for step in range(8):
        reference = whole[step]
        parts = [
            batches(size, accumulate, rank, world)[step * accumulate + micro]
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert sorted(row for part in parts for row in part["rows"]) == sorted(reference["rows"])
        assert {part["window_tokens"] for part in parts} == {reference["window_tokens"]}
        assert reference["window_tokens"] == sum((part["labels"][:, 1:] != -100).sum().item() for part in parts)


def test_every_pass_visits_every_row_once_in_another_order() -> None:
    stream = batches(10)
    first = stream[0]["rows"] + stream[1]["rows"]
    second = stream[2]["rows"] + stream[3]["rows"]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_seed_decides_the_order() -> None:
    assert batches(8, seed=1)[0]["rows"] == batches(8, seed=1)[0]["rows"] != batches(8, seed=2)[0]["rows"]


def test_loader_continues_where_its_state_says() -> None:
    loader = ResumableLoader(batches(4))
    iterator = iter(loader)
    seen = [next(iterator)["rows"] for _ in range(3)]
    rest = [batch["rows"] for batch in iterator]
    resumed = ResumableLoader(batches(4))
    resumed.load_state_dict({"position": 3})
    assert len(resumed) == len(seen) + len(rest)
    assert [batch["rows"] for batch in resumed] == rest


def test_loader_state_counts_handed_out_batches_with_workers() -> None:
    loader = ResumableLoader(batches(4), num_workers=1)
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict() == {"position": 1}
    del iterator


def test_collated_tensors_are_padded_and_masked() -> None:
    batch = batches(8)[0]
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["labels"][:, :2] == -100).all()
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])


def grouped(n: int = 103, steps: int = 60, **settings: int) -> SequenceBatches:
    plan = SequencePlan([steps], settings.pop("accumulate", 1))
    return SequenceBatches([rows(n, 100)], plan, settings.pop("batch_size", 4), group_by_length=True, **settings)


def test_grouped_rows_are_alike_and_each_is_still_once_a_pass() -> None:
    stream = grouped()
    # 412 = 4 x 103 rows: the first four passes end together with a window.
    counts = Counter(row for step in range(103) for row in stream.window(0, step))
    assert counts == Counter(dict.fromkeys(range(103), 4))
    # Passes end inside windows; the last of one and the first of the next share one.
    first = Counter(row for step in range(26) for row in stream.window(0, step))
    assert set(first) == set(range(103))
    assert first.total() == 104
    mixed = SequenceBatches([rows(103, 100)], SequencePlan([60]), 4)
    assert stream.padding_efficiency(0) > 0.95 > 0.9 > mixed.padding_efficiency(0)


def test_grouped_windows_come_in_another_order_each_pass_and_the_same_in_each_run() -> None:
    first = [grouped().window(0, step) for step in range(25)]
    assert first == [grouped().window(0, step) for step in range(25)]
    assert first != [grouped(seed=1).window(0, step) for step in range(25)]
    lengths = [len(grouped().rows[0][window[0]].ids) for window in first]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize(("size", "accumulate", "world"), [(2, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_any_split_of_a_grouped_window_holds_the_same_rows(size: int, accumulate: int, world: int) -> None:
    whole = grouped()
    for step in range(40):
        parts = [
            grouped(batch_size=size, accumulate=accumulate, rank=rank, world_size=world)[step * accumulate + micro]
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert sorted(row for part in parts for row in part["rows"]) == sorted(whole[step]["rows"])


def test_packed_batches_hold_the_same_rows_and_labels_in_fewer_places() -> None:
    plan, data = SequencePlan([10]), [rows(40, 100)]
    padded, packed = SequenceBatches(data, plan, 8), SequenceBatches(data, plan, 8, packing=True)
    for step in range(10):
        one, other = padded[step], packed[step]
        assert one["rows"] == other["rows"]
        assert one["window_tokens"] == other["window_tokens"] == (other["labels"][:, 1:] != -100).sum()
        assert other["input_ids"].shape[1] == one["input_ids"].shape[1]
        assert other["input_ids"].numel() <= one["input_ids"].numel()
        assert other["padding_efficiency"] == other["attention_mask"].double().mean().item()
        assert other["attention_mask"].sum() == one["attention_mask"].sum()
        assert (other["position_ids"] == 0).sum() >= 8  # every row begins at 0
    assert packed.padding_efficiency(0) > padded.padding_efficiency(0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_lines_hold_every_row_once_and_none_is_longer_than_the_longest_row(lengths: list[int]) -> None:
    lines = pack_lines(lengths)
    assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in line) for line in lines) == max(lengths)
