"""A text file as base knowledge: perplexity without questions, through evaluation and report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from secura_lightning.callbacks import report
from secura_lightning.data.probe import PocketProbe, Probe, TextProbe
from secura_lightning.errors import SecuraError
from secura_lightning.evaluation.evaluate import ProbeScore, evaluate_probe
from secura_lightning.evaluation.perplexity import perplexity
from tests.data.layouts import put
from tests.evaluation.tiny import byte_tokenizer, tiny_llama

STORY = "A cat sat.\n\nIt slept.\n"


@pytest.mark.parametrize(
    ("text", "documents", "found"),
    [
        (STORY, "file", [STORY.strip()]),
        (STORY, "blocks", ["A cat sat.", "It slept."]),
        ("one\n\nmore<|endoftext|>two", "file", ["one\n\nmore", "two"]),
    ],
)
def test_text_probe_holds_documents_and_no_questions(
    tmp_path: Path, text: str, documents: Any, found: list[str]
) -> None:
    put(tmp_path / "text.txt", text)
    probe = TextProbe(str(tmp_path / "text.txt"), documents)
    assert isinstance(probe, Probe)
    assert probe.texts() == found
    assert probe.rows() == []
    assert PocketProbe().rows()


def test_text_probe_names_what_is_wrong(tmp_path: Path) -> None:
    put(tmp_path / "empty.txt", " \n")
    with pytest.raises(SecuraError, match=r"data\.probe: .*empty\.txt holds no text"):
        TextProbe(str(tmp_path / "empty.txt")).texts()
    with pytest.raises(SecuraError, match=r"data\.probe: no file or folder .*emty\.txt; did you mean 'empty\.txt'"):
        TextProbe(str(tmp_path / "emty.txt")).texts()


def test_probe_of_text_alone_is_reported_without_accuracy(tmp_path: Path) -> None:
    put(tmp_path / "text.txt", STORY)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    score = evaluate_probe(model, tokenizer, TextProbe(str(tmp_path / "text.txt")))
    assert (score.perplexity, score.tokens) == perplexity(model, tokenizer, [STORY.strip()])
    assert (score.kinds, score.n, score.chance, score.rows) == ({}, 0, None, [])
    assert math.isnan(score.accuracy)
    content = report.build([measured(0, score), measured(1, score)], ["a"], {})
    assert content["base_knowledge"]["accuracy"] == [None, None]
    assert content["base_knowledge"]["perplexity"] == [score.perplexity] * 2
    assert content["base_knowledge"]["kinds"] == {}
    assert content["metrics"]["base_retention"] is None
    report.save(content, tmp_path)
    header, base, _ = (tmp_path / "continual.csv").read_text().splitlines()
    assert header == "after,step,a,base/accuracy,base/perplexity"
    assert base == f"base,0,0.5,,{score.perplexity}"
    assert f"{score.perplexity:.2f}" in report.table(content)


def measured(after: int, score: ProbeScore) -> report.Measurement:
    cell = {"metric": "exact", "value": 0.5, "n": 1, "interval": [0.0, 1.0], "chance": None, "majority": None}
    return {"after": after, "step": after, "tasks": [cell], "base": report.base_of(score)}
