"""Multiple choice by likelihood: which candidate answer does the model find most probable after the prompt?

    prompts [rows, t] --forward--> KV cache, p(first token)
                                      |  repeated for each choice
    choices [pairs, k] --forward------+--> p(other tokens)

Each prompt is read once for all of its choices; where choices are single tokens, the second pass falls away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

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

    Args:
        model: The model; its mode and random state are left as they were.
        tokenizer: Its tokenizer.
        rows: Rows with choices.
        separator: Text between prompt and answer.
        batch_size: Most (row, choice) pairs scored together; one row's choices always are.
        progress: Called with the number of rows after each batch.

    Returns:
        One list per row, parallel to its choices.
    """
    room = context_length(model)
    prompts: list[list[int]] = []
    answers: list[list[list[int]]] = []
    for row in rows:
        encoded = [encode_answer(tokenizer, row.prompt, choice, separator) for choice in row.choices]
        longest = max(map(len, encoded))
        prompts.append(fit(tokenizer, encode_prompt(tokenizer, row.prompt), room and max(2, room - longest)))
        answers.append(encoded)
    found: list[list[float]] = [[] for _ in rows]
    together = max(1, batch_size // max((len(row.choices) for row in rows), default=1))
    with evaluating(model) as device:
        for batch in batches([len(ids) for ids in prompts], together):
            inputs = left_pad([prompts[i] for i in batch], pad_id(tokenizer), device)
            pairs = [(place, ids) for place, i in enumerate(batch) for ids in answers[i]]
            for (place, _), total in zip(pairs, _score(model, inputs, pairs).tolist(), strict=True):
                found[batch[place]].append(total)
            if progress:
                progress(len(batch))
    return found


def _score(model: PreTrainedModel, prompts: dict[str, Tensor], pairs: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Log-likelihood of each (index of its prompt, choice ids) pair, ``[pairs]``."""
    device = prompts["input_ids"].device
    owner = torch.tensor([place for place, _ in pairs], device=device)
    width = max(len(ids) for _, ids in pairs)
    # Padding on the right: what follows a choice cannot be seen from it. The id is any; its score is masked out.
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, ids in pairs], device=device)  # [pairs, k]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, ids in pairs], device=device)
    cache = DynamicCache(config=model.config)
    first = model(**prompts, past_key_values=cache, use_cache=width > 1, logits_to_keep=1).logits  # [rows, 1, v]
    logits = first[owner]  # [pairs, 1, v]
    if width > 1:
        cache.batch_select_indices(owner)
        places = prompts["position_ids"][owner, -1:] + torch.arange(1, width, device=device)
        seen = torch.cat([prompts["attention_mask"][owner], mask[:, :-1]], 1)
        # The last token of a choice predicts nothing that counts, so it is not read.
        rest = model(ids[:, :-1], attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, rest.logits], 1)  # [pairs, k, v]
    chosen = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0]  # [pairs, k]
    return (chosen * mask).sum(1)


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
        batch_size: Most (row, choice) pairs scored together.
        progress: Called with the number of rows after each batch.
    """
    likelihoods = choice_likelihoods(model, tokenizer, rows, separator, batch_size, progress)
    picked = []
    for row, values in zip(rows, likelihoods, strict=True):
        lengths = [max(1, len(choice)) if normalise else 1 for choice in row.choices]
        scores = [value / length for value, length in zip(values, lengths, strict=True)]
        picked.append(row.choices[scores.index(max(scores))])
    return picked
