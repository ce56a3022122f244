"""Greedy generation in batches: left-padded, length-sorted, with a KV cache, stopping at end of sequence or a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from secura_lightning.data.encode import encode_prompts, pad_id
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import batches, context_length, evaluating, fit, left_pad


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue each prompt greedily until end of sequence, a stop string, or ``max_new_tokens``.

    What a prompt yields does not depend on the others in its batch (floating-point ties aside). Prompts that leave no
    room in the model's context lose tokens on the left, as in training.

    Args:
        model: The model; its mode, random state and generation settings are left as they were.
        tokenizer: Its tokenizer.
        prompts: Texts as :attr:`Row.prompt` holds them.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts generated together.
        progress: Called with the number of prompts after each batch.
        stop: Texts that end an answer, such as the next question's "Question:"; they are not part of it.

    Returns:
        The answers without surrounding white space or special tokens, in the order of ``prompts``.

    Raises:
        ConfigError: A stop string is empty.
    """
    if not all(stop):
        raise ConfigError("a stop string is empty: every answer would end before it begins")
    room = context_length(model, reserve=max_new_tokens)
    encoded = [fit(tokenizer, ids, room) for ids in encode_prompts(tokenizer, prompts)]
    answers = [""] * len(prompts)
    decoder: Any = model  # transformers types `generate` on a mixin that PreTrainedModel does not name
    with evaluating(model) as device, _settings(model, _greedy(model, tokenizer, max_new_tokens)):
        for batch in batches([len(ids) for ids in encoded], batch_size):
            inputs = left_pad([encoded[i] for i in batch], pad_id(tokenizer), device)
            start = inputs["input_ids"].shape[1]
            stopping = StoppingCriteriaList([_StopAt(tokenizer, stop, start)] if stop else [])
            output = decoder.generate(**inputs, stopping_criteria=stopping)[:, start:]  # [b, new]
            texts = tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = _before(text, stop).strip()
            if progress:
                progress(len(batch))
    return answers


class _StopAt(StoppingCriteria):
    """Ends a sequence once its answer holds a stop string, wherever tokens happen to begin and end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], start: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which sequences are done, ``[b]``."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([_before(text, self.stop) != text for text in texts], device=input_ids.device)


def _before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop string in it."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding, with every end-of-sequence id that the tokenizer or the model knows."""
    ends = [tokenizer.eos_token_id]
    known = model.generation_config.eos_token_id if model.generation_config else None
    ends += known if isinstance(known, list) else [known]  # chat models list several
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,  # whatever training set
        pad_token_id=pad_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({end for end in ends if end is not None}) or None,
    )


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Put the model's generation settings aside: ``generate`` would mix a hub model's repetition penalty or
    temperature into ours, which changes greedy answers and warns."""
    kept = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = kept
