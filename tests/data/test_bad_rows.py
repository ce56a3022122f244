"""Bad data and bad settings of the real tasks: one line that names the task, the place and the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from secura_lightning.data.benchmark import BenchmarkTask, check
from secura_lightning.data.catalogue import BENCHMARKS
from secura_lightning.data.encode import encode_rows
from secura_lightning.data.rows import Row
from secura_lightning.data.stream import stream_rows
from secura_lightning.data.tasks.benchmark import Benchmark
from secura_lightning.data.tasks.cnn_dailymail import CNNDailyMail
from secura_lightning.data.tasks.gsm8k import GSM8K
from secura_lightning.data.tasks.logiqa import LogiQA, read_blocks
from secura_lightning.data.tasks.news_de import NewsDE
from secura_lightning.data.tasks.standard_cl import StandardCL
from secura_lightning.data.tasks.table import TableTask
from secura_lightning.data.tasks.trace import Trace
from secura_lightning.errors import ConfigError, SecuraError
from tests.data.layouts import LOGIQA, TEXTS, put


def one(folder: Path, task: Callable[[str], BenchmarkTask], *records: dict[str, Any]) -> BenchmarkTask:
    put(folder / "train.jsonl", list(records))
    put(folder / "test.jsonl", list(records))
    return task(str(folder))


GOOD = {"question": "1+1?", "answer": "2\n#### 2"}
LABELS: dict[str, Any] = {"choices": ["yes", "no"], "n_validation": 0}


@pytest.mark.parametrize(
    ("make", "records", "message"),
    [
        (lambda p: GSM8K(path=p), [GOOD, {"question": "x", "answer": ""}], r"row 2: the answer is empty; fill it"),
        (lambda p: GSM8K(path=p), [GOOD, {"question": "x", "answer": "2"}], r"row 2: the answer does not end in '####"),
        (lambda p: GSM8K(path=p), [GOOD, {"question": "x", "answer": None}], r"row 2: column 'answer' is null"),
        (lambda p: GSM8K(path=p), [GOOD, {"question": float("nan"), "answer": "2\n#### 2"}],
         r"row 2: column 'question' is nan"),
        (lambda p: GSM8K(path=p), [{"qestion": "x", "answer": "#### 1"}], r"no column 'question'; .*'qestion'\?"),
        (lambda p: CNNDailyMail(path=p), [{"article": " ", "highlights": "x"}], r"row 1: the prompt is empty"),
        (lambda p: NewsDE(path=p), [{"EN": "x", "de": "y"}], r"row 1: no column 'en'; did you mean 'EN'\?"),
        (lambda p: LogiQA(path=p), [{"context": "c", "query": "q", "options": ["a", "b"], "label": 2}],
         r"row 1: the answer 2 is not among the choices: a letter A-B, or an index 0-1"),
        (lambda p: LogiQA(path=p), [{"context": "c", "query": "q", "options": "ab", "label": 2}], r"must be a list"),
        (lambda p: TableTask("t", "{q}", path=p, **LABELS),
         [{"q": "x", "answer": "yes"}, {"q": "y", "answer": "maybe"}],
         r"train\.jsonl, row 2: the answer 'maybe' is not among the choices \['yes', 'no'\]"),
        (lambda p: TableTask("t", "{q}", path=p, answer_is="index", **LABELS), [{"q": "x", "answer": 2}],
         r"the answer '2' is no index of one of 2 choices"),
        (lambda p: TableTask("t", "{q}", choices="opts", path=p), [{"q": "x", "answer": "a", "opts": "a|b"}],
         r"column 'opts' must hold a list of choices"),
        (lambda p: TableTask("t", "{q}", choices="opts", path=p), [{"q": "x", "answer": "a", "opts": ["a", "a"]}],
         r"choices must be two or more, all different"),
        (lambda p: Trace(p, "FOMC"), [{"prompt": "x", "answer": "D"}], r"row 1: the answer 'D' is not among"),
        (lambda p: StandardCL(p, "agnews"), TEXTS, r"agnews': no file or folder [^,]*/labels\.json"),
    ],
)  # fmt: skip
def test_bad_row_is_named_by_task_file_and_number(
    tmp_path: Path, make: Callable[[str], BenchmarkTask], records: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(SecuraError, match=f"^data.tasks: task '.*{message}"):
        one(tmp_path, make, *records).rows("train")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LOGIQA.replace("C. Tom reads.\n", ""), 1),
        (LOGIQA.replace("D\nSome", "e\nSome"), 9),
        (LOGIQA.replace("D.No bird swims.", ""), 9),
        (LOGIQA.lstrip(), 1),
    ],
)
def test_broken_logiqa_block_is_named_by_line(tmp_path: Path, text: str, line: int) -> None:
    put(tmp_path / "Train.txt", text)
    with pytest.raises(SecuraError, match=rf"Train\.txt, line {line}: no LogiQA question starts here"):
        LogiQA(path=str(tmp_path)).rows("train")


def shards(folder: Path, bad: dict[str, Any]) -> BenchmarkTask:
    """Two training files of four and five rows, the last of which is bad."""
    rows = [{"q": str(i), "answer": "x"} for i in range(8)]
    put(folder / "train-00000-of-00002.jsonl", rows[:4])
    put(folder / "train-00001-of-00002.jsonl", [*rows[4:], bad])
    put(folder / "test.jsonl", rows)
    return TableTask("t", "{q}", path=str(folder), metric="exact", n_validation=0)


@pytest.mark.parametrize("bad", [{"q": "y", "answer": None}, {"q": "y", "answer": " "}])
def test_bad_row_of_a_shard_is_named_by_that_shard(tmp_path: Path, bad: dict[str, Any]) -> None:
    task = shards(tmp_path, bad)
    for rows in (task.rows, lambda _: list(stream_rows(task))):
        with pytest.raises(SecuraError, match=r"task 't': .*train-00001-of-00002\.jsonl, row 5: "):
            rows("train")
    assert task.source.place("train", 3).endswith("train-00000-of-00002.jsonl, row 4")


def test_missing_and_ambiguous_files_are_named(tmp_path: Path) -> None:
    put(tmp_path / "trace" / "FOMC" / "train.json", [])
    for make, message in (
        (lambda: GSM8K(path=str(tmp_path / "gsm8k")), r"no file or folder .*gsm8k; the folder holds trace"),
        (lambda: Trace(str(tmp_path / "trace"), "C-STANCE"), r"no file or folder .*C-STANCE; the folder holds FOMC"),
        (lambda: GSM8K(path=str(tmp_path / "trace")), r"trace holds no train file \(train with \.jsonl.*\), but FOMC"),
        (lambda: Trace(str(tmp_path / "trace"), "FOMC"), r"train\.json holds no rows"),
    ):
        with pytest.raises(SecuraError, match=message):
            make().rows("train")
    put(tmp_path / "two" / "train.jsonl", [GOOD])
    put(tmp_path / "two" / "train.json", [GOOD])
    with pytest.raises(
        SecuraError, match=r"holds train\.json and train\.jsonl; name the one .*splits: \{train: FILE\}"
    ):
        GSM8K(path=str(tmp_path / "two")).rows("train")
    named = GSM8K(path=str(tmp_path / "two"), splits={"train": "train.json"}, n_validation=0)
    assert len(named.rows("train")) == 1
    with pytest.raises(SecuraError, match=r"two holds no test file"):
        named.rows("test")


def test_names_of_files_do_not_go_with_one_file(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", [GOOD] * 9)
    task = GSM8K(path=str(tmp_path / "a.jsonl"), splits={"test": "b.jsonl"})
    with pytest.raises(ConfigError, match=r"task 'gsm8k': init_args\.splits names files of a folder, .* give"):
        task.rows("test")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableTask("t", "{q}", path="x", choices=[True, False]),
         r"^task 't': init_args\.choices: YAML reads a label as the truth value True; quote them all"),
        (lambda: TableTask("t", "{q}", path="x", choices=["one", 2]), r"as the number 2; quote them all"),
        (lambda: GSM8K(template="{qestion}? "), r"task 'gsm8k': init_args\.template ends in white space"),
        (lambda: LogiQA(template="{passage}"), r"init_args\.template: no field 'passage'; the fields are context"),
        (lambda: GSM8K(path="x", hub_id="y"), r"init_args\.path and init_args\.hub_id .* keep one"),
        (lambda: GSM8K(n_train=0), r"init_args\.n_train is 0; it must be at least 1"),
        (lambda: CNNDailyMail(max_words=0), r"init_args\.max_words is 0"),
        (lambda: TableTask("t", "{q}", path="x"), r"init_args\.metric is missing"),
        (lambda: TableTask("t", "{q}", path="x", metric="exact", answer_is="index"), r"needs init_args\.choices"),
        (lambda: TableTask("t", "{q}", metric="exact"), r"give init_args\.path .* or init_args\.hub_id"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_data_is_read(make: Callable[[], BenchmarkTask], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_task_without_rows_after_filtering_says_why(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", [GOOD, GOOD | {"question": "3+3?"}])
    task = GSM8K(path=str(tmp_path), max_answer_words=1, n_validation=0)
    with (
        pytest.warns(UserWarning, match="left out 2 rows with more than 1 words"),
        pytest.raises(SecuraError, match=r"train\.jsonl: none of 2 train rows is left: all 2 .* max_answer_words=1"),
    ):
        task.rows("train")


def test_wrongly_encoded_file_is_named_by_line_through_the_task(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "1+1?", "answer": "#### 2"}\n{"question": "caf\xe9"}\n')
    with pytest.raises(SecuraError, match=r"task 'gsm8k': .*train\.jsonl, line 2: byte \d+ \(0xe9\) is not UTF-8"):
        GSM8K(path=str(tmp_path)).rows("train")


def test_row_whose_labels_would_all_be_masked_is_refused_with_its_number(tmp_path: Path) -> None:
    # A tokenizer that has no token for the answer's letters, the space before it, or the end of a sequence.
    letters = {letter: i for i, letter in enumerate("1+?=:QuestionAwr\n")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=letters, merges=[])))
    task = one(
        tmp_path, lambda p: TableTask("t", "{q}", path=p, metric="exact", n_validation=0), {"q": "1+1?", "answer": "zz"}
    )
    (row,) = task.rows("train")
    with pytest.raises(SecuraError, match=r"row train/1: .* no token of the answer 'zz', so none would be trained"):
        encode_rows(tokenizer, [row], 32)


NAMES: Any = list(BENCHMARKS)
TASKS: list[BenchmarkTask] = [
    GSM8K(), GSM8K(answer_only=True), CNNDailyMail(max_words=3), NewsDE(), LogiQA(), LogiQA(answers="text"),
    Trace("x", "FOMC"), Trace("x", "ScienceQA"), StandardCL("x", "agnews"),
    TableTask("t", "{question}{lettered_choices}", path="x", choices="options", answer_is="letter"),
    TableTask("t", "{question}", path="x", choices=["{context}", "no"], answer_is="index"),
    TableTask("t", "{options.0}", "{context}/{answer}", path="x", metric="exact"),
    *(Benchmark(name, path="x") for name in NAMES),
]  # fmt: skip
COLUMNS = (
    "question", "answer", "article", "highlights", "en", "de", "translation", "context", "options", "choices",
    "answerKey", "answers", "targetValue", "endings", "ctx_a", "ctx_b", "activity_label", "passage", "subject",
    "sentence1", "sentence2", "polarity", "text", "A", "B", "C", "D",
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(["A", "b", "2", "9" * 5000, "x #### 1"])
)
ITEM = st.one_of(SCALAR, st.dictionaries(st.sampled_from(["text", "label"]), SCALAR))
FIELD = st.sampled_from(["en", "de", "0", "text", "label", "stem", "choices", "value", "aliases"])
VALUE = st.one_of(
    SCALAR, st.lists(SCALAR, max_size=3), st.dictionaries(FIELD, st.one_of(SCALAR, st.lists(ITEM, max_size=3)))
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(TASKS), st.dictionaries(st.sampled_from([*COLUMNS, "prompt", "sentence", "label"]), VALUE))
def test_any_record_is_a_row_or_a_clear_error(task: BenchmarkTask, record: dict[str, Any]) -> None:
    try:
        row = task.to_row("train/1", record, "train")
        if row is not None:
            check(row)
    except SecuraError:
        return
    if row is None:  # the benchmark leaves such records out
        return
    assert isinstance(row, Row)
    assert row.prompt
    assert row.answer
    assert not row.choices or row.answer in row.choices


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(["", "a", "A.x", "text"])).map("\n".join)))
def test_any_bytes_are_logiqa_records_or_a_clear_error(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "Train.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        records = read_blocks(path)
    except SecuraError:
        return
    assert records
    assert all(len(record["options"]) == 4 for record in records)
