"""Scores of one model on a task's rows and on the base-knowledge probe.

    rows -> this rank's share -> likelihood of choices | greedy answers -> gathered on all ranks -> metric, interval

Every score comes with what it must be read against: the chance and majority-class values of a classification, in its
own metric (:mod:`secura_lightning.evaluation.baselines`), and a bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.probe import Probe
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.data.rows import Row
from secura_lightning.data.task import Split, Task
from secura_lightning.errors import SecuraError
from secura_lightning.evaluation.baselines import answers_of, chance, guess, majority
from secura_lightning.evaluation.batching import gather, shard, subset
from secura_lightning.evaluation.choices import pick_choices
from secura_lightning.evaluation.generate import generate
from secura_lightning.evaluation.perplexity import perplexity_of, token_loss
from secura_lightning.metrics.text import bootstrap, bootstrap_mean, row_score, score

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a model made of one row; enough to recompute its score.

    Attributes:
        id: The row's id.
        kind: Its kind of knowledge; empty outside a probe.
        prompt: What the model was given.
        reference: The right answer.
        prediction: The model's.
        score: The row's score in 0..1.
        aliases: Other right answers.
    """

    id: str
    kind: str
    prompt: str
    reference: str
    prediction: str
    score: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A model's score on one task.

    Attributes:
        task: The task's name.
        metric: Its metric.
        value: The score in 0..1.
        n: Rows scored.
        interval: 95 % bootstrap interval of ``value``.
        chance: Expected score of guessing among the choices; None without choices.
        majority: Score of always giving the most frequent answer; None without choices.
        rows: One result per row; empty for text tasks.
    """

    task: str
    metric: str
    value: float
    n: int
    interval: tuple[float, float] | None = None
    chance: float | None = None
    majority: float | None = None
    rows: list[RowResult] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, Any]:
        """Everything but the rows and the task's name, as plain values."""
        return {
            "metric": self.metric,
            "value": self.value,
            "n": self.n,
            "interval": None if self.interval is None else list(self.interval),
            "chance": self.chance,
            "majority": self.majority,
        }


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """What is left of the base knowledge.

    Attributes:
        probe: The probe's name.
        kinds: Accuracy per kind of knowledge; empty for a probe of text alone.
        accuracy: Mean over kinds; NaN without any.
        perplexity: Token-weighted perplexity of the probe's text; None without text.
        n: Rows scored.
        tokens: Tokens that the perplexity is weighted by.
        chance: Accuracy of guessing, mean over kinds; rows without choices count 0. None without rows.
        interval: 95 % bootstrap interval of ``accuracy``, rows drawn within their kind; None without rows.
        rows: One result per row.
    """

    probe: str
    kinds: dict[str, float]
    accuracy: float
    perplexity: float | None
    n: int
    tokens: int
    chance: float | None
    interval: tuple[float, float] | None = None
    rows: list[RowResult] = field(default_factory=list, repr=False)


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    split: Split = "test",
    limit: int | None = None,
    batch_size: int = 64,
    normalise: bool = False,
    progress: Progress | None = None,
) -> TaskScore:
    """Score a model on one split of a task.

    Rows with choices are answered by likelihood, the others by greedy generation. A text task's score is
    1 / perplexity, the geometric mean of its tokens' probabilities. Under distributed training every rank must call
    this; all of them get the same result.

    Args:
        model: The model; its mode and random state are left as they were.
        tokenizer: Its tokenizer.
        task: The task.
        split: Which of its rows.
        limit: Score only this many rows, always the same ones; None for all.
        batch_size: Sequences computed together.
        normalise: Divide the likelihood of choices by their length.
        progress: Called with the number of rows done, as they are done on this rank.

    Raises:
        SecuraError: The split has no rows.
    """
    name = task.name
    rows = subset(task.rows(split), limit)
    if not rows:
        raise SecuraError(f"task '{name}' has no rows in its {split} split, so it cannot be scored")
    if task.is_text:
        ppl, tokens = _perplexity(model, tokenizer, [row.answer for row in rows], batch_size, progress)
        return TaskScore(name, "1/perplexity", 1 / ppl if tokens else float("nan"), len(rows))
    answering = Answering(task.prompt_format, task.max_new_tokens, task.stop, batch_size, normalise, progress)
    predictions = _answer(model, tokenizer, rows, answering)
    references = [answers_of(row) for row in rows]
    value, scores = score(task.metric, predictions, references, [row.prompt for row in rows])
    interval = bootstrap(task.metric, predictions, references, scores)
    results = _results(rows, predictions, scores)
    guesses = chance(rows, task.metric), majority(rows, task.metric)
    return TaskScore(name, task.metric, value, len(rows), interval, *guesses, results)


