"""Multiple choice by likelihood: which candidate answer does the model find most probable after the prompt?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.encode import encode_answer, encode_prompt, pad_id
from secura_lightning.data.rows import Row
from secura_lightning.evaluation.batching import batches, context_length, evaluating, fit, left_pad


def choice_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    separator: str = " ",
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[list[float]]:
    """Sum of log p(choice tokens | prompt) of every choice of every row, in fp32.

    All (row, choice) pairs form one list, sorted by length. Choices share the right edge of a left-padded batch, so
    that logits are computed for the longest choice's positions only.

    Args:
        model: The model; its mode and random state are left as they were.
        tokenizer: Its tokenizer.
        rows: Rows with choices.
        separator: Text between prompt and answer.
        batch_size: Pairs scored together.
        progress: Called with the number of pairs after each batch.

    Returns:
        One list per row, parallel to its choices.
    """
    room = context_length(model)
    sequences: list[list[int]] = []
    widths: list[int] = []  # tokens of each pair's choice
    for row in rows:
        prompt = encode_prompt(tokenizer, row.prompt)
        for choice in row.choices:
            answer = encode_answer(tokenizer, row.prompt, choice, separator)
            sequences.append(fit(tokenizer, prompt, room and max(2, room - len(answer))) + answer)
            widths.append(len(answer))
    found = [0.0] * len(sequences)
    with evaluating(model) as device:
        for batch in batches([len(ids) for ids in sequences], batch_size):
            inputs = left_pad([sequences[i] for i in batch], pad_id(tokenizer), device)
            longest = max(widths[i] for i in batch)
            targets = inputs["input_ids"][:, -longest:]  # [b, k]
            # One position more than the targets: each logit predicts the next token.
            logits = model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()  # [b, k, v]
            tokens = -cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
                targets.shape
            )  # [b, k]
            place = torch.arange(longest, 0, -1, device=device)  # distance from the right edge, 1 = last token
            own = place <= torch.tensor([[widths[i]] for i in batch], device=device)
            for i, total in zip(batch, (tokens * own).sum(1).tolist(), strict=True):
                found[i] = total
            if progress:
                progress(len(batch))
    each = iter(found)
    return [[next(each) for _ in row.choices] for row in rows]


def pick_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    separator: str = " ",
    normalise: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """The most probable choice of every row; the first of equals.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Rows with choices.
        separator: Text between prompt and answer.
        normalise: Divide each log-likelihood by the choice's length in characters, as lm-eval's ``acc_norm`` does.
        batch_size: Pairs scored together.
        progress: Called with the number of pairs after each batch.
    """
    likelihoods = choice_likelihoods(model, tokenizer, rows, separator, batch_size, progress)
    picked = []
    for row, values in zip(rows, likelihoods, strict=True):
        lengths = [max(1, len(choice)) if normalise else 1 for choice in row.choices]
        scores = [value / length for value, length in zip(values, lengths, strict=True)]
        picked.append(row.choices[scores.index(max(scores))])
    return picked
