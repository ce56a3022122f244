import json
import math
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secura_lightning import LoRAConfig, inject
from secura_lightning.callbacks import report
from secura_lightning.data.rows import Row
from secura_lightning.errors import SecuraError
from secura_lightning.evaluation import batching
from secura_lightning.evaluation.baselines import chance, majority
from secura_lightning.evaluation.evaluate import evaluate_probe, evaluate_task
from secura_lightning.evaluation.perplexity import perplexity
from secura_lightning.metrics.text import METRICS, row_score, score
from tests.evaluation.tiny import ListProbe, ListTask, byte_tokenizer, chain_llama, tiny_llama

# The model answers "go" to anything that ends in "?", nothing to the rest.
TALKS = {"?": " ", " ": "g", "g": "o"}
FREE = [Row("0", "a?", "go"), Row("1", "bb?", "stay"), Row("2", "c.", "go"), Row("3", "d?", "Go.")]
CLOSED = [
    Row("0", "a?", "go", ("go", "no")),
    Row("1", "b?", "no", ("go", "no")),
    Row("2", "c?", "no", ("no", "go")),
    Row("3", "d?", "go", ("no", "go")),
    Row("4", "e?", "go", ("no", "go")),
]


def test_free_answers_are_generated_and_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    found = evaluate_task(chain_llama(TALKS), tokenizer, ListTask("talk", FREE))
    assert [row.prediction for row in found.rows] == ["go", "go", "", "go"]
    assert [row.score for row in found.rows] == [1, 0, 0, 1]
    assert (found.value, found.n, found.metric, found.task) == (0.5, 4, "exact", "talk")
    assert found.interval == (0.0, 1.0)
    assert found.chance is None
    assert found.majority is None


def test_choices_are_scored_by_likelihood_beside_chance_and_majority(tokenizer: PreTrainedTokenizerFast) -> None:
    found = evaluate_task(chain_llama(TALKS), tokenizer, ListTask("pick", CLOSED, "accuracy"))
    assert [row.prediction for row in found.rows] == ["go"] * 5
    assert found.value == pytest.approx(0.6)
    assert found.chance == pytest.approx(0.5)
    assert found.majority == pytest.approx(0.6)


def test_scores_can_be_recomputed_from_the_rows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(str(i), f"say {i}", "abc") for i in range(9)]
    found = evaluate_task(model, tokenizer, ListTask("noise", rows, "chrf", max_new_tokens=9))
    assert [row.id for row in found.rows] == [row.id for row in rows]
    for row in found.rows:
        assert row.score == METRICS["chrf"](row.prediction, row.reference)


@pytest.mark.parametrize("metric", list(METRICS))
def test_every_score_can_be_recomputed_from_the_saved_predictions(
    metric: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [Row(str(i), f"say {i}", "abc" if i % 2 else "go", aliases=("a go",) * (i % 3)) for i in range(6)]
    found = evaluate_task(model, tokenizer, ListTask("noise", rows, metric, max_new_tokens=5))
    report.save_predictions(found.rows, tmp_path / "rows.jsonl")
    saved = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    answers = [[row["reference"], *row["aliases"]] for row in saved]
    for row, right in zip(saved, answers, strict=True):
        assert row["score"] == row_score(metric, row["prediction"], right, row["prompt"])
    predictions, sources = ([row[key] for row in saved] for key in ("prediction", "prompt"))
    assert found.value == score(metric, predictions, answers, sources)[0]
    assert found.interval is not None
    assert found.interval[0] <= found.value + 1e-9
    assert found.interval[1] >= found.value - 1e-9 or metric in ("bleu", "chrf", "macro_f1")


def test_any_of_a_rows_right_answers_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row("0", "a?", "stay", aliases=("Go.", "run")), Row("1", "b?", "stay")]
    found = evaluate_task(chain_llama(TALKS), tokenizer, ListTask("talk", rows))
    assert [row.score for row in found.rows] == [1, 0]
    assert found.rows[0].aliases == ("Go.", "run")


def test_stop_texts_end_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    task = ListTask("talk", FREE)
    task.stop = ("o",)
    assert [row.prediction for row in evaluate_task(chain_llama(TALKS), tokenizer, task).rows] == ["g", "g", "", "g"]


def test_limit_scores_the_same_rows_every_time(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(str(i), "a?", "go") for i in range(30)]
    task = ListTask("talk", rows)
    first, again = (evaluate_task(chain_llama(TALKS), tokenizer, task, limit=5) for _ in range(2))
    assert first == again
    assert first.n == len(first.rows) == 5


def test_text_task_scores_the_inverse_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    task = ListTask("text", [Row("0", "", "some text"), Row("1", "", "and more of it")], metric="exact")
    task.is_text = True
    found = evaluate_task(model, tokenizer, task)
    assert found.metric == "1/perplexity"
    assert found.value == pytest.approx(1 / perplexity(model, tokenizer, ["some text", "and more of it"])[0])
    assert found.interval is None


