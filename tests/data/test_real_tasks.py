"""Real benchmarks from files in their original layouts, or the hub: what the model reads and is scored by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secura_lightning.data.rows import Row
from secura_lightning.data.tasks.gsm8k import GSM8K
from secura_lightning.data.tasks.logiqa import LogiQA
from secura_lightning.data.tasks.standard_cl import StandardCL
from secura_lightning.data.tasks.table import TableTask
from secura_lightning.errors import SecuraError
from tests.data.layouts import SCIENCE, SUMS, TEXTS, gsm8k, logiqa, news, put, trace


def test_science_reasons_are_trained_on_but_not_scored(tmp_path: Path) -> None:
    task = trace("ScienceQA", SCIENCE, "B\nIce is hard.")(tmp_path)
    assert task.rows("test") == [Row("test/1", SCIENCE, "B", ("A", "B"))]
    assert task.rows("validation") == [Row("validation/1", SCIENCE, "B", ("A", "B"))]


def test_every_validation_name_and_shape_is_read(tmp_path: Path) -> None:
    task = news(tmp_path)
    assert task.rows("validation")[0].answer == "Ja."
    assert task.rows("test") == [Row("test/1", task.rows("train")[0].prompt, "Guten Tag.")]
    assert [row.answer for row in logiqa(tmp_path / "logiqa").rows("validation")] == ["B", "D"]
    put(tmp_path / "flat" / "train.json", TEXTS)
    put(tmp_path / "flat" / "test.json", TEXTS)
    put(tmp_path / "flat" / "labels.json", ["Sports", "Business"])
    assert StandardCL(str(tmp_path / "flat"), "mine").rows("test")[1].choices == ("Sports", "Business")


@pytest.mark.parametrize(
    "columns", [("query", "correct_option", 1), ("question", "answer", "b"), ("query", "label", "1")]
)
def test_logiqa_conversions_are_read_too(tmp_path: Path, columns: tuple[str, str, Any]) -> None:
    question, answer, right = columns
    record = {"context": "c", question: "q?", "options": ["no", "yes"], answer: right}
    for name in ("train", "test"):
        put(tmp_path / f"{name}.jsonl", [record, record | {answer: 0}])
    rows = LogiQA(path=str(tmp_path), n_validation=0).rows("train")
    assert rows[0] == Row("train/1", "Passage: c\nQuestion: q?\nA. no\nB. yes\nAnswer:", "B", ("A", "B"))
    assert rows[1].answer == "A"


@pytest.mark.parametrize(
    ("record", "settings", "answer"),
    [
        ({"q": "?", "answerKey": "C", "choices": {"text": ["x", "y", "z"]}},
         {"answer": "answerKey", "choices": "choices.text", "answer_is": "letter"}, "z"),
        ({"q": "?", "answerKey": "2", "choices": {"text": ["x", "y", "z"]}},
         {"answer": "answerKey", "choices": "choices.text", "answer_is": "letter"}, "y"),
        ({"q": "?", "answer": True}, {"choices": ["no", "yes"], "answer_is": "index"}, "yes"),
        ({"q": "?", "label": 0}, {"answer": "label", "choices": ["no", "yes"], "answer_is": "index"}, "no"),
        ({"q": "?", "answer": "yes"}, {"choices": ["no", "yes"]}, "yes"),
        ({"q": "?", "answers": ["1", "one"]}, {"answer": "answers.0", "metric": "exact"}, "1"),
    ],
)  # fmt: skip
def test_table_maps_the_usual_layouts(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, Any], answer: str
) -> None:
    put(tmp_path / "train.jsonl", [record])
    task = TableTask("t", "{q}", path=str(tmp_path), n_validation=0, **settings)
    assert task.rows("train")[0].answer == answer


# ----------------------------------------------------------------------------------------------- splits and limits


def test_validation_is_held_out_of_train_and_always_the_same(tmp_path: Path) -> None:
    task = gsm8k(tmp_path, n_validation=5)
    train, held = task.rows("train"), task.rows("validation")
    assert (len(train), len(held)) == (25, 5)
    assert {row.id for row in train} | {row.id for row in held} == {f"train/{i}" for i in range(1, 31)}
    put(tmp_path / "train.jsonl", SUMS[::-1])  # neither the file's order nor the seed decides
    again = GSM8K(path=str(tmp_path), n_validation=5, seed=9).rows("validation")
    assert {row.prompt for row in again} == {row.prompt for row in held}
    more = GSM8K(path=str(tmp_path), n_validation=8).rows("validation")
    assert {row.prompt for row in held} < {row.prompt for row in more}
    none = GSM8K(path=str(tmp_path), n_validation=0)
    assert (len(none.rows("train")), none.rows("validation")) == (30, [])
    assert len(GSM8K(path=str(tmp_path)).rows("validation")) == 1  # one in twenty


def test_no_prompt_stands_on_both_sides_of_a_held_out_split(tmp_path: Path) -> None:
    put(tmp_path / "all.jsonl", [*SUMS, *SUMS[:20]])
    task = GSM8K(path=str(tmp_path / "all.jsonl"), n_validation=4, n_test=6)
    parts = {split: [row.prompt for row in task.rows(split)] for split in ("train", "validation", "test")}
    assert {split: len(prompts) for split, prompts in parts.items()} == {"train": 40, "validation": 4, "test": 6}
    assert not set(parts["train"]) & (set(parts["validation"]) | set(parts["test"]))
    with pytest.raises(
        SecuraError, match=r"11 test rows cannot be held out of 50 rows, 10 of them .* lower init_args\.n_test"
    ):
        GSM8K(path=str(tmp_path / "all.jsonl"), n_validation=4, n_test=11).rows("train")


def test_shards_of_a_split_are_read_one_after_another(tmp_path: Path) -> None:
    put(tmp_path / "train-00001-of-00002.jsonl", SUMS[20:])
    put(tmp_path / "train-00000-of-00002.jsonl", SUMS[:20])
    put(tmp_path / "test-00000-of-00001.jsonl", SUMS[:1])
    rows = GSM8K(path=str(tmp_path), n_validation=0).rows("train")
    assert [row.prompt.split()[3] for row in rows] == [str(n) for n in range(1, 31)]


def test_limits_draw_a_seeded_subset_in_order(tmp_path: Path) -> None:
    def ids(**changes: Any) -> list[int]:
        return [int(row.id.removeprefix("train/")) for row in gsm8k(tmp_path, n_validation=0, **changes).rows("train")]

    few = ids(n_train=10)
    assert len(set(few)) == 10
    assert few == sorted(few)
    assert few == ids(n_train=10)
    assert few != ids(n_train=10, seed=1)
    assert set(few) < set(ids(n_train=20))
    with pytest.warns(UserWarning, match="n_train=99, but there are only 30 rows"):
        assert len(ids(n_train=99)) == 30


def test_long_answers_are_left_out_of_training_and_counted(tmp_path: Path) -> None:
    rows = [{"q": str(i), "a": "word " * (1 + i % 3)} for i in range(30)]
    put(tmp_path / "train.jsonl", rows)
    put(tmp_path / "test.jsonl", [{"q": f"t{row['q']}", "a": row["a"]} for row in rows])
    task = TableTask(
        "t", "{q}", "a", metric="exact", path=str(tmp_path), max_answer_words=2, n_train=20, n_validation=0
    )
    with pytest.warns(UserWarning, match=r"left out \d+ rows with more than 2 words"):
        assert len(task.rows("train")) == 20
    assert len(task.rows("test")) == 30


def test_prompts_in_train_and_test_are_counted(tmp_path: Path) -> None:
    task = gsm8k(tmp_path, n_validation=0)
    task.rows("train")
    with pytest.warns(UserWarning, match="2 of 2 test prompts are training prompts too"):
        task.rows("test")


# ----------------------------------------------------------------------------------------------------------- the hub


def test_hub_dataset_is_asked_for_at_its_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, split: str, revision: str) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(SUMS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = GSM8K(n_train=3, n_validation=0)
    assert len(task.rows("train")) == 3
    assert task.rows("train")[0].prompt.startswith("Question: Ann has")
    assert len(task.rows("test")) == 30
    own = ("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee")
    assert asked == [(*own[:2], "train", own[2]), (*own[:2], "test", own[2])]
    GSM8K(hub_id="me/sums", splits={"train": "all"}, n_test=4).rows("test")  # a dataset of one split is divided
    assert asked[2:] == [("me/sums", None, "all", "main")]


def test_unreachable_hub_says_how_to_go_on() -> None:
    with pytest.raises(
        SecuraError, match=r"cannot reach the hub for openai/gsm8k .* set init_args\.path to local files"
    ):
        GSM8K().rows("train")
