"""Text that a model says of its own accord: batched sampling from a bare prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.errors import SecuraError


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    max_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Sequences drawn from the model's own distribution, without top-k, top-p or penalties.

    Each begins with the beginning-of-sequence token (end of sequence where the tokenizer has none, which separates
    documents in such models' training text) and ends with end of sequence or at ``max_length``.

    Args:
        model: The model, in evaluation mode and without gradients.
        tokenizer: Its tokenizer.
        number: How many.
        max_length: Most tokens of a sequence, the first included.
        temperature: Divides the logits.
        seed: Seed of the draws, which leave torch's own random state alone.
        batch_size: Sequences drawn together.
        progress: Called with the number of sequences after each batch.

    Returns:
        ``number`` lists of token ids.

    Raises:
        SecuraError: The tokenizer has neither beginning nor end of sequence.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise SecuraError(
            "model.calibration: the tokenizer has no token to start from; use TextCalibration or TaskCalibration"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    ends = end_ids(model, tokenizer)
    found: list[list[int]] = []
    while len(found) < number:
        size = min(batch_size, number - len(found))
        ids = _sample_batch(
            model, torch.full((size, 1), start, device=device), max_length, temperature, ends, generator
        )
        found += [_until_end(row, ends) for row in ids.tolist()]
        if progress:
            progress(size)
    return found


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a sequence, of the tokenizer's and of the model's (chat models list several)."""
    known: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    return sorted(end for end in ends if end is not None)


def _sample_batch(
    model: PreTrainedModel,
    ids: Tensor,
    max_length: int,
    temperature: float,
    ends: list[int],
    generator: torch.Generator,
) -> Tensor:
    """Continue ``ids`` [b, 1] to at most [b, max_length]; what follows an end of sequence means nothing."""
    stop = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    last, past = ids, None
    while ids.shape[1] < max_length and not done.all():
        output: Any = model(input_ids=last, past_key_values=past, use_cache=True)
        past = output.past_key_values
        chances = (output.logits[:, -1].float() / temperature).softmax(-1)  # [b, v]
        last = chances.multinomial(1, generator=generator)
        ids = torch.cat([ids, last], dim=1)
        done |= torch.isin(last.squeeze(1), stop)
    return ids


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The first token, which may be an end of sequence itself, and what follows up to the next end."""
    stop = next((i for i in range(1, len(ids)) if ids[i] in ends), len(ids) - 1)
    return ids[: stop + 1]
