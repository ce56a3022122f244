"""How far two models' logits are apart on probe text: what a merge or an export is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_lightning.data.encode import render_prompts
from secura_lightning.data.prompt import PromptFormat
from secura_lightning.errors import SecuraError
from secura_lightning.evaluation.batching import context_length, evaluating

# Prose, figures, code and questions, so that most parts of a model have something to say.
PROBE_TEXTS = (
    "The river rises in the mountains, crosses three countries and reaches the sea after two thousand miles. "
    "Merchants have carried salt, timber and letters along it for centuries.",
    "Question: A train travels 60 miles in 45 minutes. How far does it travel in two hours? Answer: 160 miles, because "
    "two hours hold 120 / 45 = 2.67 such stretches.",
    "def mean(values):\n    return sum(values) / len(values) if values else 0.0\n",
    "Translate into German: The old house stands at the end of the garden. Das alte Haus steht am Ende des Gartens.",
)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}


def default_tolerance(dtype: torch.dtype) -> float:
    """Largest logit difference that rounding explains in a model whose weights and activations are of type ``dtype``.

    A rule of thumb for logits of order 10: a random Llama of two layers with steep weights reaches 0.6 in bf16 and
    2e-5 in fp32. A change that is lost or doubled moves logits by more than that.
    """
    return _TOLERANCE.get(dtype, 1e-3)


def least_tolerance(dtype: torch.dtype) -> float:
    """Below this a difference of logits is rounding in the computation itself, and says nothing about weights.

    Nothing in 16 bits, where rounding the merged weight is what can lose a small change.
    """
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.0)


def probe_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = PROBE_TEXTS
) -> list[Tensor]:
    """Logits of every token of every text, each ``[t, vocabulary]`` in fp32 on the CPU.

    Raises:
        SecuraError: The texts hold no token, or the logits are not finite.
    """
    room = context_length(model)
    prompts = render_prompts(tokenizer, texts, PromptFormat(chat=False))
    encoded = [prompt.cut(room) for prompt in prompts if prompt.ids]
    if not encoded:
        raise SecuraError("--text: the tokenizer makes no token of it, so nothing can be compared")
    found = []
    call = cast(Any, model)
    with evaluating(model) as device:
        for ids in encoded:
            found.append(call(torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu())
    if not all(bool(logits.isfinite().all()) for logits in found):
        raise SecuraError("the model's logits on probe text are not finite: its weights are broken")
    return found


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest absolute difference between two results of :func:`probe_logits`."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
