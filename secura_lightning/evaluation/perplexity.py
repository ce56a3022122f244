"""Token-weighted perplexity of documents: exp of the mean negative log-likelihood over all tokens of all documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.encode import IGNORED, encode_texts, pad_id
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import (
    LOGITS_BUDGET,
    batches,
    call_cost,
    context_length,
    evaluating,
    left_pad,
    most_tokens,
)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
    max_length: int | None = None,
    stride: int | None = None,
) -> tuple[float, int]:
    """Perplexity of ``texts`` and the number of tokens that it is weighted by; (NaN, 0) without any.

    See :func:`token_loss` for the arguments.
    """
    return perplexity_of(*token_loss(model, tokenizer, texts, batch_size, max_length, stride))


def perplexity_of(loss: float, tokens: int) -> tuple[float, int]:
    """Perplexity from a summed loss; (NaN, 0) without tokens, infinite where exp overflows."""
    if not tokens:
        return math.nan, 0
    mean = loss / tokens
    return (math.exp(mean) if mean < 700 else math.inf), tokens


def token_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 64,
    max_length: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[float, int]:
    """Negative log-likelihood of all tokens but each document's first, every one scored exactly once.

    A document longer than ``max_length`` is read in windows that advance by ``stride``: smaller strides give each token
    more context and cost more.

    Args:
        model: The model; its mode and random state are left as they were.
        tokenizer: Its tokenizer.
        texts: Documents.
        batch_size: Most windows scored together (fewer where logits would grow too large).
        max_length: Tokens of a window; by default the model's context, at most 1024.
        stride: Tokens by which windows advance; by default ``max_length - 1``, one token of overlap.
        progress: Called with the number of windows after each batch.

    Returns:
        The sum in nats and the number of scored tokens.

    Raises:
        ConfigError: ``stride`` leaves tokens out, or ``max_length`` is below 2.
    """
    length = max_length or min(context_length(model) or 1024, 1024)
    step = stride or length - 1
    if not 1 <= step < length:
        raise ConfigError(f"perplexity: stride={step} must be at least 1 and below max_length={length}")
    encoded = encode_texts(tokenizer, texts)
    cut = [(ids[start:end], end - first) for ids in encoded for start, first, end in windows(len(ids), length, step)]
    budget = max(1, LOGITS_BUDGET // model.config.get_text_config().vocab_size)
    total, count = 0.0, 0
    with evaluating(model) as device:
        max_tokens = min(budget, most_tokens(device) or budget)
        for batch in batches([len(ids) for ids, _ in cut], batch_size, max_tokens, call_cost(device)):
            inputs = left_pad([cut[i][0] for i in batch], pad_id(tokenizer), device)
            # Only a window's last `fresh` tokens are its own to score; they sit at the right edge.
            place = torch.arange(inputs["input_ids"].shape[1], 0, -1, device=device)  # 1 = last token
            fresh = place <= torch.tensor([[cut[i][1]] for i in batch], device=device)  # [b, t]
            labels = inputs["input_ids"].masked_fill(~fresh, IGNORED)[:, 1:]  # [b, t-1]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()  # [b, t-1, v]
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            total += loss.double().sum().item()
            count += int((labels != IGNORED).sum())
            if progress:
                progress(len(batch))
    return total, count


def windows(n: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows over ``n`` tokens as (start, first scored, end): every token but the first is scored once."""
    found: list[tuple[int, int, int]] = []
    scored = 1
    while scored < n:
        start = stride * len(found)
        end = min(start + length, n)
        found.append((start, scored, end))
        scored = end
    return found
