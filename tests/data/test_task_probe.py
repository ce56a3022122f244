"""Benchmarks as a base-knowledge probe, WikiText-2, and strides: through evaluation, against computing it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secura_lightning.data import probe as module
from secura_lightning.data.probe import TaskProbe, TextProbe, WikiText2
from secura_lightning.data.rows import Row
from secura_lightning.errors import ConfigError, SecuraError
from secura_lightning.evaluation.evaluate import evaluate_probe
from secura_lightning.evaluation.perplexity import perplexity
from tests.data.layouts import put
from tests.data.originals import original
from tests.evaluation.tiny import ListTask, byte_tokenizer, chain_llama, tiny_llama

WIKI = " \n = First = \n \n One . \n = = Part = = \n Two . \n \n = Second = \n \n Three . \n"


def test_every_task_is_a_kind_scored_by_its_own_metric(tmp_path: Path) -> None:
    questions = ListTask("open", [Row("0", "a?", "the go"), Row("1", "b?", "no", aliases=("Go!",))], "squad_exact")
    numbers = ListTask("numbers", [Row("0", "c?", "go")], "exact")
    found = evaluate_probe(
        chain_llama({"?": " ", " ": "g", "g": "o"}), byte_tokenizer(), TaskProbe([questions, numbers])
    )
    assert found.kinds == {"open": 1.0, "numbers": 1.0}  # "the go" is "go" to squad_exact alone
    assert [row.id for row in found.rows] == ["open/0", "open/1", "numbers/0"]
    assert found.perplexity is None


def test_benchmarks_and_text_share_a_probe(tmp_path: Path) -> None:
    put(tmp_path / "text.txt", "some text")
    tasks: Any = [original(tmp_path / name, name) for name in ("boolq", "arc_easy", "nq_open")]
    probe = TaskProbe(tasks, TextProbe(str(tmp_path / "text.txt"), window=6, stride=2))
    assert {row.kind for row in probe.rows()} == {"boolq", "arc_easy", "nq_open"}
    assert probe.rows() is probe.rows()
    model, tokenizer = tiny_llama(), byte_tokenizer()
    found = evaluate_probe(model, tokenizer, probe)
    assert set(found.kinds) == {"boolq", "arc_easy", "nq_open"}
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert (found.perplexity, found.tokens) == perplexity(model, tokenizer, ["some text"], max_length=6, stride=2)
    assert found.perplexity != perplexity(model, tokenizer, ["some text"])[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskProbe([]), "tasks is empty"),
        (lambda: TaskProbe([ListTask("a", []), ListTask("a", [])]), "init_args.name of the tasks must differ, got 'a'"),
        (lambda: TaskProbe([ListTask("a", [], "chrf")]), "metrics of single rows"),
        (lambda: TextProbe("x", window=1), "window is 1"),
        (lambda: WikiText2(window=8, stride=8), "stride is 8; it must be at least 1 and below"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_wikitext_is_one_document_or_its_articles(tmp_path: Path) -> None:
    put(tmp_path / "wiki.test.raw", WIKI)
    path = str(tmp_path / "wiki.test.raw")
    assert WikiText2(path).texts() == [WIKI.strip("\n")]
    articles = WikiText2(path, "articles").texts()
    assert [text.splitlines()[0].strip() for text in articles] == ["= First =", "= Second ="]
    assert "= = Part = =" in articles[0]
    assert WikiText2(path).rows() == []
    put(tmp_path / "empty.raw", " \n")
    with pytest.raises(SecuraError, match=r"data\.probe: .*empty\.raw holds no text"):
        WikiText2(str(tmp_path / "empty.raw")).texts()


def test_lines_of_the_hub_are_joined_as_published_perplexities_join_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": ""}, {"text": " = First = \n"}, {"text": " One . \n"}]
    asked: list[Any] = []
    monkeypatch.setattr(module, "load_hub", lambda *wanted: asked.append(wanted) or lines)
    assert WikiText2().texts() == [" = First = \n\n\n One . "]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "b08601e04326c79dfdd32d625aee71d232d685c3")]
    put(tmp_path / "test.jsonl", lines)
    assert WikiText2(str(tmp_path / "test.jsonl")).texts() == WikiText2().texts()
