"""Which rows a batch holds depends on the seed and the position alone."""

import pytest
import torch

from secura_lightning.data.batches import ResumableLoader, SequenceBatches, SequencePlan
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
