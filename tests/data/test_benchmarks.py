"""Public benchmarks: their original files and the hub's copies give the same rows; nothing is left out unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secura_lightning.data import catalogue
from secura_lightning.data.catalogue import BENCHMARKS
from secura_lightning.data.tasks.benchmark import Benchmark
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.metrics.text import METRICS
from tests.data.layouts import put
from tests.data.originals import HUB, ORIGINAL, original

NAMES: Any = list(BENCHMARKS)


@pytest.mark.parametrize("dataset", NAMES)
def test_original_files_and_hub_copies_give_the_same_row(tmp_path: Path, dataset: Any) -> None:
    task = original(tmp_path, dataset, n_validation=0)
    row = task.rows("train")[0]
    assert row == Benchmark(dataset).to_row("train/1", HUB[dataset], "train")
    assert task.rows("test")
    assert not row.choices or row.answer in row.choices
    assert task.metric in METRICS
    assert task.name == dataset


@pytest.mark.parametrize("dataset", NAMES)
def test_every_revision_is_a_commit(dataset: Any) -> None:
    hub = Benchmark(dataset).dataset
    assert hub is not None
    assert {"train", "test"} <= set(hub.splits)
    if dataset != "sentiment140":  # has none, as the docstring says
        assert len(hub.revision) == 40
        assert set(hub.revision) <= set("0123456789abcdef")
    else:
        assert "Sentiment140 has none" in (catalogue.__doc__ or "")


def test_converted_files_are_read_too(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        put(tmp_path / f"{name}.jsonl", [HUB["sst2"], HUB["sst2"] | {"label": 0, "sentence": "dull"}])
    task = Benchmark("sst2", path=str(tmp_path), n_validation=0)
    assert [row.answer for row in task.rows("train")] == ["positive", "negative"]
    assert len(task.rows("test")) == 2  # the validation file: test labels are hidden
    put(tmp_path / "all.jsonl", [{"sentence": f"film {i}", "label": i % 2} for i in range(40)])
    alone = Benchmark("sst2", path=str(tmp_path / "all.jsonl"))
    assert [len(alone.rows(split)) for split in ("train", "validation", "test")] == [34, 2, 4]
    named = Benchmark("sst2", path=str(tmp_path), splits={"train": "all.jsonl"}, n_validation=0)
    assert len(named.rows("train")) == 40


def test_hidden_test_labels_are_never_read_and_validation_is_held_out(tmp_path: Path) -> None:
    task = original(tmp_path, "sst2")
    assert [row.prompt.splitlines()[0] for row in task.rows("test")] == ["it works ."]
    train, held = task.rows("train"), task.rows("validation")
    assert (len(train), len(held)) == (3, 1)
    assert not {row.prompt for row in train} & {row.prompt for row in held}


def test_neutral_tweets_are_left_out_and_counted(tmp_path: Path) -> None:
    task = original(tmp_path, "sentiment140", n_validation=0)
    with pytest.warns(UserWarning, match="left out 1 test rows: neutral tweets, which the training data lacks"):
        assert [row.answer for row in task.rows("test")] == ["positive"]
    assert "caf\u00e9" in task.rows("train")[0].prompt  # Latin-1, as published


def test_options_of_the_same_text_are_left_out_and_counted(tmp_path: Path) -> None:
    twice = HUB["hellaswag"] | {"endings": ["sings.", "sings.", "[x] leaves.", "sleeps."]}
    for name in ("train", "val"):
        put(tmp_path / f"hellaswag_{name}.jsonl", [HUB["hellaswag"], twice])
    with pytest.warns(UserWarning, match="left out 1 train rows: two of its options are the same text"):
        assert len(Benchmark("hellaswag", path=str(tmp_path), n_validation=0).rows("train")) == 1
    put(tmp_path / "hellaswag_train.jsonl", [twice])
    with pytest.raises(SecuraError, match=r"none of 1 train rows is left: two of its options are the same text"):
        Benchmark("hellaswag", path=str(tmp_path), n_validation=0).rows("train")


def test_every_subject_of_mmlu_is_read_and_named(tmp_path: Path) -> None:
    rows = original(tmp_path, "mmlu").rows("test")
    assert [row.prompt.splitlines()[0] for row in rows] == [
        "This is a question about astronomy.",
        "This is a question about virology.",
    ]
    assert len({row.id for row in rows}) == 2


@pytest.mark.parametrize(
    ("dataset", "change", "message"),
    [
        ("mrpc", {"label": 2}, r"row 1: the answer '2' is not among the choices \['0', '1'\]"),
        ("boolq", {"answer": "maybe"}, r"row 1: the answer 'maybe' is not among the choices"),
        ("mmlu", {"answer": "E"}, r"row 1: the answer 'E' is not among the choices A, B, C, D"),
        ("mmlu", {"answer": ""}, r"row 1: the answer '' is not among"),
        ("arc_easy", {"answerKey": "D"}, r"row 1: the answer 'D' is not among the choices 1, 2, 3"),
        ("hellaswag", {"label": ""}, r"row 1: the answer '' is not among the choices 0-3"),
        ("nq_open", {"answer": [" "]}, r"row 1: the answer is empty"),
        ("nq_open", {"answer": "Paris"}, r"row 1: column 'answer' must hold a list"),
        ("sst2", {"sentence": None}, r"row 1: column 'sentence' is null"),
    ],
)
def test_bad_record_is_named(tmp_path: Path, dataset: Any, change: dict[str, Any], message: str) -> None:
    put(tmp_path / "train.jsonl", [HUB[dataset] | change])
    with pytest.raises(SecuraError, match=rf"data\.tasks: task '{dataset}': .*train\.jsonl, {message}"):
        Benchmark(dataset, path=str(tmp_path), n_validation=0).rows("train")


def test_open_questions_keep_every_right_answer(tmp_path: Path) -> None:
    row = original(tmp_path, "triviaqa").rows("test")[0]
    assert (row.answer, row.aliases) == ("Shakespeare", ("William Shakespeare", "The Bard"))
    task = original(tmp_path / "web", "web_questions")
    assert task.rows("test")[0].aliases == ("Jaxon",)
    assert task.metric == "squad_exact"
    assert task.stop == ("\n",)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"init_args\.template: no field 'sentense'; did you mean 'sentence'"):
        Benchmark("sst2", template="{sentense}")
    with pytest.raises(ConfigError, match=r"init_args\.stop holds an empty text"):
        Benchmark("triviaqa", stop=[""])
    with pytest.raises(KeyError):
        Benchmark("sst3")  # type: ignore[arg-type]
    assert set(ORIGINAL) == set(HUB) == set(BENCHMARKS)
