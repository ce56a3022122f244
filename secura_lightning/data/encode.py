"""From a row to token ids: the one place where prompts meet answers.

    [bos] prompt separator answer [eos]               plain
    head prompt tail separator answer end             through a chat template, see secura_lightning.data.prompt
    ignored ---------->| trained ----->|

The mask is found by the prompt's prefix, never by a chat template's own mask (which is silently all zero when the
template lacks a generation block). Truncation drops tokens from the left of the prompt, and never from the answer or
from what the template writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secura_lightning.data.prompt import Frame, PromptFormat, as_format
from secura_lightning.data.rows import Row
from secura_lightning.errors import SecuraError

IGNORED = -100  # the label that torch's cross-entropy skips
PLAIN_OR_CHAT = PromptFormat()  # a chat template where the tokenizer has one
Ids = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded row.

    Attributes:
        ids: Token ids of prompt and answer, ``[t]``.
        n_prompt: How many leading ids belong to the prompt (not trained).
        truncated: How many prompt tokens were dropped to fit.
    """

    ids: Ids
    n_prompt: int
    truncated: int = 0

    @property
    def n_trained(self) -> int:
        """How many tokens are predicted: all but the prompt, and never the first."""
        return len(self.ids) - max(1, self.n_prompt)


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text on its own, without special tokens; one call, as tokenizers are quick on many."""
    if not texts:
        return []
    # verbose=False: the warning that a text exceeds the model's context; what is cut is counted by whoever cuts.
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One encoded prompt, as generation starts from it.

    Attributes:
        ids: Its token ids.
        head: How many of the first belong to beginning of sequence or chat template, and are never dropped.
        tail: How many of the last are the chat template's.
    """

    ids: list[int]
    head: int = 0
    tail: int = 0

    def cut(self, room: int | None) -> list[int]:
        """At most ``room`` ids, those left out taken from the left of the prompt's own.

        Raises:
            SecuraError: The chat template alone takes more.
        """
        if room is None or len(self.ids) <= room:
            return self.ids
        if self.tail and room < self.head + self.tail:
            raise SecuraError(
                f"the chat template alone takes {self.head + self.tail} tokens, and there is room for {room}"
            )
        head = min(self.head, room - 1)
        return self.ids[:head] + self.ids[len(self.ids) - room + head :]


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], form: PromptFormat | str = PLAIN_OR_CHAT
) -> list[Prompt]:
    """What generation starts from: each prompt in the chat template, or after beginning of sequence.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        prompts: Texts as :attr:`Row.prompt` holds them.
        form: How they are rendered.
    """
    return _prompts(tokenizer, prompts, as_format(form).frame(tokenizer))


def _prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], frame: Frame) -> list[Prompt]:
    head, tail = tokens_of(tokenizer, [frame.head, frame.tail]) if frame.is_chat else ([], [])
    first = list(frame.first_ids)
    return [
        Prompt(first + ids, len(first) + common([ids, head]), common([ids[::-1], tail[::-1]]))
        for ids in tokens_of(tokenizer, [frame.text(prompt) for prompt in prompts])
    ]


def common(sequences: Sequence[Sequence[int]]) -> int:
    """How many ids all sequences begin with."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of ``[bos] text`` of each text as it stands, without end of sequence and without a chat template."""
    bos = tokenizer.bos_token_id
    return [ids if bos is None else [bos, *ids] for ids in tokens_of(tokenizer, prompts)]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], form: PromptFormat | str = PLAIN_OR_CHAT
) -> list[list[int]]:
    """Token ids of each (prompt, answer) pair's answer as it continues its prompt, without what ends it.

    The prompt's own tokens must stay what generation will see, so the answer is what follows them in the joint
    encoding. Where joining changes the prompt's last token, the answer is encoded on its own instead.
    """
    return _answers(tokenizer, pairs, as_format(form).frame(tokenizer), "")