def test_task_without_rows_is_an_error(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SecuraError, match="task 'none' has no rows in its test split"):
        evaluate_task(model, tokenizer, ListTask("none", []))
    with pytest.raises(SecuraError, match="'facts' has neither rows nor texts"):
        evaluate_probe(model, tokenizer, ListProbe([]))


def test_probe_averages_kinds_not_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        Row("0", "a?", "Go.", kind="mixed"),
        Row("5", "f?", "no", ("go", "no"), kind="mixed"),
        Row("1", "b?", "go", ("go", "no", "do", "so"), kind="pick"),
        Row("2", "c?", "no", ("go", "no", "do", "so"), kind="pick"),
        Row("3", "d?", "no", ("go", "no", "do", "so"), kind="pick"),
        Row("4", "e?", "no", ("go", "no", "do", "so"), kind="pick"),
    ]
    model = chain_llama(TALKS)
    found = evaluate_probe(model, tokenizer, ListProbe(rows, ["go go go", "no"]))
    assert found.kinds == {"mixed": 0.5, "pick": 0.25}
    assert found.accuracy == pytest.approx(0.375)
    assert found.chance == pytest.approx((0.5 / 2 + 0.25) / 2)
    assert (found.perplexity, found.tokens) == perplexity(model, tokenizer, ["go go go", "no"])
    assert [row.prediction for row in found.rows] == ["go"] * 6


def test_probe_may_have_rows_or_texts_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert evaluate_probe(model, tokenizer, ListProbe(FREE)).perplexity is None
    found = evaluate_probe(model, tokenizer, ListProbe([], ["text"]))
    assert math.isnan(found.accuracy)
    assert found.perplexity is not None


def test_majority_class_is_the_label_where_labels_are_shared() -> None:
    labels = [Row(str(i), "p", answer, choices) for i, (answer, choices) in enumerate(
        [("yes", ("yes", "no")), ("yes", ("no", "yes")), ("yes", ("yes", "no")), ("no", ("yes", "no"))]
    )]  # fmt: skip
    assert majority(labels) == 0.75
    # without shared labels, it is the place of the answer
    places = [Row("0", "p", "a", ("a", "b")), Row("1", "p", "c", ("c", "d", "e", "f")), Row("2", "p", "h", ("g", "h"))]
    assert majority(places) == pytest.approx(2 / 3)
    assert chance(places) == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert chance([*places, Row("3", "p", "x")]) is None
    assert majority([]) is None


def test_baselines_are_given_in_the_metric_of_the_task() -> None:
    answers = ["a"] * 6 + ["b"] * 3 + ["c"]
    rows = [Row(str(i), "p", answer, ("a", "b", "c")) for i, answer in enumerate(answers)]
    assert majority(rows) == 0.6
    assert majority(rows, "macro_f1") == pytest.approx((2 * 6 / (10 + 6) + 0 + 0) / 3)  # by hand: F1 of a, b, c
    assert chance(rows) == pytest.approx(1 / 3)
    by_hand = [2 * (n / 3) / (10 / 3 + n) for n in (6, 3, 1)]
    assert chance(rows, "macro_f1") == pytest.approx(sum(by_hand) / 3)


def test_probe_gives_the_interval_of_its_accuracy(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(str(i), "a?", answer, kind=kind) for i, (answer, kind) in enumerate(
        [("go", "sure")] * 3 + [("go", "mixed"), ("no", "mixed"), ("no", "mixed"), ("no", "mixed")]
    )]  # fmt: skip
    found = evaluate_probe(chain_llama(TALKS), tokenizer, ListProbe(rows))
    assert found.accuracy == pytest.approx((1 + 0.25) / 2)
    assert found.interval is not None
    low, high = found.interval
    assert low == 0.5  # nothing of "mixed", all of "sure"
    assert found.accuracy < high < 1
    assert evaluate_probe(chain_llama(TALKS), tokenizer, ListProbe([], ["text"])).interval is None


def _scores() -> tuple[list[object], float]:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    mixed = [*FREE, *(Row(f"c{row.id}", row.prompt, row.answer, row.choices) for row in CLOSED)]
    probe = evaluate_probe(model, tokenizer, ListProbe(mixed[:1], ["one", "the second text", "three"]))
    assert probe.perplexity is not None
    return [evaluate_task(model, tokenizer, ListTask("mixed", mixed)), probe.rows, probe.tokens], probe.perplexity


def _worker(rank: int, world: int, port: int, wanted: tuple[list[object], float]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    scores, ppl = _scores()
    assert scores == wanted[0], (scores, wanted[0])
    assert ppl == pytest.approx(wanted[1], rel=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_what_one_gets() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (2, port, _scores()), nprocs=2)


def test_adapters_keep_their_weights_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    layers = list(inject(model, LoRAConfig(rank=2, norm="element", targets=["q_proj", "down_proj"])).layers.values())
    sizes = [layer.held_bytes() for layer in layers]
    monkeypatch.setattr(batching, "HELD_BUDGET", sum(sizes) - 1)
    with batching.evaluating(model):
        held = [layer._held is not None for layer in layers]
    assert sum(held) == len(layers) - 1
    assert not any(layer._held is not None for layer in layers)
