"""Multiple choice by likelihood: which candidate answer does the model find most probable after the prompt?

    what all prompts of a batch begin with [1, p] --forward--> KV cache
                                                                 |  repeated for each row
    prompts, up to where the choices part [rows, t] --forward----+--> KV cache, p(tokens up to there)
                                                                 |  repeated for each choice that goes on
    rest of the choices [pairs, k] --forward---------------------+--> p(other tokens)

Nothing is read twice: an instruction that all rows share once a batch, a prompt once for all of its choices, and the
words that all choices begin with once too. Where choices are single tokens, the last pass falls away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.encode import common, encode_answers, pad_id, render_prompts
from secura_lightning.data.prompt import PromptFormat, as_format
from secura_lightning.data.rows import Row
from secura_lightning.evaluation.batching import (
    batches,
    call_cost,
    context_length,
    evaluating,
    read_prompts,
)


@dataclass(frozen=True, slots=True)
class _Question:
    """A row in tokens.

    Attributes:
        prompt: The prompt, then what all choices begin with.
        shared: How many tokens at its end are the choices'.
        tails: What is left of each choice; empty for a choice that all others go on from.
    """

    prompt: list[int]
    shared: int
    tails: list[list[int]]


def choice_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    form: PromptFormat | str = PromptFormat(),  # noqa: B008  # frozen
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[list[float]]:
    """Sum of log p(choice tokens | prompt) of every choice of every row, in fp32.

    Args:
        model: The model; its mode and random state are left as they were.
        tokenizer: Its tokenizer.
        rows: Rows with choices.
        form: How prompts and answers are joined.
        batch_size: Most (row, choice) pairs scored together; one row's choices always are.
        progress: Called with the number of rows after each batch.

    Returns:
        One list per row, parallel to its choices.
    """
    questions = _encode(tokenizer, rows, as_format(form), context_length(model))
    found: list[list[float]] = [[] for _ in rows]
    together = max(1, batch_size // max((len(row.choices) for row in rows), default=1))
    with evaluating(model) as device:
        cost = 2 * call_cost(device)
        for batch in batches([len(question.prompt) for question in questions], together, overhead=cost):
            asked = [questions[i] for i in batch]
            values = iter(_score(model, asked, pad_id(tokenizer), device).tolist())
            for i, question in zip(batch, asked, strict=True):
                found[i] = [next(values) for _ in question.tails]
            if progress:
                progress(len(batch))
    return found


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], form: PromptFormat, room: int | None
) -> list[_Question]:
    prompts = render_prompts(tokenizer, [row.prompt for row in rows], form)
    pairs = [(row.prompt, choice) for row in rows for choice in row.choices]
    encoded = iter(encode_answers(tokenizer, pairs, form))
    questions = []
    for row, rendered in zip(rows, prompts, strict=True):
        choices = [next(encoded) for _ in row.choices]
        longest = max(map(len, choices))
        prompt = rendered.cut(room and max(2, room - longest))
        shared = common(choices)
        questions.append(_Question(prompt + choices[0][:shared], shared, [ids[shared:] for ids in choices]))
    return questions


def _score(model: PreTrainedModel, asked: Sequence[_Question], pad: int, device: torch.device) -> Tensor:
    """Log-likelihood of each choice of each question, ``[pairs]`` of fp32 on the CPU."""
    keep = 1 + max(question.shared for question in asked)
    cache, logits, seen = read_prompts(model, [question.prompt for question in asked], keep, pad, device)
    logprobs = logits.float().log_softmax(-1)
    pairs = [(place, tail) for place, question in enumerate(asked) for tail in question.tails]
    owner = torch.tensor([place for place, _ in pairs], device=device)
    total = _shared_part(logprobs, asked, device)[owner]
    tails, mask = _right_pad([tail for _, tail in pairs], device)  # [pairs, k]
    if not tails.shape[1]:
        return total.cpu()
    total += logprobs[owner, -1].gather(1, tails[:, :1])[:, 0] * mask[:, 0]
    longer = torch.tensor([i for i, (_, tail) in enumerate(pairs) if len(tail) > 1], device=device)
    if len(longer):
        owner, tails, mask = owner[longer], tails[longer], mask[longer]
        cache.batch_select_indices(owner)
        seen = seen[owner]
        places = seen.sum(1, keepdim=True) + torch.arange(tails.shape[1] - 1, device=device)
        # The last token of a choice predicts nothing that counts, so it is not read.
        rest: Tensor = model(
            tails[:, :-1],
            attention_mask=torch.cat([seen, mask[:, :-1]], 1),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).logits
        chosen = rest.float().log_softmax(-1).gather(2, tails[:, 1:, None])[..., 0]  # [pairs, k - 1]
        total[longer] += (chosen * mask[:, 1:]).sum(1)
    return total.cpu()


def _shared_part(logprobs: Tensor, asked: Sequence[_Question], device: torch.device) -> Tensor:
    """Log-likelihood of what all choices of a question begin with, ``[rows]``."""
    total = logprobs.new_zeros(len(asked))
    width = logprobs.shape[1] - 1
    if width:
        ids = torch.tensor([[*[0] * (width - q.shared), *q.prompt[len(q.prompt) - q.shared :]] for q in asked])
        counts = torch.tensor([[place >= width - q.shared for place in range(width)] for q in asked])
        found = logprobs[:, :-1].gather(2, ids.to(device)[..., None])[..., 0]  # [rows, shared]
        total += (found * counts.to(device)).sum(1)
    return total


def _right_pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[b, k]``: what follows a sequence cannot be seen from it, so its id is any."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], dtype=torch.long, device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], dtype=torch.long)
    return ids, mask.to(device)


def pick_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    form: PromptFormat | str = PromptFormat(),  # noqa: B008  # frozen
    normalise: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """The most probable choice of every row; the first of equals.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Rows with choices.
        form: How prompts and answers are joined.
        normalise: Divide each log-likelihood by the choice's length in characters, as lm-eval's ``acc_norm`` does.
        batch_size: Most (row, choice) pairs scored together.
        progress: Called with the number of rows after each batch.
    """
    likelihoods = choice_likelihoods(model, tokenizer, rows, form, batch_size, progress)
    picked = []
    for row, values in zip(rows, likelihoods, strict=True):
        lengths = [max(1, len(choice)) if normalise else 1 for choice in row.choices]
        scores = [value / length for value, length in zip(values, lengths, strict=True)]
        picked.append(row.choices[scores.index(max(scores))])
    return picked
