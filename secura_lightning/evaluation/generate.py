"""Greedy generation in batches: left-padded, length-sorted, with a KV cache, stopping at end of sequence or a text.

prompts --one forward--> KV cache --token by token--> answers
                             '- rows that have ended leave the batch, so that it never computes for long answers alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.encode import pad_id, render_prompts, tokens_of
from secura_lightning.data.prompt import Frame, PromptFormat, as_format
from secura_lightning.errors import ConfigError
from secura_lightning.evaluation.batching import context_length, evaluating, has_plain_cache, lay_together, read_prompts

_WORTH = 7 / 8  # share of a batch's rows that may still be at work for it to be made smaller: that copies the cache


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    stop: Sequence[str] = (),
    form: PromptFormat | str = PromptFormat(),  # noqa: B008  # frozen
) -> list[str]:
    """Continue each prompt greedily until end of sequence, end of turn, a stop string, or ``max_new_tokens``.

    What a prompt yields does not depend on the others in its batch (floating-point ties aside). Prompts that leave no
    room in the model's context lose tokens on the left, as in training.

    Args:
        model: The model; its mode, random state and generation settings are left as they were, and the latter unused:
            a hub model's repetition penalty would change what is measured.
        tokenizer: Its tokenizer.
        prompts: Texts as :attr:`Row.prompt` holds them.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts generated together.
        progress: Called with the number of answers that have ended, whenever some have.
        stop: Texts that end an answer, such as the next question's "Question:"; they are not part of it.
        form: How prompts are rendered.

    Returns:
        The answers without surrounding white space or special tokens, in the order of ``prompts``.

    Raises:
        ConfigError: A stop string is empty.
        SecuraError: The context has no room for the chat template.
    """
    if not all(stop):
        raise ConfigError("a stop string is empty: every answer would end before it begins")
    room = context_length(model, reserve=max_new_tokens)
    encoded = [prompt.cut(room) for prompt in render_prompts(tokenizer, prompts, form)]
    ends = end_ids(model, tokenizer, as_format(form).frame(tokenizer))
    answers = [""] * len(prompts)
    with evaluating(model) as device:
        decoding = _Decoding(model, max_new_tokens, ends, _stopping(tokenizer, stop), pad_id(tokenizer), device)
        waiting = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), i))  # what is too large fails at once
        refilled = has_plain_cache(model)
        while waiting or decoding.rows:
            # A batch half empty takes in more prompts, where caches can be laid together.
            if waiting and (not decoding.rows or (refilled and len(decoding.rows) <= batch_size // 2)):
                taken = waiting[: batch_size - len(decoding.rows)]
                del waiting[: len(taken)]
                decoding.read({i: encoded[i] for i in taken})
            done = decoding.step()
            if not done:
                continue
            ended = list(done.values())
            texts = tokenizer.batch_decode(ended, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for i, text in zip(done, texts, strict=True):
                answers[i] = _before(text, stop).strip()
            if progress:
                progress(len(done))
    return answers


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> set[int]:
    """Every id that ends an answer: the tokenizer's, the model's (chat models list several), the chat template's."""
    known: Any = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    if frame.end:
        ends.add(tokens_of(tokenizer, [frame.end])[0][-1])
    return {end for end in ends if end is not None}


class _Decoding:
    """Rows that are being continued, token by token, in one cache.

    Args:
        model: The model.
        most: Most tokens of an answer.
        ends: Token ids that end one.
        stopped: Whether an answer has come to a stop string.
        pad: Token id that fills short prompts.
        device: Where the model is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        most: int,
        ends: set[int],
        stopped: Callable[[list[int]], bool],
        pad: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.most = most
        self.ends = ends
        self.stopped = stopped
        self.pad = pad
        self.device = device
        self.rows: dict[int, list[int]] = {}  # the answers that grow, in the cache's order
        self._lines: list[int] = []  # the cache's rows; some may have ended
        self._cache = DynamicCache(config=model.config)
        self._seen = self._places = torch.zeros(0, 0, dtype=torch.long, device=device)  # attention mask, next positions
        self._tokens = torch.zeros(0, dtype=torch.long, device=device)  # what each line says next

    def read(self, prompts: dict[int, list[int]]) -> None:
        """Take in more rows."""
        ids = list(prompts.values())
        cache, logits, seen = read_prompts(self.model, ids, 1, self.pad, self.device)
        tokens, places = logits[:, -1].float().argmax(-1), seen.sum(1, keepdim=True)
        if self.rows:
            if len(self.rows) < len(self._lines):
                self._shrink()
            cache, seen = lay_together(self.model, [(self._cache, self._seen), (cache, seen)])
            tokens, places = torch.cat([self._tokens, tokens]), torch.cat([self._places, places])
            self._lines += prompts
        else:
            self._lines = list(prompts)
        self._cache, self._seen, self._tokens, self._places = cache, seen, tokens, places
        self.rows |= {row: [] for row in prompts}

    def step(self) -> dict[int, list[int]]:
        """Add a token to each row and find the next.

        Returns:
            The answers that end here, without what ends them.
        """
        done: dict[int, list[int]] = {}
        for row, token in zip(self._lines, self._tokens.tolist(), strict=True):
            answer = self.rows.get(row)
            if answer is None:
                continue
            if token not in self.ends:
                answer.append(token)
                if len(answer) < self.most and not self.stopped(answer):
                    continue
            done[row] = self.rows.pop(row)
        if self.rows:
            if len(self.rows) <= _WORTH * len(self._lines):
                self._shrink()
            self._forward()
        return done

    def _shrink(self) -> None:
        """Take the rows that have ended out of the cache."""
        kept = torch.tensor([i for i, row in enumerate(self._lines) if row in self.rows], device=self.device)
        self._cache.batch_select_indices(kept)
        self._lines = [row for row in self._lines if row in self.rows]
        self._tokens, self._seen, self._places = self._tokens[kept], self._seen[kept], self._places[kept]

    def _forward(self) -> None:
        self._seen = torch.cat([self._seen, self._seen.new_ones(len(self._lines), 1)], 1)
        logits: Tensor = self.model(
            self._tokens[:, None],
            attention_mask=self._seen,
            position_ids=self._places,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._tokens = logits[:, -1].float().argmax(-1)  # [rows]
        self._places = self._places + 1


def _stopping(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the newest token completes a stop string, wherever tokens happen to begin and end."""
    if not stop:
        return lambda _: False
    # A token holds a byte or more, so that the newest so many hold any stop string that ends in the last of them; two
    # more, because tokenizers drop a space in front of what they decode, and tokens may complete it later.
    reach = max(len(text.encode()) for text in stop) + 2

    def stopped(answer: list[int]) -> bool:
        text = str(tokenizer.decode(answer[-reach:], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return _before(text, stop) != text

    return stopped


def _before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop string in it."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text