def evaluate_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    limit: int | None = None,
    batch_size: int = 64,
    normalise: bool = False,
    progress: Progress | None = None,
) -> ProbeScore:
    """Score a model on the base-knowledge probe.

    Under distributed training every rank must call this; all of them get the same result.

    Args:
        model: The model; its mode and random state are left as they were.
        tokenizer: Its tokenizer.
        probe: The probe.
        limit: Score at most this many rows (spread evenly over kinds) and documents; None for all.
        batch_size: Sequences computed together.
        normalise: Divide the likelihood of choices by their length.
        progress: Called with the number of rows or documents done, as they are done on this rank.

    Raises:
        SecuraError: The probe has neither rows nor texts.
    """
    rows = subset(probe.rows(), limit)
    texts = [row.answer for row in subset([Row(str(i), "", text) for i, text in enumerate(probe.texts())], limit)]
    if not rows and not texts:
        raise SecuraError(f"data.probe: '{probe.name}' has neither rows nor texts")
    answering = Answering(probe.prompt_format, probe.max_new_tokens, probe.stop, batch_size, normalise, progress)
    predictions = _answer(model, tokenizer, rows, answering)
    scores = [
        row_score(probe.metric(row), prediction, answers_of(row), row.prompt)
        for row, prediction in zip(rows, predictions, strict=True)
    ]
    kinds = {kind: [i for i, row in enumerate(rows) if row.kind == kind] for kind in sorted({row.kind for row in rows})}
    accuracies = {kind: float(np.mean([scores[i] for i in members])) for kind, members in kinds.items()}
    guesses = [float(np.mean([guess(rows[i]) for i in members])) for members in kinds.values()]
    interval = bootstrap_mean([[scores[i] for i in members] for members in kinds.values()]) if kinds else None
    ppl, tokens = _perplexity(model, tokenizer, texts, batch_size, progress, probe.window, probe.stride)
    return ProbeScore(
        probe=probe.name,
        kinds=accuracies,
        accuracy=float(np.mean(list(accuracies.values()))) if accuracies else float("nan"),
        perplexity=ppl if texts else None,
        n=len(rows),
        tokens=tokens,
        chance=float(np.mean(guesses)) if guesses else None,
        interval=interval,
        rows=_results(rows, predictions, scores),
    )


@dataclass(frozen=True, slots=True)
class Answering:
    """How rows are answered.

    Attributes:
        form: How prompts and answers are joined.
        max_new_tokens: Longest generated answer, in tokens.
        stop: Texts that end a generated answer and are no part of it.
        batch_size: Sequences computed together.
        normalise: Divide the likelihood of choices by their length.
        progress: Called with the number of rows done.
    """

    form: PromptFormat
    max_new_tokens: int
    stop: tuple[str, ...]
    batch_size: int
    normalise: bool
    progress: Progress | None


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], how: Answering
) -> list[str]:
    """One answer per row, in order; each rank works on its share."""
    mine = shard(rows, model)
    answers = [""] * len(mine)
    closed = [i for i, row in enumerate(mine) if row.choices]
    if closed:
        questions = [mine[i] for i in closed]
        picked = pick_choices(model, tokenizer, questions, how.form, how.normalise, how.batch_size, how.progress)
        for i, text in zip(closed, picked, strict=True):
            answers[i] = text
    free = [i for i, row in enumerate(mine) if not row.choices]
    if free:
        prompts = [mine[i].prompt for i in free]
        texts = generate(
            model, tokenizer, prompts, how.max_new_tokens, how.batch_size, how.progress, how.stop, how.form
        )
        for i, text in zip(free, texts, strict=True):
            answers[i] = text
    return gather(answers, model)


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    progress: Progress | None,
    window: int | None = None,
    stride: int | None = None,
) -> tuple[float, int]:
    mine = shard(texts, model)
    # One pair per rank, summed in rank order everywhere: all ranks hold the same value to the last bit.
    sums = gather([token_loss(model, tokenizer, mine, batch_size, window, stride)], model)
    if progress:
        progress(len(mine))
    return perplexity_of(sum(loss for loss, _ in sums), sum(tokens for _, tokens in sums))


def _results(rows: Sequence[Row], predictions: Sequence[str], scores: Sequence[float]) -> list[RowResult]:
    return [
        RowResult(row.id, row.kind, row.prompt, row.answer, prediction, value, row.aliases)
        for row, prediction, value in zip(rows, predictions, scores, strict=True)
    ]