def _answers(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], frame: Frame, end: str
) -> list[list[int]]:
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))  # the choices of a row share theirs
    texts = {prompt: frame.text(prompt) for prompt in prompts}
    alone = dict(zip(prompts, tokens_of(tokenizer, list(texts.values())), strict=True))
    answers = [f"{frame.separator}{answer}{end}" for _, answer in pairs]
    found = tokens_of(tokenizer, [texts[prompt] + answer for (prompt, _), answer in zip(pairs, answers, strict=True)])
    torn: list[int] = []
    for i, (prompt, _) in enumerate(pairs):
        before = alone[prompt]
        if found[i][: len(before)] == before:
            found[i] = found[i][len(before) :]
        else:
            torn.append(i)
    for i, ids in zip(torn, tokens_of(tokenizer, [answers[i] for i in torn]), strict=True):
        found[i] = ids
    return found


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    form: PromptFormat | str = PLAIN_OR_CHAT,
) -> list[Encoded]:
    """Encode rows for training.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        rows: The rows.
        max_length: Most tokens of a result; prompt tokens are dropped from the left to fit.
        form: How prompts and answers are joined.

    Raises:
        SecuraError: An answer is empty, has no tokens, or does not fit into ``max_length`` on its own or with the chat
            template.
    """
    for row in rows:
        if not row.answer.strip():
            raise SecuraError(f"row {row.id}: the answer is empty, so no token would be trained; remove the row")
    frame = as_format(form).frame(tokenizer)
    answers = _answers(tokenizer, [(row.prompt, row.answer) for row in rows], frame, frame.end)
    prompts = _prompts(tokenizer, [row.prompt for row in rows], frame)
    return [
        _join(row, prompt, answer, frame, max_length)
        for row, prompt, answer in zip(rows, prompts, answers, strict=True)
    ]


def _join(row: Row, prompt: Prompt, answer: list[int], frame: Frame, max_length: int) -> Encoded:
    if len(answer) <= bool(frame.end):
        raise SecuraError(
            f"row {row.id}: the tokenizer makes no token of the answer {row.answer!r}, so none would be trained; "
            "remove the row"
        )
    answer = [*answer, *frame.last_ids]
    least = prompt.head + prompt.tail if frame.is_chat else 1
    if len(answer) + least > max_length:
        what = f"the chat template {least} more and leave" if frame.is_chat else "leaves"
        raise SecuraError(
            f"row {row.id}: its answer takes {len(answer)} of data.max_length={max_length} tokens and {what} no room "
            f"for the prompt; raise data.max_length above {len(answer) + least - 1}"
        )
    kept = prompt.cut(max_length - len(answer))
    return Encoded(kept + answer, len(kept), len(prompt.ids) - len(kept))


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole documents ``[bos] text [eos]``, every token of them trained."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [ids + end for ids in encode_prompts(tokenizer, texts)]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the pad token, else end of sequence, else 0 (it is masked in any case)."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Right-pad encoded rows into one batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[b, t]`` of int64; labels are :data:`IGNORED` on
        prompts, on padding, and on the first token, which nothing predicts.
    """
    batch = collate_packed([[row] for row in rows], pad)
    del batch["position_ids"]
    return batch


def collate_packed(bins: Sequence[Sequence[Encoded]], pad: int) -> dict[str, Tensor]:
    """Rows one after another in each line of a batch, told apart by positions that start again at 0.

        rows    a a a a b b b c c . .
        places  0 1 2 3 0 1 2 0 1 0 1      no row attends to another (see :mod:`secura_lightning.modeling.packing`)

    Args:
        bins: The rows of each line.
        pad: Token id that fills the lines.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens, 0 on padding), ``position_ids`` and ``labels``, each ``[b, t]``
        of int64. The first label of a row is :data:`IGNORED`: what stands before it is another row.
    """
    width = max(sum(len(row.ids) for row in line) for line in bins)
    ids = np.full((len(bins), width), pad, dtype=np.int64)
    mask = np.zeros((len(bins), width), dtype=np.int64)
    places = np.zeros((len(bins), width), dtype=np.int64)
    labels = np.full((len(bins), width), IGNORED, dtype=np.int64)
    for i, line in enumerate(bins):
        start = 0
        for row in line:
            end = start + len(row.ids)
            first = start + max(1, row.n_prompt)
            ids[i, start:end] = row.ids
            labels[i, first:end] = ids[i, first:end]
            places[i, start:end] = np.arange(len(row.ids))
            start = end
        mask[i, :start] = 1
        places[i, start:] = np.arange(width - start)
    parts = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": labels}
    return {name: torch.from_numpy(part) for name, part in parts.items()}


def pack(documents: Iterable[Sequence[int]], length: int) -> list[Encoded]:
    """Concatenate whole documents and cut them into blocks of ``length`` tokens, every token trained.

    The tail that fills no block is dropped (fewer than ``length`` tokens). Documents in one block see each other,
    as is usual for pretraining.
    """
    stream = np.fromiter((token for document in documents for token in document), dtype=np.int32)
    blocks = stream[: len(stream) // length * length].reshape(-1, length)
    return [Encoded(block, 0) for block in blocks]
