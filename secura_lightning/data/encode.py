"""From a row to token ids: the one place where prompts meet answers.

    [bos] prompt separator answer [eos]
    ignored ------------>| trained --->|

The mask is found by the prompt's prefix, never by a chat template's own mask (which is silently all zero when the
template lacks a generation block). Truncation drops tokens from the left of the prompt and never from the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secura_lightning.data.rows import Row
from secura_lightning.errors import SecuraError

IGNORED = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True, slots=True)
class Encoded:
    """One encoded row.

    Attributes:
        ids: Token ids of prompt and answer, ``[t]``.
        n_prompt: How many leading ids belong to the prompt (not trained).
        truncated: How many prompt tokens were dropped to fit.
    """

    ids: Sequence[int]
    n_prompt: int
    truncated: int = 0

    @property
    def n_trained(self) -> int:
        """How many tokens are predicted: all but the prompt, and never the first."""
        return len(self.ids) - max(1, self.n_prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of ``[bos] prompt``, without end of sequence: what generation starts from."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if bos is None else [bos, *ids]


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, separator: str = " ") -> list[int]:
    """Token ids of the answer as it continues the prompt, without end of sequence.

    The prompt's own tokens must stay what generation will see, so the answer is what follows them in the joint
    encoding. Where joining changes the prompt's last token, the answer is encoded on its own instead.
    """
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    joint = tokenizer(prompt + separator + answer, add_special_tokens=False)["input_ids"]
    if joint[: len(alone)] == alone:
        return joint[len(alone) :]
    return tokenizer(separator + answer, add_special_tokens=False)["input_ids"]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, separator: str = " ") -> Encoded:
    """Encode a row for training.

    Args:
        tokenizer: Any Hugging Face tokenizer with an end-of-sequence token.
        row: The row.
        max_length: Most tokens of the result; prompt tokens are dropped from the left to fit.
        separator: Text between prompt and answer.

    Raises:
        SecuraError: The answer is empty, or does not fit into ``max_length`` on its own.
    """
    if not row.answer.strip():
        raise SecuraError(f"row {row.id}: the answer is empty, so no token would be trained; remove the row")
    answer = encode_answer(tokenizer, row.prompt, row.answer, separator)
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    prompt = encode_prompt(tokenizer, row.prompt)
    room = max_length - len(answer)
    if room < 1:
        raise SecuraError(
            f"row {row.id}: its answer takes {len(answer)} of data.max_length={max_length} tokens and leaves no room "
            f"for the prompt; raise data.max_length above {len(answer)}"
        )
    dropped = max(0, len(prompt) - room)
    if dropped:
        keep_bos = tokenizer.bos_token_id is not None and room > 1
        prompt = prompt[:1] + prompt[len(prompt) - room + 1 :] if keep_bos else prompt[len(prompt) - room :]
    return Encoded(prompt + answer, len(prompt), dropped)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a whole document ``[bos] text [eos]``, every token of it trained."""
    ids = encode_prompt(tokenizer, text)
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the pad token, else end of sequence, else 0 (it is masked in any case)."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """Right-pad encoded rows into one batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[b, t]`` of int64; labels are :data:`IGNORED` on
        prompts and on padding.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.as_tensor(row.ids)
        mask[i, :n] = 1
        labels[i, row.n_prompt : n] = ids[i, row.n_prompt : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pack(documents: Sequence[Sequence[int]], length: int) -> list[Encoded]:
    """Concatenate whole documents and cut them into blocks of ``length`` tokens, every token trained.

    The tail that fills no block is dropped (fewer than ``length`` tokens). Documents in one block see each other,
    as is usual for pretraining.
    """
    stream = np.fromiter((token for document in documents for token in document), dtype=np.int32)
    blocks = stream[: len(stream) // length * length].reshape(-1, length)
    return [Encoded(block, 0) for block in blocks]  # type: ignore[arg-type]
