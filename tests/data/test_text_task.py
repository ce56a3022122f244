"""Plain text as a task: documents of text files and tables, split, packed, scored by perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from secura_lightning.data.benchmark import check
from secura_lightning.data.rows import Row
from secura_lightning.data.stream import stream_rows
from secura_lightning.data.tasks.text import TextTask
from secura_lightning.data.tokenise import Tokeniser
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.evaluate import evaluate_task
from tests.data.layouts import put
from tests.evaluation.tiny import byte_tokenizer, tiny_llama

STORIES = [f"Tom has {i} cats. The cats sleep." for i in range(40)]


def texts(task: TextTask, split: Any) -> list[str]:
    return [row.answer for row in task.rows(split)]


@pytest.mark.parametrize("joined", ["\n\n", "\n<|endoftext|>\n"])
def test_a_text_file_is_split_into_documents_without_any_in_two_splits(tmp_path: Path, joined: str) -> None:
    put(tmp_path / "stories.txt", joined.join([*STORIES, STORIES[0], STORIES[0]]))
    task = TextTask("stories", path=str(tmp_path / "stories.txt"))
    train, validation, test = (texts(task, split) for split in ("train", "validation", "test"))
    assert len(test) == 4
    assert len(validation) == 2
    assert len(train) == 36
    assert set(train) | set(validation) | set(test) == set(STORIES)
    assert not set(train) & set(test)
    assert not set(train) & set(validation)
    assert train.count(STORIES[0]) == 3, "a document that occurs again stays where it is trained on"
    again = TextTask("stories", path=str(tmp_path / "stories.txt"))
    assert texts(again, "test") == test, "always the same documents"


def test_columns_of_a_table_make_the_document(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put(tmp_path / f"{split}.jsonl", [{"title": split, "meta": {"body": f"Text {i}."}} for i in range(3)])
    task = TextTask("mail", template="{title}: {meta.body}", path=str(tmp_path), n_validation=0)
    assert texts(task, "test") == ["test: Text 0.", "test: Text 1.", "test: Text 2."]
    assert [row.answer for row in stream_rows(task)] == texts(task, "train")
    assert not any(row.prompt for row in task.rows("train"))


def test_documents_are_packed_and_scored_by_their_perplexity(tmp_path: Path) -> None:
    put(tmp_path / "train.txt", "\n\n".join(STORIES))
    put(tmp_path / "test.txt", "\n\n".join(f"A dog {i} runs." for i in range(5)))
    task = TextTask("stories", path=str(tmp_path), n_validation=0)
    tokenizer, model = byte_tokenizer(), tiny_llama().eval()
    blocks = Tokeniser(tokenizer, 16).encode(task)
    assert set(blocks.lengths.tolist()) == {16}
    total, count = 0.0, 0
    for text in texts(task, "test"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids,
                             tokenizer.eos_token_id]])  # fmt: skip
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = evaluate_task(model, tokenizer, task)
    assert found.metric == "1/perplexity"
    assert found.n == 5
    assert math.isclose(found.value, math.exp(-total / count), rel_tol=1e-4)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", [{"text": "a"}, {"text": " "}])
    put(tmp_path / "test.jsonl", [{"text": "a"}])
    task = TextTask("mail", path=str(tmp_path), n_validation=0)
    with pytest.raises(SecuraError, match=r"task 'mail': .*train\.jsonl, row 2: the document is empty"):
        task.rows("train")
    with pytest.raises(ConfigError, match=r"task 'mail': give init_args\.path .* or init_args\.hub_id"):
        TextTask("mail")
    with pytest.raises(SecuraError, match="row 1: no column 'body'; the columns are text"):
        TextTask("mail", template="{body}", path=str(tmp_path), n_validation=0).rows("test")
    put(tmp_path / "one.txt", "One.\n\nOne.")
    with pytest.raises(SecuraError, match=r"0 of them with a text of their own; lower init_args\.n_test"):
        TextTask("mail", path=str(tmp_path / "one.txt")).rows("train")
    with pytest.raises(SecuraError, match="prompt is empty"):
        check(Row("1", "", "a document where a prompt must be"))


def test_documents_in_train_and_test_are_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put(tmp_path / f"{split}.txt", "\n\n".join([*STORIES[:3], f"Only in {split}."]))
    task = TextTask("stories", path=str(tmp_path), n_validation=0)
    task.rows("train")
    with pytest.warns(UserWarning, match="3 of 4 test documents are training documents too"):
        task.rows("test")
